"""One phase of one round: who was asked, which replies count, and who failed for which reason."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Array, ArrayRecord, Message, RecordDict

from flapp.checks import RAISE_LIMIT, check_update, find_answer_fault, find_metric_fault, find_sum_fault
from flapp.groups import UPDATE_NORM, cut, unpack_answers
from flapp.messages import Answer, Claim, MessageError, describe_error, size_of, unpack_reply
from flapp.server.publish import LATE
from flapp.sums import Weighted, WeightedSum, clip_update

Clients = tuple[int, tuple[str, ...]]  # the index of their group, and their ids
MOST_NAMED = 20  # of absent clients, in a line
FOLDED_AT_ONCE = 2  # groups: adding two costs little more than adding one, and keeps both in memory


@dataclass
class Phase:
    """The clients that were asked, the replies that count, and the clients that failed.

    claims: of the sampled clients, sorted by id; weights: of each client in an average; expected: gives the tensors
    that a client's reply must fit; norm_limit: the longest update that counts, `multiple` times the median; norm_fix:
    what to do about longer ones; clip: longer updates are clipped to this length before they are combined; those in a
    node's sum must be clipped already; is_summed: whether the average is made of sums; may_fold: whether they are added
    up as they come, which needs a known limit; validates: whether evaluations need figures for validation samples;
    groups: how the clients are cut; sent: messages that may not have an id yet; waiting: the clients of each message
    without an answer; trained and sums: tensors of single clients and of whole groups, until they are added to `total`.
    """

    kind: str
    server_round: int
    claims: Mapping[str, Claim] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    capped: Mapping[str, float] = field(default_factory=dict)
    absent: Sequence[str] = ()
    expected: Callable[[str, ArrayRecord], Mapping[str, Array]] = lambda name, trained: {}
    norm_limit: float = math.inf
    multiple: float | None = None
    norm_fix: str = RAISE_LIMIT
    clip: float = math.inf
    is_summed: bool = False
    may_fold: bool = False
    validates: bool = False
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
        self.names = list(self.claims)
        self.groups = cut(self.names)
        self._next, self._ready = 0, list[list[Weighted]]()

    def take(self, replies: Iterable[Message]) -> None:
        """Sort replies into good and failed, by client, and add up what can be added; ignore those to other phases."""
        for message, clients in self.sent:  # a message has its id once it has been sent
            self.waiting[message.metadata.message_id or f"unsent {clients}"] = clients
        self.sent.clear()
        for reply in replies:
            if (asked := self.waiting.pop(reply.metadata.reply_to_message_id, None)) is None:
                continue
            index, names = asked
            try:
                if reply.has_error():
                    raise MessageError(f"failed: {describe_error(reply.error)}")
                if len(names) > 1:
                    self._take_group(index, names, reply)
                else:
                    self._accept(names[0], unpack_reply(reply.content, self.kind))
            except MessageError as error:
                for name in names:
                    self.fail(name, str(error))
            if reply.has_content():
                reply.content = RecordDict()  # the phase has its tensors, and drops them once they are added
        if self.may_fold:
            self.fold()

    def fail(self, name: str, reason: str) -> None:
        """Leave a client out."""
        self.failures[name] = reason
        self.forget(name)

    def forget(self, name: str) -> None:
        """Delete a client's reply."""
        for found in (self.metrics, self.norms, self.trained, self.bytes_up):
            found.pop(name, None)

    def leave_out(self, faults: Mapping[str, str]) -> list[tuple[int, tuple[str, ...]]]:
        """Leave out the clients in `faults`. Drop each sum with one of them, or with an update that must be clipped.

        Return, for each sum dropped, the index of its group and those of its clients that are not left out.
        """
        again, odd = [], faults.keys() | {name for name, norm in self.norms.items() if norm > self.clip}
        for index, names in enumerate(self.groups):
            if index in self.sums and odd & set(names):
                del self.sums[index]
                rest = tuple(name for name in names if name in self.metrics and name not in faults)
                for name in rest:
                    self.forget(name)
                again += [(index, rest)] if rest else []
        for name, reason in faults.items():
            self.fail(name, reason)
        return again

    def end(self) -> None:
        """Leave out the clients that have not answered."""
        for name in {name for _, names in self.waiting.values() for name in names}:
            self.fail(name, LATE)

    def done(self) -> int:
        """Return the number of clients that have answered or failed."""
        return len(self.metrics) + len(self.failures)

    def fold(self, is_over: bool = False) -> None:
        """Add complete groups to the total, in order; with is_over, add whatever has arrived."""
        waiting = {index for index, _ in self.waiting.values()}
        while self._next < len(self.groups) and (is_over or self._next not in waiting):
            if group := self._pop_group(self._next):
                self._ready.append(group)
            self._next += 1
        if self._ready and (is_over or len(self._ready) >= FOLDED_AT_ONCE):
            self.total.add(*self._ready)
            self._ready.clear()

    def pop_trained(self, name: str) -> ArrayRecord:
        """Remove and return a client's tensors; an update longer than `clip` is clipped."""
        trained = self.trained.pop(name)
        if (norm := self.norms[name]) <= self.clip:
            return trained
        return clip_update(trained, self.expected(name, trained), self.clip / norm)

    def clipped(self) -> dict[str, float]:
        """Return the factors of the clients whose updates were clipped."""
        return {name: self.clip / norm for name, norm in sorted(self.norms.items()) if norm > self.clip}

    def weight(self) -> float:
        """Return the sum of the weights of all good clients, added up in their order."""
        return float(sum(self.weights[name] for name in sorted(self.metrics)))

    def log_line(self) -> dict[str, Any]:
        """Return the part of a line of metrics.jsonl that all phases have; bytes are those of the models."""
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

    def _take_group(self, index: int, names: tuple[str, ...], reply: Message) -> None:
        """Take a node's reply for a group; raises MessageError when none of it counts."""
        answers, total = unpack_answers(reply.content, self.kind, names, self.is_summed)
        for answer in answers:
            try:
                if answer.failure:
                    raise MessageError(answer.failure)
                self._accept(answer.client_id, answer)
            except MessageError as error:
                self.fail(answer.client_id, str(error))
        if total is not None:
            self._take_sum(index, [answer.client_id for answer in answers if not answer.failure], total)

    def _accept(self, name: str, answer: Answer) -> None:
        """Count a client; raises MessageError when its data have changed, or its numbers or tensors cannot count."""
        claim = self.claims[name]
        fault = find_answer_fault(answer, name, claim.shard_digest)
        if fault := fault or find_metric_fault(self.kind, claim, answer.metrics, self.validates):
            raise MessageError(fault)
        if (trained := answer.arrays) is not None:
            expected = self.expected(name, trained)
            self.norms[name] = check_update(trained, expected, self.norm_limit, self.multiple, self.norm_fix)
            self.trained[name] = trained
            self.bytes_up[name] = size_of(trained)
        self.metrics[name] = answer.metrics

    def _take_sum(self, index: int, added: Sequence[str], total: ArrayRecord) -> None:
        """Take the sum of a group's good clients; raises MessageError when it cannot be theirs."""
        if odd := [name for name in added if name not in self.metrics]:
            raise MessageError(f"its group's sum has client {odd[0]}, which does not count ({self.failures[odd[0]]})")
        norms = {name: self.metrics[name].get(UPDATE_NORM, math.nan) for name in added}
        if not all(0 <= norm <= self.norm_limit for norm in norms.values()):
            raise MessageError("its group's sum has an update whose length is above the limit, negative or missing")
        expected = self.expected(added[0], total)
        weight = sum(self.weights[name] for name in added)
        most = sum(self.weights[name] * min(norm, self.clip) for name, norm in norms.items())
        if fault := find_sum_fault(total, expected, weight, most):
            raise MessageError(f"its group's sum does not count: {fault}")
        self.sums[index] = total
        self.norms |= norms
        self.bytes_up |= dict.fromkeys(added, size_of(expected))

    def _pop_group(self, index: int) -> list[Weighted]:
        if index in self.sums:
            return [(self.sums.pop(index), 1.0)]
        names = [name for name in self.groups[index] if name in self.trained]
        return [(self.pop_trained(name), self.weights[name]) for name in names]
