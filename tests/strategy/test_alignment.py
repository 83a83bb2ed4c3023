"""Weights by alignment against cosines of whole vectors."""

import numpy as np
import pytest

from flapp.strategy.alignment import BLOCK
from flapp.strategy.alignment import alignment_weights as weights_by_norm


def updates(count: int, offset: float) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(count)
    shapes: list[tuple[int, ...]] = [(BLOCK + 5, 2), (3,), (), (0, 4)]
    return [[np.asarray(rng.normal(offset, size=shape), np.float32) for shape in shapes] for _ in range(count)]


def alignment_weights(given: list[list[np.ndarray]]) -> list[float]:
    """Return the weights of updates, with their lengths taken by numpy."""
    return weights_by_norm(given, [float(np.linalg.norm(flatten(update))) for update in given])


def flatten(update: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([tensor.ravel() for tensor in update]).astype(np.float64)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_weights_follow_the_cosine_with_the_mean_update(offset: float) -> None:
    given = updates(6, offset)
    given[2] = [-3 * tensor for tensor in given[3]]  # pulls the other way
    flat = np.array([flatten(update) for update in given])
    norms = np.linalg.norm(flat, axis=1)
    mean = (flat * np.minimum(1, np.sort(norms)[2] / norms)[:, None]).mean(axis=0)
    cosines = np.maximum(0, flat @ mean / np.linalg.norm(flat, axis=1) / np.linalg.norm(mean))
    np.testing.assert_allclose(alignment_weights(given), cosines / cosines.sum(), rtol=1e-9)
    assert 0.0 in alignment_weights(given)


def test_only_lengths_up_to_the_median_count_in_the_mean() -> None:
    x, y = np.array([1.0, 0.0], np.float32), np.array([0.0, 1.0], np.float32)
    assert alignment_weights([[x], [y]]) == pytest.approx([0.5, 0.5])
    assert alignment_weights([[3 * x], [4 * y]]) == pytest.approx([0.5, 0.5])
    assert alignment_weights([[x], [3 * x], [4 * y]]) == pytest.approx([4 / 11, 4 / 11, 3 / 11])


def test_one_long_update_against_nine_others_gets_no_weight() -> None:
    rng = np.random.default_rng(1)
    honest = [[np.asarray(1 + rng.normal(size=100), np.float32)] for _ in range(9)]
    weights = alignment_weights([*honest, [-100 * honest[0][0]]])
    assert weights[-1] == 0.0
    assert min(weights[:-1]) > 0.05


def test_a_client_that_did_not_move_gets_no_weight() -> None:
    x = np.array([1.0, 2.0], np.float32)
    assert alignment_weights([[x], [0 * x], [x]]) == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("factors", [(0.0, 0.0, 0.0), (1.0, -1.0, 0.0), (0.1 + 0.2, -0.3, 0.0)])
def test_updates_that_cancel_weigh_the_same(factors: tuple[float, ...]) -> None:
    x = np.random.default_rng(0).normal(size=1000)
    assert alignment_weights([[factor * x] for factor in factors]) == [1 / 3] * 3


def test_the_smallest_float32_updates_still_have_a_direction() -> None:
    x = np.full(10, 1e-44, np.float32)
    assert alignment_weights([[x], [-x], [x]]) == [0.5, 0.0, 0.5]
