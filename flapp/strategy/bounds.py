"""Bounds on what one client can do to a round: the length of its update, and its share of an average."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

import numpy as np

BLOCK = 1 << 17  # elements: a float64 block near the level-2 cache
REMEMBERED = 2  # rounds: rolora trains another factor in every second one


def update_norm(tensors: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the Euclidean length of an update, given as pairs (trained, received) of tensors, in float64."""
    squares, buffer = 0.0, np.empty(BLOCK)
    for trained, received in tensors:
        after, before = trained.reshape(-1), received.reshape(-1)
        for start in range(0, after.size, BLOCK):
            part = slice(start, start + BLOCK)
            block = buffer[: after[part].size]
            np.subtract(after[part], before[part], out=block, dtype=np.float64)
            squares += float(np.einsum("i,i->", block, block))
    return squares**0.5


@dataclass
class NormBound:
    """Find the updates that are too long to count.

    The limit of a round is `multiple` times the median length of the updates that the two rounds before it accepted,
    whichever is larger. The first round of a run is measured by its own median. Of an even number the lower median
    counts, so that half of the clients cannot raise it. multiple=None turns the bound off.
    """

    multiple: float | None
    medians: list[float] = field(default_factory=list)  # of the last rounds, oldest first

    def limit(self, norms: Mapping[str, float]) -> float | None:
        """Return the longest update that counts in a round with these update lengths; None for no limit."""
        medians = self.medians or ([median_low(norms.values())] if norms else [])
        typical = max(medians, default=0.0)
        return self.multiple * typical if self.multiple is not None and typical > 0 else None

    def faults(self, norms: Mapping[str, float]) -> dict[str, str]:
        """Return why clients are left out of a round, by client, given the length of each update."""
        limit = self.limit(norms)
        if limit is None:
            return {}
        most = f"the limit is {limit:.3g} ({self.multiple:g} times the median)"
        fix = "if its data explain this, raise strategy.norm_limit"
        return {n: f"sent an update of length {norm:.3g}, {most}: {fix}" for n, norm in norms.items() if norm > limit}

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
