"""Groups of clients: one message asks a node for several clients, and the reply carries one sum, or each client's part.

    record    in the message                           in the reply
    order     what all clients of the group are asked  -
    group     columns with one entry a client: Asked   columns: client-id, failure ("" if there is none), shard-digest
    arrays    the global model, once                   -
    metrics   -                                        columns; NaN where a client has no such number
    sum       -                                        the weighted sum, in float64, if the message asks for it
    arrays-N  -                                        the tensors of client N, otherwise

The cut into groups depends on the sampled ids alone, so that sums are the same in every runtime. A client that cannot
share a node with others, as in a deployment, gets a message of its own, and the server adds it to its group's sum.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from flapp.config.rules import group_size
from flapp.messages import (
    ARRAYS,
    LONGEST_TEXT,
    METRICS,
    MOST_METRICS,
    ORDER,
    TRAIN,
    UNPACKED,
    Instructions,
    MessageError,
    as_record,
    one_line,
    pack,
    pack_instructions,
    view,
)

GROUP, SUM = "group", "sum"
UPDATE_NORM = "update-norm"


@dataclass(frozen=True)
class Asked:
    """What a node must know of a client of a group. rank: to which its adapters are cut, 0 where they are not."""

    client_id: str
    accepted_round: int
    examples: int
    weight: float
    shard_digest: str
    rank: int


@dataclass(frozen=True)
class Group:
    """The clients of one message. Updates longer than norm_limit are left out; with is_summed the reply is one sum."""

    asked: tuple[Asked, ...]
    norm_limit: float
    is_summed: bool


@dataclass
class Outcome:
    """What came of one client: a reason why it failed, or its numbers, and its tensors unless they are in a sum."""

    client_id: str
    failure: str = ""
    shard_digest: str = ""
    metrics: Mapping[str, float] | None = None
    arrays: ArrayRecord | None = None


def cut(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Cut sorted ids into consecutive groups: one client each for fewer than 32, and 16 to 31 groups for more."""
    size = group_size(len(names))
    return [tuple(names[start : start + size]) for start in range(0, len(names), size)]


def pack_group(node_id: int, kind: str, order: Instructions, group: Group, arrays: ArrayRecord) -> Message:
    """Build the message that asks a node for all clients of a group; the order's client_id is empty."""
    message = pack_instructions(node_id, kind, order, arrays)
    columns = {_key(field.name): [getattr(asked, field.name) for asked in group.asked] for field in fields(Asked)}
    rest = {_key(field.name): getattr(group, field.name) for field in fields(Group) if field.name != "asked"}
    message.content[GROUP] = ConfigRecord({**columns, **rest})
    return message


def unpack_group(message: Message) -> Group:
    """Read which clients a message is for."""
    record: Mapping[str, Any] = message.content.config_records[GROUP]
    try:
        columns = [record[_key(field.name)] for field in fields(Asked)]
        asked = tuple(Asked(*row) for row in zip(*columns, strict=True))
        rest = {field.name: record[_key(field.name)] for field in fields(Group) if field.name != "asked"}
    except (KeyError, TypeError, ValueError) as error:
        raise MessageError(f"the message's group cannot be read ({one_line(repr(error))})") from error
    return Group(asked, **rest)


def for_one(message: Message, order: Instructions, asked: Asked, arrays: ArrayRecord) -> Message:
    """Return the message that one client of a group would have had, as Flower delivers it."""
    own = replace(order, client_id=asked.client_id, accepted_round=asked.accepted_round)
    record = cast(ConfigRecord, message.content[ORDER]).copy()
    record["client-id"], record["accepted-round"] = asked.client_id, asked.accepted_round
    content = RecordDict({ORDER: record, ARRAYS: arrays})
    single = Message(content=content, metadata=message.metadata)  # type: ignore[call-overload]
    single.__dict__[UNPACKED] = own
    return cast(Message, single)


def pack_outcomes(message: Message, outcomes: Sequence[Outcome], total: Mapping[str, Array] | None) -> Message:
    """Answer a group's message."""
    names = sorted({name for outcome in outcomes for name in outcome.metrics or ()})
    numbers = MetricRecord()
    for name in names:
        numbers[name] = [float((outcome.metrics or {}).get(name, math.nan)) for outcome in outcomes]
    content = RecordDict({METRICS: numbers})
    content[GROUP] = ConfigRecord(
        {
            "client-id": [outcome.client_id for outcome in outcomes],
            "failure": [outcome.failure for outcome in outcomes],
            "shard-digest": [outcome.shard_digest for outcome in outcomes],
        }
    )
    if total is not None:
        content[SUM] = as_record(total)
    for outcome in outcomes:
        if outcome.arrays is not None:
            content[f"{ARRAYS}-{outcome.client_id}"] = outcome.arrays
    return Message(content, reply_to=message)


def unpack_outcomes(
    content: RecordDict, kind: str, names: Sequence[str], is_summed: bool
) -> tuple[list[Outcome], ArrayRecord | None]:
    """Read the reply to a group's message: what came of each client, in order, and the sum if there is one.

    Raises MessageError for clients that were not asked or are missing, and for records or numbers of another shape.
    """
    record, metrics = content.get(GROUP), content.get(METRICS)
    if not isinstance(record, ConfigRecord) or not isinstance(metrics, MetricRecord):
        raise MessageError("its node's reply lacks the group or its metrics")
    ids, failures, digests = (cast(Any, record.get(key)) for key in ("client-id", "failure", "shard-digest"))
    numbers: dict[str, Any] = dict(metrics)
    if ids != list(names):
        raise MessageError("its node answered for other clients than those it was asked for")
    for column, kinds in ((failures, str), (digests, str), *((values, float) for values in numbers.values())):
        if not isinstance(column, list) or len(column) != len(names) or any(type(v) is not kinds for v in column):
            raise MessageError("its node's reply has a column that does not fit the clients")
    if len(metrics) > MOST_METRICS or any(len(text) > LONGEST_TEXT for text in digests):
        raise MessageError(f"its node's reply has {len(metrics)} metrics or a digest that is too long")
    outcomes = []
    for index, name in enumerate(names):
        own = {key: values[index] for key, values in numbers.items() if not math.isnan(values[index])}
        outcomes.append(Outcome(name, one_line(failures[index]), digests[index], own))
    sound = [outcome for outcome in outcomes if not outcome.failure]
    expected = {METRICS, GROUP}
    if kind == TRAIN:
        expected |= ({SUM} if sound else set()) if is_summed else {f"{ARRAYS}-{o.client_id}" for o in sound}
    if odd := sorted(content.keys() ^ expected):
        raise MessageError(f"its node's reply has a record too many or too few: {one_line(odd[0])}")
    if odd := sorted(key for key in expected - {METRICS, GROUP} if not isinstance(content[key], ArrayRecord)):
        raise MessageError(f"its node's reply has no arrays in {one_line(odd[0])}")
    for outcome in sound:
        outcome.arrays = cast("ArrayRecord | None", content.get(f"{ARRAYS}-{outcome.client_id}"))
    return outcomes, cast("ArrayRecord | None", content.get(SUM))


def cut_rank(arrays: Mapping[str, Array], rank: int) -> ArrayRecord:
    """Return tensors with every LoRA adapter among them cut to its first `rank` ranks."""
    found = {}
    for key, array in arrays.items():
        part = key.rpartition(".")[2]
        if part == "lora_A":
            found[key] = pack(view(array)[:rank])
        else:
            found[key] = pack(view(array)[:, :rank]) if part == "lora_B" else array
    return as_record(found)


def _key(name: str) -> str:
    return name.replace("_", "-")
