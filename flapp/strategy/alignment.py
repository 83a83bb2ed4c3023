"""Weights for an average by how far clients agree: pure maths in numpy."""

from collections.abc import Iterable, Sequence
from statistics import median_low

import numpy as np

BLOCK = 1 << 14  # elements of each update in one step: ten float64 blocks stay in the cache
CANCELLED = 1e-12  # a mean update this short, against the updates themselves, is rounding noise without a direction


def alignment_weights(updates: Sequence[Iterable[np.ndarray]], norms: Sequence[float]) -> list[float]:
    """Return weights, summing to 1, proportional to max(0, cos(update_k, mean update)).

    An update is a client's finite tensors, trained minus received, in one order for all clients; norms are the lengths
    of the updates. The cosine is of all its numbers as one vector, in float64. Updates longer than the median length
    count in the mean as if they had that length, so that one long update cannot set the direction. Updates of zero get
    no weight. When the mean itself is zero (nobody moved, or all moves cancel), all clients weigh the same.
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
