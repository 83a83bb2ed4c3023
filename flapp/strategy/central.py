"""Central differential privacy on the server: who is drawn, the noise on a sum, and what is made known of it."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array

from flapp.central import drawer, is_secure, next_clip
from flapp.config.load import derive_seed
from flapp.config.schema import Config
from flapp.messages import WITHIN_CLIP, view, views
from flapp.server.releases import CentralLedger, Release
from flapp.server.roster import Roster
from flapp.sums import WeightedSum, over_blocks

SLACK = 1e-4  # relative: more than the length of an update is ever measured too long


class ClipBound:
    """The longest update that counts, in place of a NormBound: clients clip, so only rounding may be beyond."""

    multiple, is_known, medians = None, True, ()

    def __init__(self, central: "Central") -> None:
        self.central = central

    def limit(self, norms: Mapping[str, float]) -> float:
        """Return the limit of this round."""
        return self.central.clip * (1 + SLACK)


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
        """Plan the rounds after the first `done`, which ended with the model `current`."""
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
