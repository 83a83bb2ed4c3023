"""FedAvg as a Flower strategy: draws clients by id, checks every reply, and averages in a fixed order."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from logging import INFO, WARNING
from statistics import median_low
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from flapp.checks import find_norm_fault, find_value_fault, floating_pairs
from flapp.config.rules import fewest_replies
from flapp.config.schema import Config, ConfigError
from flapp.custom import scores_of
from flapp.groups import Asked, Group, cut_rank, pack_group
from flapp.messages import (
    EVALUATE,
    REPLAYED,
    TRAIN,
    VAL,
    Instructions,
    as_record,
    pack_instructions,
    size_of,
    views,
)
from flapp.server.journals import ReleaseLedger
from flapp.server.observer import Observer
from flapp.server.publish import is_whole
from flapp.server.roster import FederationError, Roster
from flapp.strategy.aggregation import NormBound, alignment_weights, cap_shares, totals
from flapp.strategy.phase import Phase
from flapp.strategy.robust import PER_CLIENT, robust_average
from flapp.strategy.server_optimizer import ServerOptimizer
from flapp.sums import WeightedSum, weighted_average


class FedAvg(FlowerFedAvg):
    """Federated averaging (McMahan et al. 2017) whose result does not depend on the order of replies.

    roster: who may take part; observer: is told what happens; releases: counts releases with privacy=local.
    Flower counts rounds from 1 at every start; `done` is the number of rounds of earlier starts.
    """

    def __init__(
        self,
        roster: Roster,
        observer: Observer,
        config: Config,
        server_optimizer: ServerOptimizer | None = None,
        releases: ReleaseLedger | None = None,
    ) -> None:
        self.settings = config.strategy
        super().__init__(self.settings.fraction_train, self.settings.fraction_evaluate)
        self.roster = roster
        self.observer = observer
        self.config = config
        self.server_optimizer = server_optimizer
        self.bound = NormBound(self.settings.norm_limit)
        self.releases = releases
        self.done = 0
        self.current = ArrayRecord()
        self.accepted: dict[str, int] = {}
        self.remembers = False  # whether clients are told the last round that was accepted from them
        self.phase = Phase(TRAIN, 0)
        self.shared: Instructions  # what the instructions of all clients of this phase have in common
        self.examples: dict[str, float] = {}  # the weight of each client of a round: its samples, capped

    def summary(self) -> None:
        """Log the strategy's settings, in place of Flower's own summary."""
        drawn = f"{100 * self.fraction_train:g} % of the clients train, {100 * self.fraction_evaluate:g} % evaluate"
        weighting, least = self.settings.weighting, self.settings.min_replies
        if self.settings.robust != "none":
            log(INFO, "\t├──> averaged by %s", self.settings.robust)
        log(INFO, "\t└──> %s; weighted by %s; min_replies %d", drawn, weighting, least)

    def facts(self) -> dict[str, Any]:
        """Return what a later start needs besides tensors: clients' last accepted rounds, and recent median lengths."""
        is_needed = self.bound.multiple is not None or is_whole(self.config.privacy)
        return {"accepted": self.accepted, "update_norms": self.bound.medians if is_needed else []}

    def state(self, arrays: ArrayRecord) -> dict[str, np.ndarray]:
        """Return the tensors that a later start needs besides the global model."""
        return self.server_optimizer.state(arrays) if self.server_optimizer else {}

    def restore(self, done: int, facts: dict[str, Any], state: dict[str, np.ndarray]) -> None:
        """Continue after the first `done` rounds, with the facts and tensors of that moment."""
        self.done = done
        self.accepted = dict(facts["accepted"])
        self.bound.medians = list(facts.get("update_norms", []))
        if self.server_optimizer:
            self.server_optimizer.restore(state)

    def is_evaluated(self, server_round: int) -> bool:
        """Return whether this round ends with an evaluation."""
        return server_round % self.config.evaluate.every == 0 or server_round == self.last_round()

    def last_round(self) -> int:
        """Return the round after which the run ends."""
        return self.config.num_rounds

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
        """Average the valid replies' models; raises FederationError when there are fewer than replies_needed."""
        self.observer.enter("aggregate")
        phase = self._receive(replies)
        loss = self._mean_loss(phase)
        if phase.is_summed:
            phase.fold(is_over=True)
            arrays, found = self.combine_sum(phase.total, phase.weight())
        else:
            arrays, found = self._combine_each(phase)
        if self.server_optimizer:
            arrays = self.server_optimizer.step(self.current, arrays, phase.server_round)
        self._check_aggregate(arrays)
        self.bound.accept(phase.norms)
        found |= self._note_clipped()
        capped = {name: share for name, share in phase.capped.items() if name in phase.metrics}
        found |= {"update_norm": self.bound.medians[-1]} | ({"capped": capped} if capped else {})
        self.observer.append(
            TRAIN, phase.server_round, loss=loss, **found, client_seconds=seconds_by_client(phase), **self._log_line()
        )
        if self.remembers:
            self.accepted |= dict.fromkeys(sorted(phase.metrics), phase.server_round)
        return arrays, MetricRecord({"train-loss": loss})

    def _mean_loss(self, phase: Phase) -> float:
        """Return the training loss, a mean over the samples of all clients that count."""
        counts = {name: self.examples[name] for name in sorted(phase.metrics)}
        return sum(phase.metrics[n]["train-loss"] * count for n, count in counts.items()) / sum(counts.values())

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Add up correct answers and losses over clients: exact, not a mean of means; log the spread over clients."""
        if not self.is_evaluated(self.done + server_round):
            return None
        phase = self._receive(replies)
        result: dict[str, Any] = {}
        for split, start in (("test", ""), ("val", VAL)) if self.config.validates else (("test", ""),):
            held = {name: getattr(phase.claims[name], split) for name in sorted(phase.metrics)}
            held = {name: count for name, count in held.items() if count}
            weights, capped = self._cap(held)
            for prefix in (start, f"{start}personal-"):
                result |= totals({name: phase.metrics[name] for name in held}, held, weights, prefix)
                result |= self.score(result, prefix.replace("-", "_"))
            if capped:
                result[f"{start}capped".replace("-", "_")] = capped
        self.observer.append(EVALUATE, phase.server_round, **result, **self._log_line())
        return MetricRecord({key.replace("_", "-"): v for key, v in result.items() if isinstance(v, float)})

    def draw(self, kind: str, server_round: int, fraction: float) -> list[str]:
        """Return the clients of a phase, sorted by id."""
        return self.roster.sample(fraction, self.config.seed, server_round, kind)

    def replies_needed(self, phase: Phase) -> int:
        """Return how many replies must count.

        Training needs min_replies, or more with strategy.robust; an evaluation needs min_replies, or all if it asks
        fewer clients.
        """
        if phase.kind == TRAIN:
            return fewest_replies(self.settings)
        return min(self.settings.min_replies, max(1, len(phase.names)))

    def outgoing(self, client_id: str) -> ArrayRecord:
        """Return what a client is sent of the global model, to train or to evaluate."""
        rank = self.rank_sent(client_id)
        return cut_rank(self.current, rank) if rank else self.current

    def rank_sent(self, client_id: str) -> int:
        """Return the rank to which a client's adapters are cut, 0 where they are not."""
        return 0

    def instructions(self, kind: str, server_round: int) -> dict[str, Any]:
        """Return the fields of Instructions that name what to train and send back; none means the whole model."""
        return {}

    def expected(self, name: str, trained: ArrayRecord) -> Mapping[str, Array]:
        """Return the tensors of which a client sends new values back, as it was sent them.

        Its reply must have their keys, shapes and dtypes.
        """
        sent = self.outgoing(name)
        return {key: sent[key] for key in self.shared.returns or sent}

    def is_summed(self, phase: Phase) -> bool:
        """Return whether a round's average is made of sums; otherwise it needs every client's tensors at once."""
        return self.settings.weighting != "alignment" and self.settings.robust not in PER_CLIENT

    def combine_sum(self, total: WeightedSum, weight: float) -> tuple[ArrayRecord, dict[str, Any]]:
        """Return the new global model from the weighted sum of all clients, and facts for the round's line."""
        return total.mean(weight, self.current), {}

    def combine(self, trained: dict[str, ArrayRecord], weights: list[float]) -> tuple[ArrayRecord, dict[str, Any]]:
        """Return the new global model from each client's tensors, sorted by id, and facts for the round's line."""
        return weighted_average(list(trained.values()), weights), {}

    def _combine_each(self, phase: Phase) -> tuple[ArrayRecord, dict[str, Any]]:
        trained = {name: phase.pop_trained(name) for name in sorted(phase.trained)}
        if self.settings.robust in PER_CLIENT:
            sent = self.expected(*next(iter(trained.items())))
            found, left_out = robust_average(self.settings, trained, sent, phase.weights)
            arrays = as_record(dict(self.current.items()) | dict(found.items()))
            return arrays, {"left_out": left_out} if left_out else {}
        if self.settings.weighting != "alignment":
            return self.combine(trained, [phase.weights[name] for name in trained])
        updates = [
            (after - before for after, before in floating_pairs(arrays, self.expected(name, arrays)))
            for name, arrays in trained.items()
        ]
        weights = alignment_weights(updates, [phase.norms[name] for name in trained])
        return self.combine(trained, cap_shares(weights, self.settings.max_weight_share))

    def _note_clipped(self) -> dict[str, Any]:
        """Return what the round's line says of clients whose updates norm_bound has clipped; log it."""
        clipped = {name: float(f"{factor:.4g}") for name, factor in self.phase.clipped().items()}
        limit = f"{self.settings.clip_multiple:g} times the median length"
        texts = [f"the update of client {n} is clipped to {limit}, {f:g} of its own" for n, f in clipped.items()]
        self.observer.warn(self.phase.server_round, texts, f"{len(clipped)} updates are clipped to {limit}")
        return {"clipped": clipped} if clipped else {}

    def score(self, result: Mapping[str, Any], start: str) -> dict[str, Any]:
        """Return the scores of the user's own sums; if they cannot be computed, log why and return the reason."""
        if f"{start}sums" not in result or self.config.evaluate.scores is None:
            return {}
        try:
            return {f"{start}scores": scores_of(self.config, result[f"{start}sums"])}
        except ConfigError as error:
            log(WARNING, "round %d: %s", self.phase.server_round, error)
            return {f"{start}scores_error": str(error)}

    def _cap(self, examples: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
        """Return each client's weight, its samples capped, and the shares that capped clients claim; log the latter."""
        weights = dict(zip(examples, cap_shares([*examples.values()], self.settings.max_weight_share), strict=True))
        total = sum(examples.values())
        capped = {name: round(claim / total, 4) for name, claim in examples.items() if weights[name] != claim}
        limit = f"strategy.max_weight_share={self.settings.max_weight_share}"
        texts = [f"client {n} claims {100 * s:.0f} % of the samples, {limit} caps it" for n, s in capped.items()]
        self.observer.warn(self.phase.server_round, texts, f"{limit} caps {len(capped)} clients")
        return weights, capped

    def _check_aggregate(self, arrays: ArrayRecord) -> None:
        """Raise FederationError for a new global model that training cannot continue from, before it is saved."""
        for key, values in views(arrays).items():
            if fault := find_value_fault(values):
                raise FederationError(
                    f"round {self.phase.server_round}: the aggregated {key} has {fault}, so the round is not kept: "
                    "lower train.lr or strategy.server_lr, or exclude the client that sent it, and set resume=true"
                )

    def _ask(self, kind: str, server_round: int, fraction: float) -> list[Message]:
        self.roster.refresh()
        if self.roster.refusals_changed():
            self.observer.append("refused", server_round, refused=self.roster.refused)
        chosen = self.draw(kind, server_round, fraction)
        self.shared = self.roster.order(server_round, **self.instructions(kind, server_round))
        claims = {name: self.roster.members[name].claim for name in chosen}
        self.phase = phase = Phase(kind, server_round, claims, absent=self.roster.missing(), expected=self.expected)
        phase.validates, phase.multiple = self.config.validates, self.bound.multiple
        phase.norm_fix = self.bound.fix
        if kind == TRAIN:
            self.examples, phase.capped = self._cap({name: claim.train for name, claim in claims.items()})
            phase.weights = dict.fromkeys(chosen, 1.0) if self.settings.weighting == "uniform" else self.examples
            phase.is_summed = self.is_summed(phase)
            if self.releases:
                self.releases.ask(server_round, chosen)
        phase.norm_limit, is_known = self.bound.limit({}), self.bound.is_known and self.settings.robust == "none"
        phase.may_fold = phase.is_summed and is_known
        down = size_of(self.current)
        phase.bytes_down = {name: size_of(self.outgoing(name)) if self.rank_sent(name) else down for name in chosen}
        messages = [m for index, names in enumerate(phase.groups) for m in self._messages(index, names)]
        self.observer.show_progress(server_round, kind, 0, len(chosen))
        return messages

    def _messages(self, index: int, names: tuple[str, ...]) -> list[Message]:
        """Return the messages to a group's clients: one for all if every node can serve them, otherwise one each."""
        phase = self.phase
        if len(names) > 1 and self.roster.any_node:
            group = Group(tuple(map(self._entry, names)), phase.norm_limit, phase.is_summed, phase.clip)
            node_id = self.roster.node_of(names[0], index)
            found = [(names, pack_group(node_id, phase.kind, self.shared, group, self.current))]
        else:
            found = []
            for name in names:
                own = replace(self.shared, client_id=name, accepted_round=self.accepted.get(name, 0))
                node_id = self.roster.node_of(name, index)
                found.append(((name,), pack_instructions(node_id, phase.kind, own, self.outgoing(name))))
        phase.sent += [(message, (index, clients)) for clients, message in found]
        return [message for _, message in found]

    def _entry(self, name: str) -> Asked:
        weight, claim = self.phase.weights.get(name, 0.0), self.phase.claims[name]
        return Asked(name, self.accepted.get(name, 0), claim.train, weight, claim.shard_digest, self.rank_sent(name))

    def _receive(self, replies: Iterable[Message]) -> Phase:
        """Take the replies that are left, and end the phase; raises FederationError for too few."""
        self.phase.take(replies)
        phase = self.phase
        if phase.kind == TRAIN:
            self._bound_updates()
            if self.releases:
                self.releases.replay(phase.server_round, [n for n, m in phase.metrics.items() if m.get(REPLAYED)])
        phase.end()
        told = self.observer.warn_of_failures(phase.server_round, phase.failures)
        needed = self.replies_needed(phase)
        if len(phase.metrics) < needed:
            self.observer.append(phase.kind, phase.server_round, **self._log_line())
            raise FederationError(f"round {phase.server_round}: {self._lack(phase, needed, told)}")
        return phase

    def _lack(self, phase: Phase, needed: int, told: str) -> str:
        """Return why a phase has fewer replies than needed; told: who failed and why, empty if nobody did."""
        asked, least, robust = len(phase.names), self.settings.min_replies, self.settings.robust
        if told:
            wanted = f"strategy.robust={robust} needs {needed}" if needed > least else f"strategy.min_replies={least}"
            return f"{told} ({len(phase.metrics)} of {asked} clients gave a valid {phase.kind} reply, {wanted})"
        if not asked:
            return "no client is present: start clients"
        found = f"only {asked} client{'s are' if asked > 1 else ' is'} present"
        if needed > least:
            return f"{found}, and strategy.robust={robust} needs {needed}: set it to none, or start more clients"
        return f"{found}, and strategy.min_replies={least} are needed: lower it, or start more clients"

    def _bound_updates(self) -> None:
        """Leave out updates beyond the limit of a run's first round, and set the length to which norm_bound clips.

        Nodes cannot know these lengths, because they depend on all updates of the round. If a node's sum contains such
        an update, the sum is dropped, and the remaining clients of its group are asked again. These answer from their
        stores, or train again.
        """
        phase = self.phase
        phase.norm_limit = self.bound.limit(phase.norms)
        messages: list[Message] = []
        limit = (phase.norm_limit, phase.multiple, phase.norm_fix)
        found = {name: find_norm_fault(norm, *limit) for name, norm in phase.norms.items()}
        faults = {name: fault for name, fault in found.items() if fault}
        if self.settings.robust == "norm_bound":
            norms = [norm for name, norm in phase.norms.items() if name not in faults]
            phase.clip = self.settings.clip_multiple * median_low(norms or [0.0])
        for index, rest in phase.leave_out(faults):
            messages += self._messages(index, rest)
            if self.releases:
                self.releases.ask(phase.server_round, rest)
        if messages:
            phase.take(self.roster.grid.send_and_receive(messages, timeout=self.settings.timeout))

    def _log_line(self) -> dict[str, Any]:
        """Return what the line of this phase says in any case; after training, also the epsilon so far."""
        line = self.phase.log_line()
        if self.releases and self.phase.kind == TRAIN:
            line["epsilon"] = self.releases.spent()["epsilon"]
        return line


def seconds_by_client(phase: Phase) -> dict[str, float]:
    """Return the seconds that each client trained."""
    return {name: round(found["seconds"], 3) for name, found in sorted(phase.metrics.items()) if "seconds" in found}
