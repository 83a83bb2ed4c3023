"""Compute the weights of clients and the totals of their metrics: pure maths in numpy."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any

import numpy as np

from flapp.checks import RAISE_LIMIT
from flapp.messages import SUMS

REMEMBERED = 2  # rounds: rolora trains another factor in every second one
BLOCK = 1 << 14  # elements of each update in one step: ten float64 blocks stay in the cache
CANCELLED = 1e-12  # a mean update this short, relative to the updates, is rounding noise without a direction


@dataclass
class NormBound:
    """Find the updates that are too long to be accepted.

    Each round has a median length of the updates that it accepted. The limit of the next round is `multiple` times the
    larger median of the two rounds before it. The limit of a run's first round comes from its own median. For an even
    number of updates the lower median is used, so that half of the clients cannot raise it. multiple=None turns the
    bound off. fix: what to do about a longer update.
    """

    multiple: float | None
    medians: list[float] = field(default_factory=list)  # of the last rounds, oldest first
    fix: str = RAISE_LIMIT

    @property
    def is_known(self) -> bool:
        """Say whether the limit of the next round is known before its updates arrive."""
        return self.multiple is None or bool(self.medians)

    def limit(self, norms: Mapping[str, float]) -> float:
        """Return the length up to which updates are accepted in a round with these lengths."""
        medians = self.medians or [median_low(norms.values() or [0.0])]
        return self.multiple * max(medians) if self.multiple is not None and max(medians) > 0 else math.inf

    def accept(self, norms: Mapping[str, float]) -> None:
        """Remember the median length of the updates that a round has accepted."""
        self.medians = [*self.medians, median_low(norms.values())][-REMEMBERED:]


def cap_shares(weights: Sequence[float], most: float | None) -> list[float]:
    """Return the weights with the largest lowered until none is more than the share `most` of their sum.

    Weights that respect the bound come back unchanged, and so do weights too few for it (two cannot both stay below
    a half). If only weights of zero are left beside the largest ones, all clients weigh the same. None means no bound.
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


def alignment_weights(updates: Sequence[Iterable[np.ndarray]], norms: Sequence[float]) -> list[float]:
    """Return weights, summing to 1, proportional to max(0, cos(update_k, mean update)).

    An update is a client's floating tensors, trained minus received, in one order for all clients; norms: the updates'
    lengths. The cosine is of all numbers as one vector, in float64. Updates longer than the median length count
    in the mean as if they had that length, so that one long update cannot set the direction. Updates of zero get no
    weight. When the mean itself is zero (nobody moved, or all moves cancel), all clients weigh the same.
    """
    count, usual = len(updates), median_low([norm for norm in norms if norm > 0] or [0.0])
    scales = np.array([min(1.0, usual / norm) if norm > 0 else 1.0 for norm in norms])
    dots, squares, length = np.zeros(count), np.zeros(count), 0.0
    for tensors in zip(*updates, strict=True):
        flat = [tensor.reshape(-1) for tensor in tensors]
        for start in range(0, flat[0].size, BLOCK):
            block = np.array([values[start : start + BLOCK] for values in flat], np.float64)
            mean = scales @ block / count
            dots += block @ mean
            length += float(mean @ mean)
            squares += np.einsum("ki,ki->k", block, block)
    if length * count <= CANCELLED**2 * (scales**2 @ squares):
        return [1.0 / count] * count
    cosines = np.divide(dots, np.sqrt(squares), out=np.zeros(count), where=squares > 0)  # times the mean's length
    aligned = np.maximum(cosines, 0.0)
    return (aligned / aligned.sum()).tolist()


def totals(
    metrics: Mapping[str, Mapping[str, float]], held: Mapping[str, int], weights: Mapping[str, float], prefix: str
) -> dict[str, Any]:
    """Sum one kind of evaluation over clients.

    Accuracy is None for regression; loss and accuracy are None if no client sent this kind. held: the samples of each
    client; weights: the samples that it counts for, which are fewer if they are capped.
    """
    out = prefix.replace("-", "_")
    measured = {name: m for name, m in metrics.items() if f"{prefix}loss-sum" in m}
    count = sum(weights[name] for name in measured)
    if not count:
        return {f"{out}loss": None, f"{out}accuracy": None}

    def total(key: str) -> float:
        return sum(m[key] * (weights[name] / held[name]) for name, m in measured.items() if key in m)

    losses = {n: m[f"{prefix}loss-sum"] / held[n] for n, m in measured.items()}
    result: dict[str, Any] = {f"{out}accuracy": None, f"{out}loss": total(f"{prefix}loss-sum") / count}
    result[f"{out}loss_spread"] = spread(losses)
    each = {n: m[f"{prefix}correct"] / held[n] for n, m in measured.items() if f"{prefix}correct" in m}
    if each:
        result[f"{out}accuracy"] = total(f"{prefix}correct") / count
        result |= {f"{out}accuracy_spread": spread(each), f"{out}accuracy_by_client": each}
    if sums := _add_sums(measured, held, weights, prefix + SUMS):
        result[f"{out}sums"] = sums
    return result


def _add_sums(
    metrics: Mapping[str, Mapping[str, float]], held: Mapping[str, int], weights: Mapping[str, float], start: str
) -> dict[str, float]:
    """Add up the user's own sums by name, in the order of clients; a name counts if half of the clients sent it."""
    found: dict[str, float] = {}
    senders = Counter[str]()
    for name, own in metrics.items():
        for key, value in own.items():
            if key.startswith(start):
                senders[key] += 1
                found[key] = found.get(key, 0.0) + value * (weights[name] / held[name])
    return {key.removeprefix(start): found[key] for key in sorted(found) if 2 * senders[key] >= len(metrics)}


def spread(values: Mapping[str, float]) -> dict[str, float]:
    """Return min, p10, median, p90 and max of one number a client (numpy's linear percentiles)."""
    if not values:
        return {}
    points = np.percentile(list(values.values()), [0, 10, 50, 90, 100])
    return dict(zip(("min", "p10", "median", "p90", "max"), map(float, points), strict=True))
