"""Record or change what clients send in tests, and read which replies were refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict

from flapp.messages import ARRAYS, CLAIMS
from tests.conftest import Tamper, read_lines

Sent = list[tuple[str, dict[str, np.ndarray]]]


def trained_in(reply: Message) -> ArrayRecord | None:
    """Return the trained model in a reply, if it has one."""
    return reply.content.array_records.get(ARRAYS) if reply.has_content() else None


def changing(*names: str, change: Callable[[Message], object]) -> Tamper:
    """Return a tamper function that changes the trained replies of these clients, or of all if no names are given."""

    def tamper(name: str, reply: Message) -> Message:
        if trained_in(reply) is not None and (name in names or not names):
            change(reply)
        return reply

    return tamper


def drop(reply: Message) -> None:
    """Leave the reply without the model, as a client that failed."""
    del reply.content[ARRAYS]


def lying(claims: dict[str, dict[str, Any]]) -> Tamper:
    """Return a tamper function that changes fields of these clients' claims, as set_claim does."""

    def tamper(_: str, reply: Message) -> Message:
        for client_id, values in claims.items():
            set_claim(reply.content, client_id, **values)
        return reply

    return tamper


def listen(seen: Sent) -> Tamper:
    """Return a tamper function that changes nothing and notes every trained model."""

    def tamper(name: str, reply: Message) -> Message:
        if (arrays := trained_in(reply)) is not None:
            seen.append((name, {key: array.numpy() for key, array in arrays.items()}))
        return reply

    return tamper


def failures(path: Path, server_round: int = 1, kind: str = "train") -> dict[str, str]:
    """Return why clients were left out of a round, by client."""
    line = next(line for line in read_lines(path, kind) if line["round"] == server_round)
    return {failure["client"]: failure["reason"] for failure in line["failures"]}


def set_claim(content: RecordDict, client_id: str, /, **values: Any) -> None:
    """Change fields of a client's claim, named as in Claim; content without a claim of this client stays unchanged."""
    record: Any = content.config_records.get(CLAIMS)
    if record is None or client_id not in record["client-id"]:
        return
    index = record["client-id"].index(client_id)
    if "label_hist" in values:
        counts, sizes = list(values.pop("label_hist")), record["classes"]
        start = sum(sizes[:index])
        before, after = record["label-hist"][:start], record["label-hist"][start + sizes[index] :]
        record["label-hist"] = [*before, *counts, *after]
        values["classes"] = len(counts)
    for name, value in values.items():
        column = record[name.replace("_", "-")]
        record[name.replace("_", "-")] = [*column[:index], value, *column[index + 1 :]]
