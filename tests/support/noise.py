"""Checks of the noise of differential privacy."""

from collections.abc import Sequence

import numpy as np
import pytest

SHAPES = {"a": (20_000,), "b": (100, 200), "c": (20, 10, 100)}  # 20,000 numbers each
START = {key: np.full(shape, start, np.float32) for start, (key, shape) in enumerate(SHAPES.items())}


def length(tensors: Sequence[np.ndarray]) -> float:
    """Return the length of tensors as one vector, in float64."""
    return float(np.sqrt(sum((np.asarray(each, np.float64) ** 2).sum() for each in tensors)))


def check_noise(draws: Sequence[dict[str, np.ndarray]], start: dict[str, np.ndarray], sigma: float) -> None:
    """Check that each draw is `start`, whose tensors have 20,000 numbers each, plus independent N(0, sigma^2)."""
    for drawn in draws:
        assert {key: (values.dtype, values.shape) for key, values in drawn.items()} == {
            key: (values.dtype, values.shape) for key, values in start.items()
        }
    noise = np.stack([(drawn[key].astype(np.float64) - start[key]).ravel() for drawn in draws for key in start])
    # Of a variance from n numbers, the standard deviation is sqrt(2 / n) = 1 % here: 5 of them.
    assert noise.var(axis=1) == pytest.approx(np.full(len(noise), sigma**2), rel=0.05)
    assert noise.mean(axis=1) == pytest.approx(np.zeros(len(noise)), abs=5 * sigma / np.sqrt(noise.shape[1]))
    assert ((noise / sigma) ** 4).mean() == pytest.approx(3.0, rel=0.1)
    assert np.abs(np.corrcoef(noise) - np.eye(len(noise))).max() < 0.04  # no tensor has another's noise
    assert len(np.unique(noise[0])) > 0.9 * noise.shape[1]  # nor a number another's, but for rounding
