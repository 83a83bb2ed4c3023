"""The words in our messages: packed and unpacked here and nowhere else.

    type          server to client                       client to server
    query.attest  order                                  claim-<client id> for each client at the node
    query.base    order, piece, arrays (of the base)     metrics (pieces still missing)
    train         order, arrays (the global model)       arrays (the trained model), metrics, claim
    evaluate      order, arrays                          metrics, claim

`order` says who is meant, in which round of which run, and whose source code asks; `claim` says who answers.
Both are ConfigRecords, `metrics` a MetricRecord, `arrays` an ArrayRecord of the state dict.
"""

import hashlib
import io
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from flapp.untrusted import printable, read_npy_header

ATTEST, BASE, TRAIN, EVALUATE = "query.attest", "query.base", "train", "evaluate"
ARRAYS, ORDER, METRICS, CLAIM, PIECE = "arrays", "order", "metrics", "claim", "piece"
NUM_EXAMPLES = "num-examples"


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


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Return the SHA-256 of this package's source files: server and clients must run the same."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def versions() -> str:
    """Return the versions that decide a client's bytes, as one line."""
    packages = " ".join(f"{name}={version(name)}" for name in ("flwr", "torch", "numpy"))
    return f"python={platform.python_version()} {packages}"


def pack_order(node_id: int, kind: str, order: Order, arrays: ArrayRecord | None = None) -> Message:
    """Build the message of `kind` that asks node `node_id` for `order`."""
    content = RecordDict({ORDER: _config_record(asdict(order))})
    if arrays is not None:
        content[ARRAYS] = arrays
    return Message(content, dst_node_id=node_id, message_type=kind, group_id=str(order.server_round))


def unpack_order(message: Message) -> Order:
    """Read the order in a message, refusing one from a server that runs other source code."""
    order = Order(**_fields(message.content, ORDER, Order))
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
    if type(index) is not int or type(count) is not int or not 0 <= index < count:
        raise MessageError(f"the message's piece is number {index!r} of {count!r}")
    return index, count, unpack_arrays(content)


def pack_claims(message: Message, claims: list[Claim]) -> Message:
    """Answer an attest message with every client that lives at this node."""
    return Message(RecordDict({f"{CLAIM}-{c.client_id}": _claim_record(c) for c in claims}), reply_to=message)


def unpack_claims(content: RecordDict) -> list[Claim]:
    """Read all claims in an answer to attest, in the order of their names."""
    return [_read_claim(content, key) for key in sorted(content.config_records) if key.startswith(CLAIM)]


def pack_reply(
    message: Message, claim: Claim, metrics: Mapping[str, int | float], arrays: ArrayRecord | None = None
) -> Message:
    """Answer a train or evaluate message with numbers and, after training, the model."""
    content = RecordDict({CLAIM: _claim_record(claim), METRICS: MetricRecord(dict(metrics))})
    if arrays is not None:
        content[ARRAYS] = arrays
    return Message(content, reply_to=message)


def unpack_reply(content: RecordDict) -> tuple[Claim, dict[str, float]]:
    """Read who answers and the numbers of a train or evaluate reply; raises MessageError for anything but numbers."""
    if METRICS not in content.metric_records:
        raise MessageError("the reply carries no metrics")
    metrics = dict(content.metric_records[METRICS])
    if lists := [name for name, value in metrics.items() if isinstance(value, list)]:
        raise MessageError(f"the reply's metric {lists[0]} is a list, not a number")
    return _read_claim(content, CLAIM), metrics  # type: ignore[return-value]


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


def _read_claim(content: RecordDict, key: str) -> Claim:
    values = _fields(content, key, Claim)
    if any(type(count) is not int or count < 0 for count in values["label_hist"]):
        raise MessageError(f"the message's {key} has a label histogram that is not of counts")
    return Claim(**values)


def _fields(content: RecordDict, key: str, cls: type) -> dict[str, Any]:
    """Return a record's values by the field names of `cls`, all of them and with the right types."""
    if key not in content.config_records:
        raise MessageError(f"the message carries no {key}")
    record = content.config_records[key]
    values = {name.replace("-", "_"): value for name, value in record.items()}
    expected = {name: list if "tuple" in str(kind) else kind for name, kind in cls.__annotations__.items()}
    wrong = {n for n in expected.keys() | values.keys() if n not in expected or type(values.get(n)) is not expected[n]}
    if wrong:
        raise MessageError(f"the message's {key} has a missing, foreign or mistyped entry: {', '.join(sorted(wrong))}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
