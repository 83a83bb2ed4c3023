"""Central differential privacy on the server: who is drawn, the noise on a sum, and what is made known of it."""

import random
from collections.abc import Iterable, Mapping, Sequence
from logging import WARNING
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.common import log

from flapp.central import drawer, is_secure, next_clip
from flapp.checks import TOO_LONG
from flapp.config.load import derive_seed
from flapp.config.schema import Config
from flapp.messages import CLIPPING_NORM, TRAIN, WITHIN_CLIP, as_record, pack, view, views
from flapp.server.releases import CentralLedger, Release
from flapp.server.roster import Roster
from flapp.strategy.aggregation import NormBound
from flapp.strategy.fedavg import FedAvg, seconds_by_client
from flapp.strategy.phase import Phase
from flapp.sums import WeightedSum, over_blocks

SLACK = 1e-4  # relative: larger than the error of any measured length


class Central:
    """Draw clients, and make noisy averages; `clip` is the clipping norm of the next round."""

    def __init__(self, config: Config, ledger: CentralLedger) -> None:
        self.config, self.ledger = config, ledger
        self.plan = ledger.plan
        self.clip = config.privacy.clipping_norm
        self.last_round = config.num_rounds
        self.release: Release | None = None  # of this round, if an earlier start has made it
        self.pending: Release | None = None  # the same, of the first round of this start

    def begin(self, done: int, current: Mapping[str, Array]) -> None:
        """Plan the rounds that are left; `current` is the model after the first `done` rounds."""
        self.pending = self.ledger.kept(done + 1, views(current))
        first = done + self.ledger.has_counted(done + 1, self.pending)
        self.last_round = first + self.ledger.rounds_left(self.config.num_rounds - first)

    def draw(self, roster: Roster, server_round: int) -> list[str]:
        """Return the clients of a round: none if an earlier start has made its release."""
        self.release, self.pending = self.pending, None
        if self.release is not None:
            return []
        seed = derive_seed(self.config.seed, server_round, "poisson")
        generator = random.SystemRandom() if is_secure(self.config) else random.Random(seed)
        return roster.draw(self.plan.sampling, generator)

    def make_release(
        self,
        server_round: int,
        current: Mapping[str, Array],
        keys: Sequence[str],
        total: WeightedSum,
        metrics: Mapping[str, Mapping[str, float]],
        line: Mapping[str, Any],
    ) -> Release:
        """Return the noisy average of a round.

        current: the model that was sent; keys: the tensors that clients send back; total: the sum of the trained models
        of all clients that count, whose numbers are `metrics`; line: values for the round's line.
        """
        plan, sigma, count, sums = self.plan, self.plan.update_multiplier * self.clip, len(metrics), total.arrays
        sent = {key: view(current[key]) for key in keys}
        average = {key: np.empty(before.size, before.dtype) for key, before in sent.items()}

        def add_noise(key: str, part: slice) -> None:
            before = sent[key].reshape(-1)[part]
            block = drawer(self.config, server_round, key, part.start)(before.size) * sigma
            if count:
                block += view(sums[key]).reshape(-1)[part] - np.multiply(before, float(count), dtype=np.float64)
            average[key][part] = before + np.divide(block, plan.expected, out=block)

        over_blocks({key: before.size for key, before in sent.items()}, add_noise)
        line, clip = {**line, "clipping_norm": self.clip}, self.clip
        if plan.count_noise:
            short = sum(each.get(WITHIN_CLIP, 0) - 0.5 for each in metrics.values())
            noisy = short + plan.count_noise * float(drawer(self.config, server_round, WITHIN_CLIP)(1)[0])
            line["within_clip"] = noisy / plan.expected + 0.5
            clip = next_clip(clip, self.config.privacy, line["within_clip"])
        return Release({key: values.reshape(sent[key].shape) for key, values in average.items()}, line, clip)

    def keep(self, server_round: int, current: Mapping[str, Array], release: Release) -> None:
        """Keep and count a release, before anybody sees the model that is made of it."""
        if self.release is None:  # otherwise an earlier start has kept it
            self.ledger.keep(server_round, views(current), release)


class ClipBound(NormBound):
    """Find updates longer than the clipping norm. Clients clip, so only rounding may exceed it."""

    def __init__(self, central: Central) -> None:
        super().__init__(multiple=None, fix=TOO_LONG)
        self.central = central

    def limit(self, norms: Mapping[str, float]) -> float:
        """Return the limit of this round."""
        return self.central.clip * (1 + SLACK)


class PrivateRounds(FedAvg):
    """Train rounds with central privacy: random clients, clipped updates, and a noisy average of fixed divisor.

    It is combined with FedAvg or FedLoRA by `private`.
    """

    def __init__(self, *args: Any, central: Central, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.central, self.bound = central, ClipBound(central)

    def facts(self) -> dict[str, Any]:
        """Return the strategy's facts and the clipping norm."""
        return super().facts() | {"clipping_norm": self.central.clip}

    def restore(self, done: int, facts: dict[str, Any], state: dict[str, np.ndarray]) -> None:
        """Continue after `done` rounds, with the clipping norm of that moment."""
        super().restore(done, facts, state)
        self.central.clip = facts["clipping_norm"]

    def last_round(self) -> int:
        """Return the last round within the budget."""
        return self.central.last_round

    def draw(self, kind: str, server_round: int, fraction: float) -> list[str]:
        """Draw the clients of a training phase as the accountant assumes, and others as usual."""
        if kind == TRAIN:
            return self.central.draw(self.roster, server_round)
        return super().draw(kind, server_round, fraction)

    def instructions(self, kind: str, server_round: int) -> dict[str, Any]:
        """Name the length to which clients clip what they train."""
        clipping = {CLIPPING_NORM: self.central.clip} if kind == TRAIN else {}
        return super().instructions(kind, server_round) | clipping

    def is_summed(self, phase: Phase) -> bool:
        """Return True, because noise is added to the sum of updates."""
        return True

    def replies_needed(self, phase: Phase) -> int:
        """Return 0 for training if the run has clients at all: a round without replies is noise only.

        If it failed, it would tell who is absent.
        """
        return 0 if phase.kind == TRAIN and self.roster.members else super().replies_needed(phase)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new global model by the noisy average of a round, which an earlier start may have made."""
        self.observer.enter("aggregate")
        release, number = self.central.release, self.phase.server_round
        if release is None:
            phase = self._receive(replies)
            phase.fold(is_over=True)
            if phase.names and not phase.metrics:
                log(WARNING, "round %d: no client's update counts, so this round is noise only", number)
            loss = self._mean_loss(phase) if phase.metrics else None
            line = {"loss": loss, "client_seconds": seconds_by_client(phase), **self._log_line()}
            keys = self.shared.returns or tuple(self.current)
            release = self.central.make_release(number, self.current, keys, phase.total, phase.metrics, line)
        self.central.clip = release.next_clip
        average = {key: pack(values) for key, values in release.average.items()}
        arrays = as_record(dict(self.current.items()) | average)
        if self.server_optimizer:
            arrays = self.server_optimizer.step(self.current, arrays, number)
        self._check_aggregate(arrays)
        self.central.keep(number, self.current, release)
        self.observer.append(TRAIN, number, **release.line, epsilon=self.central.ledger.epsilon())
        return arrays, MetricRecord()


def private(kind: type[FedAvg]) -> type[PrivateRounds]:
    """Return a strategy class with central privacy; its constructor also takes `central`."""
    return type(f"Private{kind.__name__}", (PrivateRounds, kind), {})
