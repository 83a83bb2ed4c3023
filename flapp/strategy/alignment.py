"""Weights for an average by how far clients agree: pure maths in numpy."""

from collections.abc import Iterable, Sequence

import numpy as np

BLOCK = 1 << 14  # elements of each update in one step: ten float64 blocks stay in the cache
CANCELLED = 1e-12  # a mean update this short, against the updates themselves, is rounding noise without a direction


def alignment_weights(updates: Sequence[Iterable[np.ndarray]]) -> list[float]:
    """Return weights, summing to 1, proportional to max(0, cos(update_k, mean update)).

    An update is a client's finite tensors, trained minus received, in one order for all clients; the cosine is of all
    its numbers as one vector, in float64. Updates of zero get no weight. When the mean itself is zero (nobody moved, or
    all moves cancel) no client is aligned and all weigh the same.
    """
    count = len(updates)
    dots, squares = np.zeros(count), np.zeros(count)
    for tensors in zip(*updates, strict=True):
        flat = [tensor.reshape(-1) for tensor in tensors]
        for start in range(0, flat[0].size, BLOCK):
            block = np.array([values[start : start + BLOCK] for values in flat], np.float64)
            dots += block @ block.mean(axis=0)
            squares += np.einsum("ki,ki->k", block, block)
    if dots.sum() <= CANCELLED**2 * squares.sum():  # the sum of all dots is count times the mean's square
        return [1.0 / count] * count
    cosines = np.divide(dots, np.sqrt(squares), out=np.zeros(count), where=squares > 0)  # times the mean's length
    aligned = np.maximum(cosines, 0.0)
    return (aligned / aligned.sum()).tolist()
