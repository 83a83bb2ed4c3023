"""Groups of clients: one message asks a node for several clients, and the reply carries one sum, or each client's part.

    record    in the message                           in the reply
    order     the instructions for all of the clients  -
    group     columns with one entry a client: Asked   columns: client-id, failure ("" if there is none), shard-digest
    arrays    the global model, once                   -
    metrics   -                                        columns; NaN where a client has no such number
    sum       -                                        the weighted sum, in float64, if the message asks for it
    arrays-N  -                                        the tensors of client N, otherwise

How clients are grouped depends only on the sampled ids, so that sums are the same in every runtime. A client that has a
node of its own, as in a deployment, gets its own message, and the server adds its reply to its group's sum.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from flapp.config.rules import group_size
from flapp.messages import (
    ARRAYS,
    LONGEST_TEXT,
    METRICS,
    MOST_METRICS,
    TRAIN,
    Answer,
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
    """What a node must know about a client of a group. rank: to which its adapters are cut, 0 if they are not."""

    client_id: str
    accepted_round: int
    examples: int
    weight: float
    shard_digest: str
    rank: int


ASKED_KEYS = {field.name: field.name.replace("_", "-") for field in fields(Asked)}
ANSWER_KEYS = {"client_id": "client-id", "failure": "failure", "shard_digest": "shard-digest"}


@dataclass(frozen=True)
class Group:
    """The clients of one message. Updates longer than norm_limit are left out. With is_summed the reply is one sum.

    Updates in a sum that are longer than `clip` are clipped to this length.
    """

    asked: tuple[Asked, ...]
    norm_limit: float
    is_summed: bool
    clip: float = math.inf


def cut(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Cut sorted ids into consecutive groups: one client each for fewer than 32, and 16 to 24 groups for more."""
    size = group_size(len(names))
    return [tuple(names[start : start + size]) for start in range(0, len(names), size)]


def pack_group(node_id: int, kind: str, shared: Instructions, group: Group, arrays: ArrayRecord) -> Message:
    """Build the message that asks a node for all clients of a group; the instructions' client_id is empty."""
    message = pack_instructions(node_id, kind, shared, arrays)
    columns: dict[str, Any] = {key: [getattr(asked, name) for asked in group.asked] for name, key in ASKED_KEYS.items()}
    columns |= {"norm-limit": group.norm_limit, "is-summed": group.is_summed}
    if math.isfinite(group.clip):
        columns["clip"] = group.clip
    message.content[GROUP] = ConfigRecord(columns)
    return message


def unpack_group(message: Message) -> Group:
    """Read which clients a message is for."""
    record: Mapping[str, Any] = message.content.config_records[GROUP]
    try:
        columns = [record[key] for key in ASKED_KEYS.values()]
        asked = tuple(Asked(*row) for row in zip(*columns, strict=True))
        return Group(asked, record["norm-limit"], record["is-summed"], record.get("clip", math.inf))
    except (KeyError, TypeError, ValueError) as error:
        raise MessageError(f"the message's group cannot be read ({one_line(repr(error))})") from error


def pack_answers(message: Message, answers: Sequence[Answer], total: Mapping[str, Array] | None) -> Message:
    """Answer a group's message."""
    names = sorted({name for answer in answers for name in answer.metrics})
    numbers: dict[str, Any] = {n: [float(each.metrics.get(n, math.nan)) for each in answers] for n in names}
    columns: dict[str, Any] = {key: [getattr(answer, name) for answer in answers] for name, key in ANSWER_KEYS.items()}
    content = RecordDict({METRICS: MetricRecord(numbers), GROUP: ConfigRecord(columns)})
    if total is not None:
        content[SUM] = as_record(total)
    for answer in answers:
        if answer.arrays is not None:
            content[f"{ARRAYS}-{answer.client_id}"] = answer.arrays
    return Message(content, reply_to=message)


def unpack_answers(
    content: RecordDict, kind: str, names: Sequence[str], is_summed: bool
) -> tuple[list[Answer], ArrayRecord | None]:
    """Read the reply to a group's message: each client's answer, in order, and the sum if there is one.

    Raises MessageError for clients that were not asked or are missing, and for unexpected records or columns.
    """
    record, metrics = content.get(GROUP), content.get(METRICS)
    if not isinstance(record, ConfigRecord) or not isinstance(metrics, MetricRecord):
        raise MessageError("its node's reply lacks the group or its metrics")
    ids, failures, digests = (cast(Any, record.get(key)) for key in ANSWER_KEYS.values())
    numbers: dict[str, Any] = dict(metrics)
    if ids != list(names):
        raise MessageError("its node answered for other clients than those it was asked for")
    for column, kinds in ((failures, str), (digests, str), *((values, float) for values in numbers.values())):
        if not isinstance(column, list) or len(column) != len(names) or any(type(v) is not kinds for v in column):
            raise MessageError("its node's reply has a column that does not fit the clients")
    if len(metrics) > MOST_METRICS:
        raise MessageError(f"its node's reply has {len(metrics)} metrics, more than {MOST_METRICS}")
    if any(len(text) > LONGEST_TEXT for text in digests):
        raise MessageError(f"its node's reply has a digest of more than {LONGEST_TEXT} characters")
    answers = []
    for index, name in enumerate(names):
        own = {key: values[index] for key, values in numbers.items() if not math.isnan(values[index])}
        answers.append(Answer(name, digests[index], own, failure=one_line(failures[index])))
    sound = [answer for answer in answers if not answer.failure]
    models = set[str]()
    if kind == TRAIN and sound:
        models = {SUM} if is_summed else {f"{ARRAYS}-{answer.client_id}" for answer in sound}
    if odd := sorted(content.keys() ^ {METRICS, GROUP, *models}):
        raise MessageError(f"its node's reply has a record too many or too few: {one_line(odd[0])}")
    if odd := sorted(key for key in models if not isinstance(content[key], ArrayRecord)):
        raise MessageError(f"its node's reply has no arrays in {one_line(odd[0])}")
    for answer in sound:
        answer.arrays = cast("ArrayRecord | None", content.get(f"{ARRAYS}-{answer.client_id}"))
    return answers, cast("ArrayRecord | None", content.get(SUM))


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
