"""The words in our messages: packed and unpacked here and nowhere else.

    type          server to client                       client to server
    query.attest  order                                  claim-<client id> for each client at the node
    query.base    order, piece, arrays (of the base)     metrics (pieces still missing)
    train         order, arrays (the global model)       arrays (the trained model), metrics, claim
    evaluate      order, arrays                          metrics, claim

`order` says who is meant, in which round of which run, and whose source code asks; `claim` says who answers.
Both are ConfigRecords, `metrics` a MetricRecord, `arrays` an ArrayRecord of the state dict.
"""

import io
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from flapp.source import source_digest
from flapp.untrusted import printable, read_npy_header

ATTEST, BASE, TRAIN, EVALUATE = "query.attest", "query.base", "train", "evaluate"
ARRAYS, ORDER, METRICS, CLAIM, PIECE = "arrays", "order", "metrics", "claim", "piece"
NUM_EXAMPLES, REPLAYED = "num-examples", "replayed"
VAL = "val-"  # starts the names of metrics that are of validation samples
LONGEST_TEXT, MOST_METRICS, MOST_CLASSES, MOST_PIECES = 500, 64, 1 << 16, 1 << 16  # that a message may hold
LOST = {  # what Flower's own error codes mean; other errors come with the reason of whoever raised them
    ErrorCode.NODE_UNAVAILABLE: "its node stopped answering (killed, out of memory, or disconnected)",
    ErrorCode.MESSAGE_UNAVAILABLE: "its node left the federation, or did not answer before the message expired",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its answer expired before it could be read",
    ErrorCode.CLIENT_APP_CRASHED: "its process ended before it answered (killed, or out of memory)",
}
RAY_LOST = re.compile(
    r"<class 'ray\.exceptions\.(ActorDied|ActorUnavailable|NodeDied|OutOfMemory|WorkerCrashed)Error'>"
)


class MessageError(ValueError):
    """A message that lacks what its type must carry, or that comes from other source code."""


@dataclass(frozen=True)
class Order:
    """What the server asks: of which client, in which round, under which run name.

    accepted_round is the last round in which the server took this client's trained model, 0 for none: whatever
    private state the client keeps between rounds, it goes on from there. With adapters, base is the digest of the
    frozen tensors that the client must hold, returns names those it trains and sends back, and private those it
    trains and keeps; without, all of the model travels.
    """

    client_id: str
    server_round: int
    run_name: str
    source_digest: str
    accepted_round: int = 0
    base: str = ""
    returns: tuple[str, ...] = ()
    private: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """What a client says of itself: samples per split, training labels per class, and digests to check it by.

    A client that cannot take part says why in `fault`, and nothing else counts.
    """

    client_id: str
    train: int = 0
    val: int = 0
    test: int = 0
    label_hist: tuple[int, ...] = ()
    shard_digest: str = ""
    last_modified: float = 0.0
    base_digest: str = ""
    source_digest: str = ""
    versions: str = ""
    fault: str = ""


def pack_order(node_id: int, kind: str, order: Order, arrays: ArrayRecord | None = None) -> Message:
    """Build the message of `kind` that asks node `node_id` for `order`."""
    content = RecordDict({ORDER: _config_record(asdict(order))})
    if arrays is not None:
        content[ARRAYS] = arrays
    return Message(content, dst_node_id=node_id, message_type=kind, group_id=str(order.server_round))


def unpack_order(message: Message) -> Order:
    """Read the order in a message, refusing one from a server that runs other source code."""
    order = Order(**_fields(message.content.config_records, ORDER, Order))
    if order.source_digest != source_digest():
        raise MessageError(
            f"flapp here has source {source_digest()[:12]}, the server's has {order.source_digest[:12]}: "
            "install the same flapp on both, and restart a SuperLink or SuperNode started elsewhere"
        )
    return order


def unpack_arrays(content: RecordDict) -> ArrayRecord:
    """Return the model in a message; raises MessageError when there is none."""
    if ARRAYS not in content.array_records:
        raise MessageError("the message carries no arrays")
    return content.array_records[ARRAYS]


def pack_piece(node_id: int, order: Order, index: int, count: int, arrays: ArrayRecord) -> Message:
    """Build the message that carries piece `index` of `count` of the base that `order` names."""
    message = pack_order(node_id, BASE, order, arrays)
    message.content[PIECE] = ConfigRecord({"index": index, "count": count})
    return message


def unpack_piece(content: RecordDict) -> tuple[int, int, ArrayRecord]:
    """Read a piece of the base: its index, the number of pieces, and the tensors."""
    record = content.config_records.get(PIECE, ConfigRecord())
    index, count = record.get("index"), record.get("count")
    if type(index) is not int or type(count) is not int or not 0 <= index < count <= MOST_PIECES:
        raise MessageError(f"the message's piece is number {index!r} of {count!r}")
    return index, count, unpack_arrays(content)


def pack_claims(message: Message, claims: list[Claim]) -> Message:
    """Answer an attest message with every client that lives at this node."""
    return Message(RecordDict({f"{CLAIM}-{c.client_id}": _claim_record(c) for c in claims}), reply_to=message)


def unpack_claims(content: RecordDict, most: int) -> list[Claim]:
    """Read all claims in an answer to attest, in the order of their names.

    Raises MessageError for more than `most` claims, or for any other record.
    """
    records = content.config_records
    if odd := content.keys() - {key for key in records if key.startswith(f"{CLAIM}-")}:
        raise MessageError(f"sent {len(odd)} records that are not claims, such as {one_line(min(odd))}")
    if len(records) > most:
        raise MessageError(f"claims {len(records)} clients, the run has {most}")
    return [_read_claim(records, key) for key in sorted(records)]


def pack_reply(
    message: Message, claim: Claim, metrics: Mapping[str, int | float], arrays: ArrayRecord | None = None
) -> Message:
    """Answer a train or evaluate message with numbers and, after training, the model."""
    content = RecordDict({CLAIM: _claim_record(claim), METRICS: MetricRecord(dict(metrics))})
    if arrays is not None:
        content[ARRAYS] = arrays
    return Message(content, reply_to=message)


def unpack_reply(content: RecordDict, kind: str = TRAIN) -> tuple[Claim, dict[str, float]]:
    """Read who answers and the numbers of a reply of `kind`.

    Raises MessageError for records that such a reply does not have, for too many metrics, and for lists among them.
    """
    expected = {CLAIM, METRICS, ARRAYS} if kind == TRAIN else {CLAIM, METRICS}
    if odd := content.keys() - expected:
        raise MessageError(f"sent {len(odd)} records that nobody asked for, such as {one_line(min(odd))}")
    if METRICS not in content.metric_records:
        raise MessageError("the reply carries no metrics")
    metrics = dict(content.metric_records[METRICS])
    if len(metrics) > MOST_METRICS:
        raise MessageError(f"sent {len(metrics)} metrics, at most {MOST_METRICS} are read")
    if lists := [name for name, value in metrics.items() if isinstance(value, list)]:
        raise MessageError(f"the reply's metric {one_line(lists[0])} is a list, not a number")
    return _read_claim(content.config_records, CLAIM), metrics  # type: ignore[return-value]


def describe_error(error: Error) -> str:
    """Say in one line why a message was not answered, in plain words where Flower's say little."""
    reason = error.reason or ""
    code = ErrorCode.CLIENT_APP_CRASHED if RAY_LOST.match(reason) else error.code
    return LOST.get(code) or one_line(reason)


def one_line(text: str) -> str:
    """Return a text that somebody else wrote as one printable line of at most LONGEST_TEXT characters."""
    return printable(" ".join(text[: 4 * LONGEST_TEXT].split()), LONGEST_TEXT - 3)


def view(array: Array) -> np.ndarray:
    """Return the read-only numpy array inside a Flower Array; raises ValueError unless it is one of plain numbers."""
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
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    data = b"".join((header.getvalue(), values.data))
    return Array(str(values.dtype), values.shape, "numpy.ndarray", data)


def size_of(message: Message) -> int:
    """Return the bytes of a message's model, as they travel."""
    if not message.has_content():
        return 0
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())


def _config_record(values: Mapping[str, Any]) -> ConfigRecord:
    return ConfigRecord({k.replace("_", "-"): list(v) if isinstance(v, tuple) else v for k, v in values.items()})


def _claim_record(claim: Claim) -> ConfigRecord:
    return _config_record(asdict(claim))


def _read_claim(records: Mapping[str, ConfigRecord], key: str) -> Claim:
    values = _fields(records, key, Claim)
    histogram = values["label_hist"]
    if len(histogram) > MOST_CLASSES or any(type(count) is not int or count < 0 for count in histogram):
        raise MessageError(f"the message's {one_line(key)} has a label histogram that is not of counts")
    claim = Claim(**values | {"fault": one_line(values["fault"])})
    if long := [name for name, value in asdict(claim).items() if isinstance(value, str) and len(value) > LONGEST_TEXT]:
        raise MessageError(f"the message's {one_line(key)} has a {long[0]} of over {LONGEST_TEXT} characters")
    return claim


def _fields(records: Mapping[str, ConfigRecord], key: str, cls: type) -> dict[str, Any]:
    """Return a record's values by the field names of `cls`, all of them and with the right types."""
    if key not in records:
        raise MessageError(f"the message carries no {one_line(key)}")
    record = records[key]
    values = {name.replace("-", "_"): value for name, value in record.items()}
    expected = {name: list if "tuple" in str(kind) else kind for name, kind in cls.__annotations__.items()}
    wrong = {n for n in expected.keys() | values.keys() if n not in expected or type(values.get(n)) is not expected[n]}
    if wrong:
        named = one_line(", ".join(sorted(wrong)[:12]))
        raise MessageError(f"the message's {one_line(key)} has a missing, foreign or mistyped entry: {named}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
