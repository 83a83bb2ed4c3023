"""FedAvg as a Flower strategy: draws clients by id, checks every reply, and averages in an order of its own."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from logging import INFO, WARNING
from math import isfinite
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from flapp.listing import by_reason
from flapp.messages import (
    ARRAYS,
    EVALUATE,
    NUM_EXAMPLES,
    REPLAYED,
    TRAIN,
    VAL,
    Claim,
    MessageError,
    describe_error,
    one_line,
    size_of,
    unpack_arrays,
    unpack_reply,
    view,
)
from flapp.releases import ReleaseLedger
from flapp.results import RunDirectory
from flapp.roster import FederationError, Roster
from flapp.strategy.aggregation import find_fault, find_value_fault, spread, weighted_average
from flapp.strategy.alignment import alignment_weights
from flapp.strategy.bounds import NormBound, cap_shares, update_norm
from flapp.strategy.server_optimizer import ServerOptimizer

LOSS_SUMS = {f"{start}{kind}loss-sum" for start in ("", VAL) for kind in ("", "personal-")}
NEVER_NEGATIVE = {"train-loss", "seconds", *LOSS_SUMS}
LARGEST_LOSS = float(np.finfo(np.float32).max)  # of one sample


@dataclass
class Exchange:
    """One phase of one round: what was asked of whom, what came back well, and who failed for which reason."""

    kind: str
    server_round: int
    sent: dict[str, Message] = field(default_factory=dict)
    returns: tuple[str, ...] | None = None  # the tensors that clients send back; None is all that they were sent
    good: dict[str, tuple[dict[str, float], Message]] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)  # the length of each good update
    failures: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def log_line(self) -> dict[str, Any]:
        """Return what every line of metrics.jsonl says of a phase; bytes are those of the models sent."""
        down = {name: size_of(message) for name, message in self.sent.items()}
        up = {name: size_of(message) for name, (_, message) in sorted(self.good.items())}
        return {
            "asked": len(self.sent),
            "replies": len(self.good),
            "absent": self.absent,
            "failures": [{"client": name, "reason": reason} for name, reason in sorted(self.failures.items())],
            "bytes_down": sum(down.values()),
            "bytes_up": sum(up.values()),
            "client_bytes_down": down,
            "client_bytes_up": up,
            "seconds": round(time.monotonic() - self.started, 3),
        }


class FedAvg(FlowerFedAvg):
    """Federated averaging (McMahan et al. 2017) whose result does not depend on the order of replies.

    roster: who may take part; run: where results go; weighting: `num-examples`, `uniform` or `alignment`; min_replies:
    valid replies a phase needs, or FederationError; evaluate_every: rounds between evaluations, the last is always one;
    norm_limit: the longest update that counts, in medians; max_weight_share: the most that one client counts for;
    releases: counts what clients release, with privacy.enabled; validates: whether evaluations must also have figures
    of validation samples.
    Flower counts rounds from 1 at every start; `done` are the rounds of earlier starts, which go before them.
    """

    def __init__(
        self,
        roster: Roster,
        run: RunDirectory,
        seed: int,
        num_rounds: int,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        weighting: str = "num-examples",
        min_replies: int = 1,
        evaluate_every: int = 1,
        server_optimizer: ServerOptimizer | None = None,
        norm_limit: float | None = None,
        max_weight_share: float | None = None,
        releases: ReleaseLedger | None = None,
        validates: bool = False,
    ) -> None:
        super().__init__(fraction_train, fraction_evaluate, weighted_by_key=NUM_EXAMPLES, arrayrecord_key=ARRAYS)
        self.roster = roster
        self.run = run
        self.seed = seed
        self.num_rounds = num_rounds
        self.weighting = weighting
        self.min_replies = min_replies
        self.evaluate_every = evaluate_every
        self.server_optimizer = server_optimizer
        self.bound = NormBound(norm_limit)
        self.max_weight_share = max_weight_share
        self.releases = releases
        self.validates = validates
        self.done = 0
        self.current = ArrayRecord()
        self.accepted: dict[str, int] = {}
        self.exchange = Exchange(TRAIN, 0)

    def summary(self) -> None:
        """Log what Flower logs of a strategy, in our words."""
        drawn = f"{100 * self.fraction_train:g} % of the clients train, {100 * self.fraction_evaluate:g} % evaluate"
        log(INFO, "\t└──> %s; weighted by %s; min_replies %d", drawn, self.weighting, self.min_replies)

    def facts(self) -> dict[str, Any]:
        """Return what a later start needs besides the model: the clients' last accepted rounds and recent lengths."""
        return {"accepted": self.accepted, "update_norms": self.bound.medians}

    def state(self, arrays: ArrayRecord) -> dict[str, np.ndarray]:
        """Return the tensors that a later start must have besides the global model."""
        return self.server_optimizer.state(arrays) if self.server_optimizer else {}

    def go_on_after(self, done: int, facts: dict[str, Any], state: dict[str, np.ndarray]) -> None:
        """Go on after the first `done` rounds, with the facts and tensors of that moment."""
        self.done = done
        self.accepted = dict(facts["accepted"])
        self.bound.medians = list(facts.get("update_norms", []))
        if self.server_optimizer:
            self.server_optimizer.restore(state)

    def is_evaluated(self, server_round: int) -> bool:
        """Say whether this round ends with an evaluation."""
        return server_round % self.evaluate_every == 0 or server_round == self.num_rounds

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw this round's clients and ask them to train the global model."""
        self.current = arrays
        messages = self._ask(TRAIN, self.done + server_round, arrays, self.fraction_train)
        self.run.clock.enter("send")
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw clients to evaluate the new global model, in the rounds that are evaluated."""
        self.run.clock.enter("evaluate")
        if not self.is_evaluated(self.done + server_round):
            return []
        return self._ask(EVALUATE, self.done + server_round, arrays, self.fraction_evaluate)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the valid replies' models; raises FederationError when there are fewer than min_replies."""
        self.run.clock.enter("aggregate")
        exchange = self._receive(replies)
        names = sorted(exchange.good)
        metrics = [exchange.good[name][0] for name in names]
        examples, capped = self._cap({name: exchange.good[name][0][NUM_EXAMPLES] for name in names})
        loss = sum(m["train-loss"] * n for m, n in zip(metrics, examples, strict=True)) / sum(examples)
        trained = {name: unpack_arrays(exchange.good[name][1].content) for name in names}
        arrays, found = self.combine(trained, self._weigh(trained, examples))
        if self.server_optimizer:
            arrays = self.server_optimizer.step(self.current, arrays, exchange.server_round)
        self._check_aggregate(arrays)
        self.bound.accept(exchange.norms)
        found |= {"update_norm": self.bound.medians[-1]} | ({"capped": capped} if capped else {})
        busy = {name: round(m["seconds"], 3) for name, m in zip(names, metrics, strict=True) if "seconds" in m}
        self.run.append(TRAIN, exchange.server_round, loss=loss, **found, client_seconds=busy, **self._log_line())
        self.accepted |= dict.fromkeys(names, exchange.server_round)
        exchange.good.clear()  # every client's model, which evaluation has no use for
        return arrays, MetricRecord({"train-loss": loss})

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Add up correct answers and losses over clients: exact, not a mean of means; log the spread over clients."""
        if not self.is_evaluated(self.done + server_round):
            return None
        exchange = self._receive(replies)
        claims = {name: self.roster.members[name].claim for name in sorted(exchange.good)}
        result = self._add_up({name: claim.test for name, claim in claims.items()}, "")
        if self.validates:
            result |= self._add_up({name: claim.val for name, claim in claims.items()}, VAL)
        self.run.append(EVALUATE, exchange.server_round, **result, **self._log_line())
        return MetricRecord({key.replace("_", "-"): v for key, v in result.items() if isinstance(v, float)})

    def _add_up(self, held: dict[str, int], start: str) -> dict[str, Any]:
        """Return the figures of one split, of which each client holds so many samples; `start` begins their names."""
        held = {name: count for name, count in held.items() if count}
        metrics = {name: self.exchange.good[name][0] for name in held}
        weights, capped = self._cap(held)
        shares = dict(zip(held, weights, strict=True))
        result = _totals(metrics, held, shares, start) | _totals(metrics, held, shares, f"{start}personal-")
        return result | ({f"{start}capped".replace("-", "_"): capped} if capped else {})

    def outgoing(self, client_id: str, arrays: ArrayRecord) -> ArrayRecord:
        """Return what a client is sent of the global model, to train or to evaluate: all of it."""
        return arrays

    def instructions(self, kind: str, server_round: int) -> dict[str, Any]:
        """Return the fields of an order that say what to train and send back; none, and it is everything."""
        return {}

    def combine(self, trained: dict[str, ArrayRecord], weights: list[float]) -> tuple[ArrayRecord, dict[str, Any]]:
        """Return the new global model, of clients sorted by id, and what the round's line of metrics says of it."""
        return weighted_average(list(trained.values()), weights), {}

    def _weigh(self, trained: dict[str, ArrayRecord], examples: list[float]) -> list[float]:
        if self.weighting == NUM_EXAMPLES:
            return examples
        if self.weighting == "uniform":
            return [1.0] * len(examples)
        updates = [(after - before for after, before in self._pairs(name, a)) for name, a in trained.items()]
        weights = alignment_weights(updates, [self.exchange.norms[name] for name in trained])
        return cap_shares(weights, self.max_weight_share)

    def _cap(self, examples: Mapping[str, float]) -> tuple[list[float], dict[str, float]]:
        """Return the samples that each client counts for, and the shares of those that claim more than they count."""
        weights = cap_shares(list(examples.values()), self.max_weight_share)
        total = sum(examples.values())
        pairs = zip(examples.items(), weights, strict=True)
        capped = {name: round(claimed / total, 4) for (name, claimed), weight in pairs if weight != claimed}
        for name, share in capped.items():
            text = "round %d: client %s claims %.0f %% of the samples, strategy.max_weight_share=%g caps it"
            log(WARNING, text, self.exchange.server_round, name, 100 * share, self.max_weight_share)
        return weights, capped

    def _pairs(self, name: str, arrays: ArrayRecord) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield each floating tensor of a client, as trained and as it was sent to the client."""
        sent = self.expected(name, arrays)
        for key in sorted(arrays):
            values = view(arrays[key])
            if values.dtype.kind == "f":
                yield values, view(sent[key])

    def _check_aggregate(self, arrays: ArrayRecord) -> None:
        """Refuse a model that nobody could train from, before it becomes a round; raises FederationError."""
        for key, array in arrays.items():
            if fault := find_value_fault(view(array)):
                raise FederationError(
                    f"round {self.exchange.server_round}: the aggregated {key} has {fault}, so the round is not kept: "
                    "lower train.lr or strategy.server_lr, or exclude the client that sent it, and set resume=true"
                )

    def _ask(self, kind: str, server_round: int, arrays: ArrayRecord, fraction: float) -> list[Message]:
        self.roster.refresh()
        if self.roster.refusals_changed():
            self.run.append("refused", server_round, refused=self.roster.refused)
        chosen = self.roster.sample(fraction, self.seed, server_round, kind)
        rest = self.instructions(kind, server_round)
        sent = {}
        for name in chosen:
            content, accepted = self.outgoing(name, arrays), self.accepted.get(name, 0)
            sent[name] = self.roster.order(kind, name, server_round, content, accepted_round=accepted, **rest)
        if self.releases and kind == TRAIN:
            self.releases.ask(server_round, chosen)
        self.exchange = Exchange(kind, server_round, sent, rest.get("returns"), absent=self.roster.missing())
        self.run.show_progress(server_round, kind, 0, len(sent))
        return list(sent.values())

    def _receive(self, replies: Iterable[Message]) -> Exchange:
        """Sort this phase's replies into good and failed, by client; raises FederationError for too few."""
        exchange = self.exchange
        by_message = {message.metadata.message_id: name for name, message in exchange.sent.items()}
        for reply in replies:
            name = by_message.pop(reply.metadata.reply_to_message_id, None)
            if name is None:
                continue  # an answer to something not asked in this phase
            try:
                exchange.good[name] = (self._check(name, reply), reply)
            except MessageError as error:
                exchange.failures[name] = str(error)
        if self.releases and exchange.kind == TRAIN:
            replayed = [name for name, (metrics, _) in exchange.good.items() if metrics.get(REPLAYED)]
            self.releases.replay(exchange.server_round, replayed)
        for name, reason in self.bound.faults(exchange.norms).items():
            exchange.failures[name] = reason
            del exchange.good[name], exchange.norms[name]
        exchange.failures |= dict.fromkeys(by_message.values(), "sent no reply in time")
        for name, reason in sorted(exchange.failures.items()):
            log(WARNING, "round %d: client %s %s", exchange.server_round, name, reason)
        # Fewer may be asked to evaluate than min_replies, never to train: clients that left count as no reply.
        needed = self.min_replies if exchange.kind == TRAIN else min(self.min_replies, max(1, len(exchange.sent)))
        if len(exchange.good) < needed:
            self.run.append(exchange.kind, exchange.server_round, **self._log_line())
            raise FederationError(
                f"round {exchange.server_round}: {by_reason(exchange.failures, 3) or 'no client is present'} "
                f"({len(exchange.good)} of {len(exchange.sent)} clients gave a valid {exchange.kind} reply, "
                f"strategy.min_replies={self.min_replies})"
            )
        return exchange

    def _log_line(self) -> dict[str, Any]:
        """Return what the line of this phase says in any case; after training, also the epsilon so far."""
        line = self.exchange.log_line()
        if self.releases and self.exchange.kind == TRAIN:
            line["epsilon"] = self.releases.spent()["epsilon"]
        return line

    def _check(self, name: str, reply: Message) -> dict[str, float]:
        """Return a reply's metrics if all of it is sound; raises MessageError with the reason otherwise."""
        if reply.has_error():
            raise MessageError(f"failed: {describe_error(reply.error)}")
        claim, metrics = unpack_reply(reply.content, self.exchange.kind)
        if fault := self.roster.check(name, claim) or self._find_metric_fault(name, metrics):
            raise MessageError(fault)
        if self.exchange.kind == TRAIN:
            trained = unpack_arrays(reply.content)
            if fault := find_fault(trained, self.expected(name, trained)):
                raise MessageError(fault)
            self.exchange.norms[name] = update_norm(self._pairs(name, trained))
        return metrics

    def expected(self, name: str, trained: ArrayRecord) -> Mapping[str, Array]:
        """Return what `trained`, a client's reply, must fit and is an update of: the tensors it was asked to return."""
        sent = unpack_arrays(self.exchange.sent[name].content)
        return {key: sent[key] for key in self.exchange.returns or sent}

    def _find_metric_fault(self, name: str, metrics: dict[str, float]) -> str | None:
        attested: Claim = self.roster.members[name].claim
        train = self.exchange.kind == TRAIN
        samples = attested.train if train else attested.test
        held = {key: attested.val if key.startswith(VAL) else samples for key in metrics}
        needed = {NUM_EXAMPLES} | ({"train-loss"} if train else self._sums_needed(attested, metrics))
        if missing := sorted(needed - metrics.keys()):
            return f"sent no {missing[0]}"
        if odd := sorted(key for key in metrics if key.endswith("correct") and not attested.label_hist):
            return f"sent {one_line(odd[0])}, but there are no classes"
        if bad := sorted(key for key, value in metrics.items() if not isfinite(value)):
            return f"sent {one_line(bad[0])}={metrics[bad[0]]}"
        if bad := sorted(key for key, value in metrics.items() if key in NEVER_NEGATIVE and value < 0):
            return f"sent {bad[0]}={metrics[bad[0]]}, which is never below 0"
        if metrics[NUM_EXAMPLES] != samples:
            return f"sent num-examples={metrics[NUM_EXAMPLES]}, attested {samples}"
        counted = {key: value for key, value in metrics.items() if key.endswith("correct")}
        if odd := sorted(key for key, value in counted.items() if not 0 <= value <= held[key]):
            return f"sent {one_line(odd[0])}={metrics[odd[0]]}, more correct answers than its {held[odd[0]]} samples"
        most = {key: LARGEST_LOSS * (1 if train else held[key]) for key in NEVER_NEGATIVE & metrics.keys()}
        if large := sorted(key for key in most if metrics[key] > most[key]):
            return f"sent {large[0]}={metrics[large[0]]:.3g}, more than {held[large[0]]} samples can have"
        return None

    def _sums_needed(self, attested: Claim, metrics: Mapping[str, float]) -> set[str]:
        """Name the sums that an evaluation must have; with one of a personalised model, all of them."""
        starts = ("", VAL) if self.validates else ("",)
        kinds = ("", "personal-") if any("personal-" in key for key in metrics) else ("",)
        sums = ("loss-sum", "correct") if attested.label_hist else ("loss-sum",)
        return {f"{start}{kind}{total}" for start in starts for kind in kinds for total in sums}


def _totals(
    metrics: dict[str, dict[str, float]], held: dict[str, int], weights: dict[str, float], prefix: str
) -> dict[str, Any]:
    """Sum one kind of evaluation over clients; accuracy is None for regression, and all is None where absent.

    held: the samples that each client has; weights: those that it counts for, which are fewer if they are capped.
    """
    out = prefix.replace("-", "_")
    measured = {name: m for name, m in metrics.items() if f"{prefix}loss-sum" in m}
    count = sum(weights[name] for name in measured)
    if not count:
        return {f"{out}loss": None, f"{out}accuracy": None}

    def total(key: str) -> float:
        return sum(m[key] * (weights[name] / held[name]) for name, m in measured.items() if key in m)

    result: dict[str, Any] = {f"{out}loss": total(f"{prefix}loss-sum") / count}
    result[f"{out}loss_spread"] = spread({n: m[f"{prefix}loss-sum"] / held[n] for n, m in measured.items()})
    each = {n: m[f"{prefix}correct"] / held[n] for n, m in measured.items() if f"{prefix}correct" in m}
    if each:
        result[f"{out}accuracy"] = total(f"{prefix}correct") / count
        result[f"{out}accuracy_spread"] = spread(each)
        result[f"{out}accuracy_by_client"] = each
    return {f"{out}accuracy": None} | result
