"""FedLoRA as a Flower strategy: adapters and head travel, the frozen base stays where it is.

What a client is sent, trains, sends back and keeps depends on the rule (lora_rules.RULES) alone. The instructions in
each message name these tensors, so that clients need not know the rule. Rules that fold into the base send the base
weights of the adapted layers again in each round, so clients keep nothing and a resumed server needs no history.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from logging import INFO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.common import log

from flapp.architecture import pruned_rank
from flapp.groups import cut_rank
from flapp.messages import TRAIN, as_record, pack, view
from flapp.model.files import to_numpy
from flapp.server.roster import FederationError
from flapp.strategy.fedavg import FedAvg
from flapp.strategy.lora_rules import RULES, Aggregated, Factors, error_norms, refill
from flapp.strategy.phase import Phase
from flapp.sums import WeightedSum, weighted_average

A, B, WEIGHT = "lora_A", "lora_B", "weight"


def global_keys(state: Iterable[str], travels: Iterable[str], aggregation: str | None) -> tuple[list[str], list[str]]:
    """Return the tensors of the global model that clients are sent, and those that each client keeps to itself.

    state: every key of the model, in order; travels: those that training may change. The rest is the base. Without
    adapters, aggregation is None and every tensor is sent.
    """
    if aggregation is None:
        return list(state), []
    rule, travels = RULES[aggregation], set(travels)
    layers = [key.removesuffix(A) for key in sorted(travels) if key.endswith(f".{A}")]
    if rule.folds:
        travels |= {layer + WEIGHT for layer in layers}
    private = {layer + B for layer in layers} if rule.private_b else set()
    stays = {layer + A for layer in layers if rule.odd == rule.even == "B"}  # drawn once, and part of the base
    sent = travels - private - stays
    return [key for key in state if key in sent], [key for key in state if key in private]


class FedLoRA(FedAvg):
    """Federated LoRA by the rule strategy.aggregation. It takes FedAvg's arguments and these:

    layers: names of the adapted layers, each with whether its weight is (in, out), the transpose of B A; private: keys
    that each client keeps; fresh: draws a round's new lora_A of every layer, of the global rank, from the seed. Factors
    that are never sent are taken from roster.base.
    """

    def __init__(
        self,
        *args: Any,
        layers: Mapping[str, bool],
        private: Sequence[str],
        fresh: Callable[[int], Mapping[str, np.ndarray]],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        assert self.settings.aggregation is not None
        self.rule = RULES[self.settings.aggregation]
        self.layers, self.is_transposed = list(layers), dict(layers)
        self.private, self.fresh = tuple(private), fresh
        self.lora = self.config.lora
        self.scaling = self.lora.alpha / self.lora.rank
        dealt = self.lora.rank_by_client or ()
        self.ranks = {name: dealt[i % len(dealt)] for i, name in enumerate(self.roster.expected)} if dealt else {}
        self.pruned: dict[str, int] = {}
        self.remembers = bool(private)

    def summary(self) -> None:
        """Log the rule, and what FedAvg logs."""
        log(INFO, "\t├──> adapters of %d layers, aggregated by %s", len(self.layers), self.settings.aggregation)
        super().summary()

    def facts(self) -> dict[str, Any]:
        """Return FedAvg's facts, the digest of the base, and the ranks of clients that pruned themselves."""
        return super().facts() | {"base": self.roster.base_digest, "pruned": self.pruned}

    def restore(self, done: int, facts: dict[str, Any], state: dict[str, np.ndarray]) -> None:
        """Continue after `done` rounds; raises FederationError when the base is not the one the run began with."""
        if (before := facts["base"]) != (now := self.roster.base_digest):
            raise FederationError(
                f"the run began over base {before[:12]}, the base is now {now[:12]}: bring back the file that "
                "model.pretrained named, or start a new run"
            )
        super().restore(done, facts, state)
        self.pruned = dict(facts["pruned"])

    def instructions(self, kind: str, server_round: int) -> dict[str, Any]:
        """Name what is trained and sent back in this round, and what is trained and kept."""
        factors = self.rule.travels(server_round) if kind == TRAIN else frozenset("AB")
        parts = [WEIGHT, *(f"lora_{ab}" for ab in "AB" if ab not in factors)]
        frozen = {f"{layer}.{part}" for layer in self.layers for part in parts}
        return {"returns": tuple(key for key in self.current if key not in frozen), "private": self.private}

    def rank_sent(self, client_id: str) -> int:
        """Return the rank to which a client's adapters are cut, 0 where they are not."""
        rank = self.rank_of(client_id)
        return 0 if rank == self.lora.rank else rank

    def rank_of(self, client_id: str) -> int:
        """Return the rank that a client has now."""
        return self.pruned.get(client_id, self.ranks.get(client_id, self.lora.rank))

    def expected(self, name: str, trained: ArrayRecord) -> Mapping[str, Array]:
        """Return the tensors that a reply must fit; if the client has pruned itself, they are cut to its new rank."""
        wanted, own = super().expected(name, trained), self.rank_of(name)
        rank, key = pruned_rank(self.lora, own), f"{self.layers[0]}.{A}"
        is_pruned = rank < own and key in trained and tuple(trained[key].shape[:1]) == (rank,)
        return cut_rank(wanted, rank) if is_pruned else wanted

    def is_summed(self, phase: Phase) -> bool:
        """Return whether the round is made of sums: for rules that average, if groups have more than one client."""
        return super().is_summed(phase) and self.rule.averages and any(len(group) > 1 for group in phase.groups)

    def combine_sum(self, total: WeightedSum, weight: float) -> tuple[ArrayRecord, dict[str, Any]]:
        """Return the new global model from the weighted sum of all clients, and facts for the round's line.

        aggregation_error is None where both factors were trained, because the sums of the factors do not give the sum
        of their products, and where every client keeps its own B.
        """
        is_known = len(self.rule.travels(self.phase.server_round)) == 1 and not self.rule.private_b
        trained = [key for key in total.arrays if key.rpartition(".")[0] in self.layers]
        exact = total.unrounded_mean(weight, trained if is_known else [])
        new = dict(self.current.items()) | dict(total.mean(weight, self.current).items())
        if not is_known:
            return as_record(new), {"aggregation_error": None}
        norms = []
        for layer in self.layers:
            a, b = self._factors(new, layer)
            assert b is not None
            ideal_a, ideal_b = (exact.get(f"{layer}.{part}", x.astype(np.float64)) for part, x in ((A, a), (B, b)))
            norms.append(error_norms(Aggregated(a, b), [Factors(ideal_a, ideal_b, 1.0)]))
        return as_record(new), _relative_error(norms)

    def combine(self, trained: dict[str, ArrayRecord], weights: list[float]) -> tuple[ArrayRecord, dict[str, Any]]:
        """Aggregate adapters by the rule and average the rest; measure how far the adapters are from the ideal.

        aggregation_error is ||applied - ideal||_F / ||ideal||_F over all layers, None where it cannot be known. Applied
        is what the next global model really adds, before any server optimizer steps: its B A, and the change of its
        base weights as they are stored. client_ranks are those that clients have from now on, where they may differ
        from the global rank.
        """
        records = list(trained.values())
        adapters = {f"{layer}.{part}" for layer in self.layers for part in (A, B)}
        rest = [key for key in records[0] if key not in adapters]
        new = dict(self.current.items())
        if rest:
            picked = [as_record({key: record[key] for key in rest}) for record in records]
            new |= dict(weighted_average(picked, weights).items())
        rank = self.lora.rank if self.rule.any_rank else None
        fresh = self.fresh(self.phase.server_round) if self.rule.any_rank else {}
        norms = []
        for layer in self.layers:
            clients = [Factors(*self._factors(r, layer), weight) for r, weight in zip(records, weights, strict=True)]
            found = self.rule.aggregate(clients, rank)
            installed = self._install(layer, found, fresh)
            norms.append((0.0, 0.0) if self.rule.private_b else self._error_norms(layer, found, installed, clients))
            new |= installed
        return as_record(new), _relative_error(norms) | self._note_ranks(trained)

    def _factors(self, record: Mapping[str, Array], layer: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return A and B of a layer: a record's own or, where it lacks one, that of the global model or the base.

        B is None where it is private.
        """
        assert self.roster.base is not None
        fixed, found = self.roster.base.tensors, dict[str, np.ndarray]()
        for part in (A, B):
            key = f"{layer}.{part}"
            held = record if key in record else self.current
            if key in held or key in fixed:
                found[part] = view(held[key]) if key in held else to_numpy(fixed[key])
        return found[A], found.get(B)

    def _install(self, layer: str, found: Aggregated, fresh: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Return the new tensors of a layer: its factors, and the base weight when something is folded into it."""
        a, b, key = found.A, found.B, f"{layer}.{A}"
        if a is None:
            a, b = fresh[key], np.zeros_like(view(self.current[f"{layer}.{B}"]))
        elif fresh and b is not None:
            a = refill(a, b, fresh[key]).astype(a.dtype)
        new = {key: a, f"{layer}.{B}": b}
        if found.folded is not None:
            weight = view(self.current[f"{layer}.{WEIGHT}"])
            product = reduce(np.matmul, [factor.astype(np.float64) for factor in found.folded])
            product = product.T if self.is_transposed[layer] else product.reshape(weight.shape)
            new[f"{layer}.{WEIGHT}"] = (weight + self.scaling * product).astype(weight.dtype)
        return {key: pack(value) for key, value in new.items() if value is not None and key in self.current}

    def _error_norms(
        self, layer: str, found: Aggregated, installed: Mapping[str, Array], clients: Sequence[Factors]
    ) -> tuple[float, float]:
        """Return the error and the ideal of a layer; what is folded is measured on the base weight that is stored."""
        key = f"{layer}.{WEIGHT}"
        if key in installed:
            change = np.subtract(view(installed[key]), view(self.current[key]), dtype=np.float64)
            change = change.T if self.is_transposed[layer] else change.reshape(len(change), -1)
            found = replace(found, folded=(change / self.scaling,))
        return error_norms(found, clients)

    def _note_ranks(self, trained: Mapping[str, ArrayRecord]) -> dict[str, Any]:
        """Remember which clients have pruned themselves, and return what the round's line says of ranks."""
        if not self.rule.any_rank:
            return {}
        found = {name: len(view(record[f"{self.layers[0]}.{A}"])) for name, record in trained.items()}
        self.pruned |= {name: rank for name, rank in found.items() if rank < self.rank_of(name)}
        may_differ = self.ranks or pruned_rank(self.lora, self.lora.rank) < self.lora.rank
        return {"client_ranks": found} if may_differ else {}


def _relative_error(norms: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return the error over all layers, from the error and the ideal of each."""
    error, ideal = (sum(norm**2 for norm in column) ** 0.5 for column in zip(*norms, strict=True))
    return {"aggregation_error": error / ideal if ideal else None}
