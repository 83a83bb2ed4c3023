"""Pack and unpack the records of our messages. Groups of clients have messages of their own: see groups.py.

    type          server to client                       client to server
    query.attest  order                                  claims: columns, an entry for each client at the node
    query.base    order, arrays (the base)               nothing
    train         order, arrays (the global model)       arrays (the trained model), metrics, claim
    evaluate      order, arrays                          metrics, claim

`order` holds the Instructions: the client, the round, the run and the digest of the server's source code. `claim` says
who answers, and with which data. Both are ConfigRecords. `metrics` is a MetricRecord, and `arrays` an ArrayRecord of
the state dict.
"""

import io
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from flapp.custom import source_digest
from flapp.untrusted import printable, read_npy_header

ATTEST, BASE, TRAIN, EVALUATE = "query.attest", "query.base", "train", "evaluate"
ARRAYS, INSTRUCTIONS, METRICS, CLAIM, CLAIMS = "arrays", "order", "metrics", "claim", "claims"
NUM_EXAMPLES, REPLAYED = "num-examples", "replayed"
VAL = "val-"  # begins the names of metrics of validation samples
WITHIN_CLIP = "within-clip"  # whether an update was at most as long as the clipping norm, 1 or 0
CLIPPING_NORM = "clipping_norm"
SUMS = "sum-"  # begins the names of the sums of evaluate.metrics, after val- and personal-
LONGEST_TEXT, MOST_METRICS, MOST_CLASSES = 500, 1024, 1 << 16  # in one message
LOST = {  # the meaning of Flower's own error codes; other errors have a reason of their own
    ErrorCode.NODE_UNAVAILABLE: "its node stopped answering (killed, out of memory, or disconnected)",
    ErrorCode.MESSAGE_UNAVAILABLE: "its node left the federation, or did not answer before the message expired",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its answer expired before it could be read",
    ErrorCode.CLIENT_APP_CRASHED: "its process ended before it answered (killed, or out of memory)",
}
RAY_LOST = re.compile(
    r"<class 'ray\.exceptions\.(ActorDied|ActorUnavailable|NodeDied|OutOfMemory|WorkerCrashed)Error'>"
)


class MessageError(ValueError):
    """A message that cannot be read or used; the text says why."""


@dataclass(frozen=True)
class Instructions:
    """What the server asks of a client in a round.

    accepted_round: the last round in which the server accepted this client's trained model, 0 for none; the client
    continues from the private state that it had then. base, with adapters: the digest of the frozen tensors that the
    client must hold; returns: the tensors that it trains and sends back; private: those that it trains and keeps.
    Without adapters the whole model travels. code: the digest of the user's own code. clipping_norm: the length to
    which updates are clipped in this round; only messages of runs with central privacy have it.
    """

    client_id: str
    server_round: int
    source_digest: str
    accepted_round: int = 0
    base: str = ""
    returns: tuple[str, ...] = ()
    private: tuple[str, ...] = ()
    code: str = ""
    clipping_norm: float = 0.0


@dataclass(frozen=True)
class Claim:
    """What a client holds: samples per split, training labels per class, and digests to check them by.

    A client that cannot take part says why in `fault`; then only its client_id is also read.
    """

    client_id: str
    train: int = 0
    val: int = 0
    test: int = 0
    label_hist: tuple[int, ...] = ()
    shard_digest: str = ""
    base_digest: str = ""
    source_digest: str = ""
    versions: str = ""
    fault: str = ""


@dataclass
class Answer:
    """One client's answer: the digest of its data, its numbers and (after training) its tensors, or why it failed."""

    client_id: str
    shard_digest: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    arrays: ArrayRecord | None = None
    failure: str = ""


def _types(cls: type) -> dict[str, type]:
    return {name: list if "tuple" in str(kind) else kind for name, kind in cls.__annotations__.items()}


INSTRUCTION_FIELDS, CLAIM_FIELDS = _types(Instructions), _types(Claim)
ANSWER_FIELDS = {"client_id": str, "shard_digest": str}


def pack_instructions(node_id: int, kind: str, asked: Instructions, arrays: ArrayRecord | None = None) -> Message:
    """Build the message of `kind` that gives a node these instructions."""
    fields = {name: value for name, value in vars(asked).items() if value or name != CLIPPING_NORM}
    content = RecordDict({INSTRUCTIONS: _config_record(fields)})
    if arrays is not None:
        content[ARRAYS] = arrays
    return Message(content, dst_node_id=node_id, message_type=kind, group_id=str(asked.server_round))


def unpack_instructions(message: Message) -> Instructions:
    """Read the instructions in a message; raises MessageError for a server that runs other source code."""
    is_clipped = CLIPPING_NORM.replace("_", "-") in message.content.config_records.get(INSTRUCTIONS, ())
    expected = {name: kind for name, kind in INSTRUCTION_FIELDS.items() if is_clipped or name != CLIPPING_NORM}
    instructions = Instructions(**_fields(message.content, INSTRUCTIONS, expected))
    if instructions.source_digest != source_digest():
        raise MessageError(
            f"flapp here has source {source_digest()[:12]}, the server's has {instructions.source_digest[:12]}: "
            "install the same flapp on both, and restart SuperLinks and SuperNodes that were started with another flapp"
        )
    return instructions


def unpack_arrays(content: RecordDict) -> ArrayRecord:
    """Return the model in a message; raises MessageError when there is none."""
    record = content.get(ARRAYS)  # content.array_records would be made anew each time
    if not isinstance(record, ArrayRecord):
        raise MessageError("the message carries no arrays")
    return record


def pack_claims(message: Message, claims: list[Claim]) -> Message:
    """Answer an attest message for every client at this node: columns, with one entry a client."""
    columns: dict[str, list[Any]] = {name: [getattr(claim, name) for claim in claims] for name in CLAIM_FIELDS}
    columns["label_hist"] = [count for claim in claims for count in claim.label_hist]
    columns["classes"] = [len(claim.label_hist) for claim in claims]
    return Message(RecordDict({CLAIMS: _config_record(columns)}), reply_to=message)


def unpack_claims(content: RecordDict, most: int) -> list[Claim]:
    """Read all claims in an answer to attest.

    Raises MessageError for more than `most` claims, for any other record, and for columns that are not of claims.
    """
    if odd := content.keys() - {CLAIMS}:
        raise MessageError(f"sent {len(odd)} records that are not claims, such as {one_line(min(odd))}")
    if CLAIMS not in content.config_records:
        raise MessageError("the message carries no claims")
    records: dict[str, Any] = dict(content.config_records[CLAIMS])
    columns = {name.replace("-", "_"): values for name, values in records.items()}
    if wrong := columns.keys() ^ {*CLAIM_FIELDS, "classes"}:
        raise MessageError(f"its claims have a missing or foreign entry: {one_line(min(wrong))}")
    count = len(columns["client_id"]) if isinstance(columns["client_id"], list) else 0
    if count > most:
        raise MessageError(f"claims {count} clients, the run has {most}")
    counts, sizes = columns["label_hist"], columns["classes"]
    is_sound = _is_column(sizes, int, count) and all(0 <= size <= MOST_CLASSES for size in sizes)
    if not is_sound or not _is_column(counts, int, sum(sizes)) or any(number < 0 for number in counts):
        raise MessageError("its claims have a label histogram that is not of counts")
    ends = list(itertools.accumulate(sizes, initial=0))
    rest: dict[str, list[Any]] = {"label_hist": [tuple(counts[i:j]) for i, j in itertools.pairwise(ends)]}
    for name, kind in CLAIM_FIELDS.items():
        if name == "label_hist":
            continue
        if not _is_column(columns[name], kind, count):
            raise MessageError(f"its claims have a mistyped entry: {name}")
        if kind is str and name != "fault" and any(len(text) > LONGEST_TEXT for text in columns[name]):
            raise MessageError(f"its claims have a {name} of over {LONGEST_TEXT} characters")
        rest[name] = columns[name]
    rest["fault"] = [one_line(text) for text in rest["fault"]]
    return [Claim(**dict(zip(rest, values, strict=True))) for values in zip(*rest.values(), strict=True)]


def _is_column(values: Any, kind: type, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(type(value) is kind for value in values)


def pack_reply(
    message: Message, claim: Claim, metrics: Mapping[str, int | float], arrays: ArrayRecord | None = None
) -> Message:
    """Answer a train or evaluate message with numbers and, after training, the model."""
    answer = ConfigRecord({"client-id": claim.client_id, "shard-digest": claim.shard_digest})
    content = RecordDict({CLAIM: answer, METRICS: MetricRecord(dict(metrics))})
    if arrays is not None:
        content[ARRAYS] = arrays
    return Message(content, reply_to=message)


def unpack_reply(content: RecordDict, kind: str = TRAIN) -> Answer:
    """Read a client's reply of `kind`.

    Raises MessageError for missing and foreign records, for too many metrics, and for lists among them.
    """
    expected = {CLAIM, METRICS, ARRAYS} if kind == TRAIN else {CLAIM, METRICS}
    if odd := content.keys() - expected:
        raise MessageError(f"sent {len(odd)} records that nobody asked for, such as {one_line(min(odd))}")
    record = content.get(METRICS)
    if not isinstance(record, MetricRecord):
        raise MessageError("the reply carries no metrics")
    metrics = dict(record)
    if len(metrics) > MOST_METRICS:
        raise MessageError(f"sent {len(metrics)} metrics, at most {MOST_METRICS} are read")
    if lists := [name for name, value in metrics.items() if isinstance(value, list)]:
        raise MessageError(f"the reply's metric {one_line(lists[0])} is a list, not a number")
    facts = _fields(content, CLAIM, ANSWER_FIELDS)
    if max(map(len, facts.values())) > LONGEST_TEXT:
        raise MessageError(f"the reply's claim has a text of over {LONGEST_TEXT} characters")
    arrays = unpack_arrays(content) if kind == TRAIN else None
    return Answer(**facts, metrics=metrics, arrays=arrays)  # type: ignore[arg-type]


def describe_error(error: Error) -> str:
    """Return in one line why a message was not answered, in plainer words than Flower's."""
    reason = error.reason or ""
    code = ErrorCode.CLIENT_APP_CRASHED if RAY_LOST.match(reason) else error.code
    return LOST.get(code) or one_line(reason)


def one_line(text: str) -> str:
    """Return somebody else's text as one printable line of at most LONGEST_TEXT characters."""
    return printable(" ".join(text[: 4 * LONGEST_TEXT].split()), LONGEST_TEXT - 3)


class HeldArray(Array):
    """An Array over numbers that may change later, such as a model's; its bytes are made when they are first asked for.

    The tensors of a client in a group are often only added to a sum, which does not need the bytes.
    """

    def __init__(self, values: np.ndarray) -> None:
        held = values.view()
        held.flags.writeable = False
        self.__dict__.update(dtype=str(values.dtype), shape=values.shape, stype="numpy.ndarray", held=held)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """Return the bytes as they were when they were first asked for."""
        if "packed" not in self.__dict__:
            self.__dict__["packed"] = pack(self.__dict__.pop("held")).data
        return self.__dict__["packed"]

    def deflate(self) -> bytes:
        """Return the bytes of a plain Array: Flower writes the class name into them, and knows only its own class."""
        return Array(self.dtype, self.shape, self.stype, self.data).deflate()

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


def settle(message: Message) -> None:
    """Make a message keep the current values of its arrays."""
    for record in message.content.values() if message.has_content() else ():
        for array in record.values() if isinstance(record, ArrayRecord) else ():
            array.data  # noqa: B018 - a HeldArray makes its bytes


def parts_of(array: Array) -> tuple[bytes | memoryview, ...]:
    """Return the bytes of an array in parts to write one after another, without a copy."""
    held: np.ndarray | None = array.__dict__.get("held")
    if held is None or not held.size or not held.flags.c_contiguous:
        return (array.data,)
    return _npy_header(held.dtype, held.shape), held.reshape(-1).view(np.uint8).data


def size_of_array(array: Array) -> int:
    """Return how many bytes an array takes in a message."""
    held: np.ndarray | None = array.__dict__.get("held")
    return len(array.data) if held is None else len(_npy_header(held.dtype, held.shape)) + held.nbytes


def view(array: Array) -> np.ndarray:
    """Return the read-only numpy array inside a Flower Array; raises ValueError unless it is one of plain numbers."""
    if (held := array.__dict__.get("held")) is not None:
        return held
    try:
        shape, fortran, dtype, offset = read_npy_header(array.data)
        if len(array.data) - offset != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"its {len(array.data) - offset:,} bytes are not those of {dtype} {list(shape)}")
        flat = np.frombuffer(array.data, dtype, math.prod(shape), offset) if math.prod(shape) else np.empty(0, dtype)
        return flat.reshape(shape, order="F" if fortran else "C")
    except ValueError as error:
        raise ValueError(f"not a plain array of {printable(array.dtype, 40)} ({error})") from error


def views(record: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """Return the arrays inside a model, each as `view` does."""
    return {key: view(array) for key, array in record.items()}


def pack(values: np.ndarray) -> Array:
    """Return a numpy array as a Flower Array, with one copy where Array(values) makes three."""
    values = np.asarray(values, order="C")
    data = b"".join((_npy_header(values.dtype, values.shape), values.data))
    return Array(str(values.dtype), values.shape, "numpy.ndarray", data)


def as_record(arrays: Mapping[str, Array]) -> ArrayRecord:
    """Return Arrays as an ArrayRecord, without the copies of them that ArrayRecord(dict) makes."""
    record = ArrayRecord()
    for key, array in arrays.items():
        record[key] = array
    return record


@lru_cache(maxsize=1024)
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, facts)
    return header.getvalue()


def size_of(record: Mapping[str, Array]) -> int:
    """Return how many bytes a model takes in a message."""
    return sum(map(size_of_array, record.values()))


def _config_record(values: Mapping[str, Any]) -> ConfigRecord:
    return ConfigRecord({k.replace("_", "-"): list(v) if isinstance(v, tuple) else v for k, v in values.items()})


def _fields(content: RecordDict, key: str, expected: Mapping[str, type]) -> dict[str, Any]:
    record = content.get(key)
    if not isinstance(record, ConfigRecord):
        raise MessageError(f"the message carries no {one_line(key)}")
    values = {name.replace("-", "_"): value for name, value in record.items()}
    wrong = {n for n in expected.keys() | values.keys() if n not in expected or type(values.get(n)) is not expected[n]}
    if wrong:
        named = one_line(", ".join(sorted(wrong)[:12]))
        raise MessageError(f"the message's {one_line(key)} has a missing, foreign or mistyped entry: {named}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
