"""One phase of one round, as the strategy sees it: who was asked, what came back well, and who failed."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Array, ArrayRecord, Message

from flapp.groups import cut
from flapp.messages import size_of_array
from flapp.sums import Weighted, WeightedSum

Clients = tuple[int, tuple[str, ...]]  # the index of their group, and their ids
MOST_NAMED = 20  # of absent clients, in a line
FOLDED_AT_ONCE = 2  # groups: adding two costs little more than adding one, and keeps both in memory


@dataclass
class Phase:
    """What was asked of whom, what came back well, and who failed for which reason.

    names: the sampled clients, sorted; groups: how they are cut; weights: what each counts for in an average; sent:
    messages that may not have an id yet; waiting: the clients of each message without an answer; returns: the tensors
    that clients send back, None for all; norm_limit: the longest update that counts, as far as it is known; trained and
    sums: tensors of single clients and of whole groups, until they are added to `total`.
    """

    kind: str
    server_round: int
    names: Sequence[str] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    capped: Mapping[str, float] = field(default_factory=dict)
    returns: tuple[str, ...] | None = None
    absent: Sequence[str] = ()
    norm_limit: float = math.inf
    groups: list[tuple[str, ...]] = field(default_factory=list)
    sent: list[tuple[Message, Clients]] = field(default_factory=list)
    waiting: dict[str, Clients] = field(default_factory=dict)
    metrics: dict[str, Mapping[str, float]] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)
    trained: dict[str, ArrayRecord] = field(default_factory=dict)
    sums: dict[int, ArrayRecord] = field(default_factory=dict)
    total: WeightedSum = field(default_factory=WeightedSum)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.groups = cut(self.names)
        self._next, self._ready = 0, list[list[Weighted]]()

    def answered(self, reply: Message) -> Clients | None:
        """Return the group and the clients whose message this answers, and wait for them no longer."""
        if self.sent:  # messages have their ids once they have been sent
            self.waiting |= {message.metadata.message_id: clients for message, clients in self.sent}
            self.sent.clear()
        return self.waiting.pop(reply.metadata.reply_to_message_id, None)

    def fail(self, name: str, reason: str) -> None:
        """Leave a client out."""
        self.failures[name] = reason
        for found in (self.metrics, self.norms, self.trained, self.bytes_up):
            found.pop(name, None)

    def done(self) -> int:
        """Return the number of clients that have answered or failed."""
        return len(self.metrics) + len(self.failures)

    def fold(self, is_over: bool = False) -> None:
        """Add the groups that are complete to the total, in order; all that came when the phase is over."""
        waiting = {index for index, _ in self.waiting.values()}
        while self._next < len(self.groups) and (is_over or self._next not in waiting):
            if group := self._take(self._next):
                self._ready.append(group)
            self._next += 1
        if self._ready and (is_over or len(self._ready) >= FOLDED_AT_ONCE):
            self.total.add(*self._ready)
            self._ready.clear()

    def _take(self, index: int) -> list[Weighted]:
        """Return the tensors or the sum of a group, and forget them here."""
        if index in self.sums:
            return [(self.sums.pop(index), 1.0)]
        names = [name for name in self.groups[index] if name in self.trained]
        return [(self.trained.pop(name), self.weights[name]) for name in names]

    def weight(self) -> float:
        """Return what all good clients count for together, added up in their order."""
        return float(sum(self.weights[name] for name in sorted(self.metrics)))

    def log_line(self) -> dict[str, Any]:
        """Return what every line of metrics.jsonl says of a phase; bytes are those of the models, for each client."""
        return {
            "asked": len(self.names),
            "replies": len(self.metrics),
            "absent": list(self.absent[:MOST_NAMED]),
            "absent_count": len(self.absent),
            "failures": [{"client": name, "reason": reason} for name, reason in sorted(self.failures.items())],
            "bytes_down": sum(self.bytes_down.values()),
            "bytes_up": sum(self.bytes_up.values()),
            "client_bytes_down": self.bytes_down,
            "client_bytes_up": dict(sorted(self.bytes_up.items())),
            "seconds": round(time.monotonic() - self.started, 3),
        }


def byte_sizes(arrays: Mapping[str, Array]) -> Iterator[int]:
    """Yield the bytes of each tensor, as it travels."""
    return map(size_of_array, arrays.values())
