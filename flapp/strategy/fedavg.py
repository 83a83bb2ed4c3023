"""FedAvg as a Flower strategy: draws clients by id, checks every reply, and averages in an order of its own."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from flapp.checks import (
    find_metric_fault,
    find_norm_fault,
    find_sum_fault,
    find_value_fault,
    floating_pairs,
    measure_update,
)
from flapp.groups import UPDATE_NORM, Asked, Group, cut_rank, pack_group, unpack_outcomes
from flapp.listing import by_reason
from flapp.messages import (
    ARRAYS,
    EVALUATE,
    NUM_EXAMPLES,
    REPLAYED,
    TRAIN,
    VAL,
    Answer,
    MessageError,
    describe_error,
    pack_instructions,
    unpack_arrays,
    unpack_reply,
    view,
)
from flapp.server.journals import ReleaseLedger
from flapp.server.observer import Observer
from flapp.server.roster import FederationError, Roster
from flapp.strategy.alignment import alignment_weights
from flapp.strategy.bounds import NormBound, cap_shares
from flapp.strategy.evaluation import totals
from flapp.strategy.phase import Phase, byte_sizes
from flapp.strategy.server_optimizer import ServerOptimizer
from flapp.sums import WeightedSum, weighted_average


class FedAvg(FlowerFedAvg):
    """Federated averaging (McMahan et al. 2017) whose result does not depend on the order of replies.

    roster: who may take part; observer: is told what happens; weighting: `num-examples`, `uniform` or `alignment`;
    min_replies: valid replies a phase needs, or FederationError; evaluate_every: rounds between evaluations, the last
    is always one; norm_limit: the longest update that counts, in medians; max_weight_share: the most that one client
    counts for; releases: counts what clients release, with privacy.enabled; validates: whether evaluations must also
    have figures of validation samples.
    Flower counts rounds from 1 at every start; `done` are the rounds of earlier starts, which go before them.
    """

    def __init__(
        self,
        roster: Roster,
        observer: Observer,
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
        self.observer = observer
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
        self.remembers = False  # whether clients are told the last round that was accepted from them
        self.phase = Phase(TRAIN, 0)
        self.timeout: float | None = None  # seconds for replies that are asked for once more
        self._examples: dict[str, float] = {}

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

    def restore(self, done: int, facts: dict[str, Any], state: dict[str, np.ndarray]) -> None:
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
        messages = self._ask(TRAIN, self.done + server_round, self.fraction_train)
        self.observer.enter("send")
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw clients to evaluate the new global model, in the rounds that are evaluated."""
        self.observer.enter("evaluate")
        if not self.is_evaluated(self.done + server_round):
            return []
        self.current = arrays
        return self._ask(EVALUATE, self.done + server_round, self.fraction_evaluate)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the valid replies' models; raises FederationError when there are fewer than min_replies."""
        self.observer.enter("aggregate")
        phase = self._receive(replies)
        names = sorted(phase.metrics)
        examples = [self._examples[name] for name in names]
        loss = sum(phase.metrics[n]["train-loss"] * count for n, count in zip(names, examples, strict=True))
        loss /= sum(examples)
        arrays, found = self._average(phase) if self.is_summed(phase) else self._combine_each(phase)
        if self.server_optimizer:
            arrays = self.server_optimizer.step(self.current, arrays, phase.server_round)
        self._check_aggregate(arrays)
        self.bound.accept(phase.norms)
        found |= {"update_norm": self.bound.medians[-1]}
        if capped := {name: share for name, share in phase.capped.items() if name in phase.metrics}:
            found["capped"] = capped
        busy = {name: round(m["seconds"], 3) for name, m in sorted(phase.metrics.items()) if "seconds" in m}
        self.observer.append(TRAIN, phase.server_round, loss=loss, **found, client_seconds=busy, **self._log_line())
        if self.remembers:
            self.accepted |= dict.fromkeys(names, phase.server_round)
        return arrays, MetricRecord({"train-loss": loss})

    def _average(self, phase: Phase) -> tuple[ArrayRecord, dict[str, Any]]:
        phase.fold(is_over=True)
        return self.combine_sum(phase.total, phase.weight())

    def _combine_each(self, phase: Phase) -> tuple[ArrayRecord, dict[str, Any]]:
        trained = {name: phase.trained.pop(name) for name in sorted(phase.trained)}
        if self.weighting != "alignment":
            return self.combine(trained, [phase.weights[name] for name in trained])
        updates = [
            (after - before for after, before in floating_pairs(arrays, self.expected(name, arrays)))
            for name, arrays in trained.items()
        ]
        weights = alignment_weights(updates, [phase.norms[name] for name in trained])
        return self.combine(trained, cap_shares(weights, self.max_weight_share))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Add up correct answers and losses over clients: exact, not a mean of means; log the spread over clients."""
        if not self.is_evaluated(self.done + server_round):
            return None
        phase = self._receive(replies)
        claims = {name: self.roster.members[name].claim for name in sorted(phase.metrics)}
        result = self._add_up({name: claim.test for name, claim in claims.items()}, "")
        if self.validates:
            result |= self._add_up({name: claim.val for name, claim in claims.items()}, VAL)
        self.observer.append(EVALUATE, phase.server_round, **result, **self._log_line())
        return MetricRecord({key.replace("_", "-"): v for key, v in result.items() if isinstance(v, float)})

    def _add_up(self, held: dict[str, int], start: str) -> dict[str, Any]:
        """Return the figures of one split, of which each client holds so many samples; `start` begins their names."""
        held = {name: count for name, count in held.items() if count}
        metrics = {name: self.phase.metrics[name] for name in held}
        weights, capped = self._cap(held)
        shares = dict(zip(held, weights, strict=True))
        result = totals(metrics, held, shares, start) | totals(metrics, held, shares, f"{start}personal-")
        return result | ({f"{start}capped".replace("-", "_"): capped} if capped else {})

    def outgoing(self, client_id: str) -> ArrayRecord:
        """Return what a client is sent of the global model, to train or to evaluate."""
        rank = self.rank_sent(client_id)
        return cut_rank(self.current, rank) if rank else self.current

    def rank_sent(self, client_id: str) -> int:
        """Return the rank to which a client's adapters are cut, 0 where they are not."""
        return 0

    def instructions(self, kind: str, server_round: int) -> dict[str, Any]:
        """Return the fields of an order that say what to train and send back; none, and it is everything."""
        return {}

    def is_summed(self, phase: Phase) -> bool:
        """Say whether the round's average is made of sums; otherwise every client's tensors are needed at once."""
        return self.weighting != "alignment"

    def combine_sum(self, total: WeightedSum, weight: float) -> tuple[ArrayRecord, dict[str, Any]]:
        """Return the new global model, of the weighted sum of all, and what the round's line of metrics says of it."""
        return total.mean(weight, self.current), {}

    def combine(self, trained: dict[str, ArrayRecord], weights: list[float]) -> tuple[ArrayRecord, dict[str, Any]]:
        """Return the same of each client's tensors, sorted by id."""
        return weighted_average(list(trained.values()), weights), {}

    def _cap(self, examples: Mapping[str, float]) -> tuple[list[float], dict[str, float]]:
        """Return the samples that each client counts for, and the shares of those that claim more than they count."""
        weights = cap_shares(list(examples.values()), self.max_weight_share)
        total = sum(examples.values())
        pairs = zip(examples.items(), weights, strict=True)
        capped = {name: round(claimed / total, 4) for (name, claimed), weight in pairs if weight != claimed}
        for name, share in capped.items():
            text = "round %d: client %s claims %.0f %% of the samples, strategy.max_weight_share=%g caps it"
            log(WARNING, text, self.phase.server_round, name, 100 * share, self.max_weight_share)
        return weights, capped

    def _check_aggregate(self, arrays: ArrayRecord) -> None:
        """Refuse a model that nobody could train from, before it becomes a round; raises FederationError."""
        for key, array in arrays.items():
            if fault := find_value_fault(view(array)):
                raise FederationError(
                    f"round {self.phase.server_round}: the aggregated {key} has {fault}, so the round is not kept: "
                    "lower train.lr or strategy.server_lr, or exclude the client that sent it, and set resume=true"
                )

    def _ask(self, kind: str, server_round: int, fraction: float) -> list[Message]:
        self.roster.refresh()
        if self.roster.refusals_changed():
            self.observer.append("refused", server_round, refused=self.roster.refused)
        chosen = self.roster.sample(fraction, self.seed, server_round, kind)
        rest = self.instructions(kind, server_round)
        self.order = self.roster.order(server_round, **rest)
        self.phase = Phase(kind, server_round, chosen, returns=rest.get("returns"), absent=self.roster.missing())
        if kind == TRAIN:
            counted, self.phase.capped = self._cap({name: self.roster.members[name].claim.train for name in chosen})
            self._examples = dict(zip(chosen, counted, strict=True))
            self.phase.weights = dict.fromkeys(chosen, 1.0) if self.weighting == "uniform" else self._examples
            if self.releases:
                self.releases.ask(server_round, chosen)
        if (limit := self.bound.known_limit()) is not None:
            self.phase.norm_limit = limit
        down = sum(byte_sizes(self.current))
        self.phase.bytes_down = {
            name: sum(byte_sizes(self.outgoing(name))) if self.rank_sent(name) else down for name in chosen
        }
        messages = [m for index, names in enumerate(self.phase.groups) for m in self._messages(index, names)]
        self.observer.show_progress(server_round, kind, 0, len(chosen))
        return messages

    def _messages(self, index: int, names: tuple[str, ...]) -> list[Message]:
        """Return what asks the clients of a group: one message if a node can serve all of them, or else one each."""
        phase = self.phase
        if len(names) > 1 and self.roster.any_node:
            group = Group(tuple(map(self._asked, names)), phase.norm_limit, self.is_summed(phase))
            node_id = self.roster.node_of(names[0], index)
            found = [(names, pack_group(node_id, phase.kind, self.order, group, self.current))]
        else:
            found = [((name,), self._single_message(index, name)) for name in names]
        phase.sent += [(message, (index, clients)) for clients, message in found]
        return [message for _, message in found]

    def _single_message(self, index: int, name: str) -> Message:
        order = replace(self.order, client_id=name, accepted_round=self.accepted.get(name, 0))
        return pack_instructions(self.roster.node_of(name, index), self.phase.kind, order, self.outgoing(name))

    def _asked(self, name: str) -> Asked:
        weight, claim = self.phase.weights.get(name, 0.0), self.roster.members[name].claim
        accepted = self.accepted.get(name, 0)
        return Asked(name, accepted, claim.train, weight, claim.shard_digest, self.rank_sent(name))

    def take(self, replies: Iterable[Message]) -> None:
        """Sort replies of this phase into good and failed, by client, and add up what can be added."""
        for reply in replies:
            clients = self.phase.answered(reply)
            if clients is None:
                continue  # an answer to something not asked in this phase
            index, names = clients
            try:
                if reply.has_error():
                    raise MessageError(f"failed: {describe_error(reply.error)}")
                if len(names) > 1:
                    self._take_group(index, names, reply)
                else:
                    self._take_single(names[0], reply)
            except MessageError as error:
                for name in names:
                    self.phase.fail(name, str(error))
            if reply.has_content():
                reply.content = RecordDict()  # the phase has its tensors, and drops them once they are added
        if self.phase.kind == TRAIN and self.is_summed(self.phase) and self.bound.known_limit() is not None:
            self.phase.fold()

    def _take_single(self, name: str, reply: Message) -> None:
        """Take one client's reply; raises MessageError with the reason when it does not count."""
        phase = self.phase
        answer, metrics = unpack_reply(reply.content, phase.kind)
        if fault := self.roster.check(name, answer):
            raise MessageError(fault)
        self._accept(name, metrics, unpack_arrays(reply.content) if phase.kind == TRAIN else None)

    def _accept(self, name: str, metrics: Mapping[str, float], trained: ArrayRecord | None) -> None:
        """Count a client whose data are as attested; raises MessageError when its numbers or tensors do not count."""
        phase, claim = self.phase, self.roster.members[name].claim
        if fault := find_metric_fault(phase.kind, claim, metrics, self.validates):
            raise MessageError(fault)
        if trained is not None:
            norm = measure_update(trained, self.expected(name, trained))
            if fault := find_norm_fault(norm, phase.norm_limit, self.bound.multiple):
                raise MessageError(fault)
            phase.norms[name], phase.trained[name] = norm, trained
            phase.bytes_up[name] = sum(byte_sizes(trained))
        phase.metrics[name] = metrics

    def _take_group(self, index: int, names: tuple[str, ...], reply: Message) -> None:
        """Take a node's reply for a group; raises MessageError when none of it counts."""
        phase = self.phase
        is_summed = phase.kind == TRAIN and self.is_summed(phase)
        outcomes, total = unpack_outcomes(reply.content, phase.kind, names, is_summed)
        for outcome in outcomes:
            try:
                if outcome.failure:
                    raise MessageError(outcome.failure)
                answer = Answer(outcome.client_id, outcome.shard_digest)
                if fault := self.roster.check(outcome.client_id, answer):
                    raise MessageError(fault)
                self._accept(outcome.client_id, outcome.metrics or {}, outcome.arrays)
            except MessageError as error:
                phase.fail(outcome.client_id, str(error))
        if total is None:
            return
        added = [outcome.client_id for outcome in outcomes if not outcome.failure]
        if odd := [name for name in added if name not in phase.metrics]:
            raise MessageError(f"its group's sum has client {odd[0]}, which does not count ({phase.failures[odd[0]]})")
        norms = {name: phase.metrics[name].get(UPDATE_NORM, math.nan) for name in added}
        if not all(0 <= norm <= phase.norm_limit for norm in norms.values()):
            raise MessageError("its group's sum has an update longer than the limit")
        expected = {key: self.current[key] for key in phase.returns or self.current}
        weight = sum(phase.weights[name] for name in added)
        most = sum(phase.weights[name] * norm for name, norm in norms.items())
        if fault := find_sum_fault(total, expected, weight, most):
            raise MessageError(f"its group's sum does not count: {fault}")
        phase.sums[index] = total
        phase.norms |= norms
        phase.bytes_up |= dict.fromkeys(added, sum(byte_sizes(expected)))

    def _receive(self, replies: Iterable[Message]) -> Phase:
        """Take the replies that are left, and end the phase; raises FederationError for too few."""
        self.take(replies)
        phase = self.phase
        if phase.kind == TRAIN:
            self._apply_first_limit()
        if self.releases and phase.kind == TRAIN:
            self.releases.replay(phase.server_round, [n for n, m in phase.metrics.items() if m.get(REPLAYED)])
        silent = {name for _, names in phase.waiting.values() for name in names}
        silent |= {name for _, (_, names) in phase.sent for name in names}
        for name in silent:
            phase.fail(name, "sent no reply in time")
        for name, reason in sorted(phase.failures.items()):
            log(WARNING, "round %d: client %s %s", phase.server_round, name, reason)
        # Fewer may be asked to evaluate than min_replies, never to train: clients that left count as no reply.
        needed = self.min_replies if phase.kind == TRAIN else min(self.min_replies, max(1, len(phase.names)))
        if len(phase.metrics) < needed:
            self.observer.append(phase.kind, phase.server_round, **self._log_line())
            raise FederationError(
                f"round {phase.server_round}: {by_reason(phase.failures, 3) or 'no client is present'} "
                f"({len(phase.metrics)} of {len(phase.names)} clients gave a valid {phase.kind} reply, "
                f"strategy.min_replies={self.min_replies})"
            )
        return phase

    def _apply_first_limit(self) -> None:
        """Leave out updates that are too long by the median of a run's first round, which no node knew.

        A sum with such an update in it is asked for again without that client.
        """
        phase = self.phase
        phase.norm_limit = self.bound.limit(phase.norms)
        faults = self.bound.faults(phase.norms, phase.norm_limit)
        again: list[Message] = []
        for index, names in enumerate(phase.groups):
            if index in phase.sums and faults.keys() & set(names):
                del phase.sums[index]
                rest = tuple(name for name in names if name in phase.metrics and name not in faults)
                for name in rest:
                    phase.fail(name, "")
                    del phase.failures[name]
                if rest:
                    again += self._messages(index, rest)
                    if self.releases:
                        self.releases.ask(phase.server_round, rest)
        for name, reason in faults.items():
            phase.fail(name, reason)
        if again:
            self.take(self.roster.grid.send_and_receive(again, timeout=self.timeout))

    def _log_line(self) -> dict[str, Any]:
        """Return what the line of this phase says in any case; after training, also the epsilon so far."""
        line = self.phase.log_line()
        if self.releases and self.phase.kind == TRAIN:
            line["epsilon"] = self.releases.spent()["epsilon"]
        return line

    def expected(self, name: str, trained: ArrayRecord) -> Mapping[str, Array]:
        """Return what `trained`, a client's reply, must fit and is an update of: the tensors it was asked to return."""
        sent = self.outgoing(name)
        return {key: sent[key] for key in self.phase.returns or sent}
