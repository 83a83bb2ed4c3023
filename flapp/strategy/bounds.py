"""Bounds on what one client can do to a round: the length of its update, and its share of an average."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

from flapp.checks import find_norm_fault

REMEMBERED = 2  # rounds: rolora trains another factor in every second one


@dataclass
class NormBound:
    """Find the updates that are too long to count.

    The limit of a round is `multiple` times the median length of the updates that the two rounds before it accepted,
    whichever is larger. The first round of a run is measured by its own median. Of an even number the lower median
    counts, so that half of the clients cannot raise it. multiple=None turns the bound off.
    """

    multiple: float | None
    medians: list[float] = field(default_factory=list)  # of the last rounds, oldest first

    def known_limit(self) -> float | None:
        """Return the longest update that counts in the next round; None where the round's own median decides it."""
        if self.multiple is None:
            return math.inf
        return self._of_median(max(self.medians)) if self.medians else None

    def limit(self, norms: Mapping[str, float]) -> float:
        """Return the longest update that counts in a round with these update lengths."""
        known = self.known_limit()
        if known is not None:
            return known
        return self._of_median(median_low(norms.values())) if norms else math.inf

    def _of_median(self, typical: float) -> float:
        return self.multiple * typical if self.multiple is not None and typical > 0 else math.inf

    def faults(self, norms: Mapping[str, float], limit: float) -> dict[str, str]:
        """Return why clients are left out of a round, by client, given the length of each update."""
        found = {name: find_norm_fault(norm, limit, self.multiple) for name, norm in norms.items()}
        return {name: fault for name, fault in found.items() if fault}

    def accept(self, norms: Mapping[str, float]) -> None:
        """Remember the updates that a round has accepted."""
        self.medians = [*self.medians, median_low(norms.values())][-REMEMBERED:]


def cap_shares(weights: Sequence[float], most: float | None) -> list[float]:
    """Return the weights with the largest lowered until none is more than the share `most` of their sum.

    Weights that respect the bound come back unchanged, and so do weights too few for it (two cannot both stay below
    a half). If only weights of zero are left beside the largest ones, all clients weigh the same. None is no bound.
    """
    if most is None or len(weights) * most <= 1 or max(weights) <= most * sum(weights):
        return list(weights)
    ordered = sorted(weights, reverse=True)
    for capped in range(1, len(ordered)):
        rest = sum(ordered[capped:])
        if rest == 0 or most * capped >= 1:
            break
        highest = most * rest / (1 - most * capped)
        if ordered[capped] <= highest:
            return [min(weight, highest) for weight in weights]
    return [1.0] * len(weights)
