"""Local differential privacy: the Gaussian mechanism on each client's update, and the total privacy loss of many.

A client releases w + clip(u) + noise, where w is the model that it was sent and u is its update. Two neighbours are any
two updates of one client, whatever its data and however many samples they differ in. Both lie in a ball of radius
clipping_norm, so they are at most 2 * clipping_norm apart: that is the l2 sensitivity. (If a neighbour were a client
that sends no update at all, or zeros, the sensitivity would be clipping_norm. That would protect less, because the
server sees who takes part.)

The noise is the least that gives (epsilon, delta), by the analytic Gaussian mechanism (Balle and Wang 2018,
arXiv:1805.06530) of the package dp-accounting. T releases with a noise multiplier z are as private as one with
z / sqrt(T) (Dong, Roth and Su 2019, arXiv:1905.02383). Drawing clients at random does not lower epsilon here: the
server knows whom it has asked.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import hypot, isfinite, sqrt
from types import ModuleType

import numpy as np

from flapp.config.schema import ConfigError, PrivacyConfig

UNPROTECTED = (
    "numbers of samples, label histograms, shard digests, training losses, durations, evaluation results and the texts "
    "of errors"
)


def find_sigma(settings: PrivacyConfig) -> float:
    """Return the standard deviation of the noise on an update; raises ConfigError without dp-accounting."""
    return 2 * settings.clipping_norm * _noise_multiplier(settings.epsilon, settings.delta)


@lru_cache(maxsize=64)
def total_epsilon(settings: PrivacyConfig, releases: int) -> float:
    """Return the epsilon, at settings.delta, of so many releases of a client; raises ConfigError as find_sigma does."""
    if releases == 0:
        return 0.0
    multiplier = _noise_multiplier(settings.epsilon, settings.delta) / sqrt(releases)
    return float(dp_accounting("local").gaussian_mechanism.get_epsilon_gaussian(multiplier, settings.delta))


def describe_plan(settings: PrivacyConfig, num_rounds: int) -> str:
    """Return in one line what the settings promise for one round and for all; raises ConfigError as find_sigma does."""
    total = total_epsilon(settings, num_rounds)
    return (
        f"local differential privacy: updates are clipped to length {settings.clipping_norm:g}, noise has standard "
        f"deviation {find_sigma(settings):.4g}; epsilon is {settings.epsilon:g} for one round and {total:.4g} for a "
        f"client that trains in all {num_rounds} rounds (delta {settings.delta:g})"
    )


def perturb(
    sent: Mapping[str, np.ndarray], trained: Mapping[str, np.ndarray], clipping_norm: float, sigma: float
) -> dict[str, np.ndarray]:
    """Return the tensors of `sent` plus the update to `trained`, clipped, plus noise N(0, sigma^2) on every number.

    The update is clipped as one vector over all tensors, computed in float64 and rounded once at the end. The noise is
    drawn from numpy's generator, seeded by the operating system and not by the run. Raises ValueError when the tensors
    do not match or one is not of floating point, and FloatingPointError when the update is not finite.
    """
    if sent.keys() != trained.keys():
        raise ValueError(f"only one of the sent and the trained model has {min(sent.keys() ^ trained.keys())}")
    check_floating(trained)
    norm = hypot(*(float(np.linalg.norm(_update(sent[key], trained[key]).ravel())) for key in trained))
    if not isfinite(norm):
        raise FloatingPointError("the update is not finite, so it cannot be clipped: lower train.lr")
    scale = min(1.0, clipping_norm / norm) if norm else 1.0
    generator = np.random.default_rng()
    return {
        key: (sent[key] + scale * _update(sent[key], after) + generator.normal(0.0, sigma, after.shape)).astype(
            after.dtype
        )
        for key, after in trained.items()
    }


def check_floating(tensors: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError when a tensor is not of floating point, so that noise cannot be added."""
    if odd := [key for key, values in tensors.items() if values.dtype.kind != "f"]:
        raise ValueError(
            f"privacy cannot add noise to {odd[0]}, which is of {tensors[odd[0]].dtype}: "
            "choose a model whose tensors are all of floating point"
        )


def _update(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return np.subtract(after, before, dtype=np.float64)


@lru_cache(maxsize=8)
def _noise_multiplier(epsilon: float, delta: float) -> float:
    """Return sigma / sensitivity of the analytic Gaussian mechanism."""
    return float(dp_accounting("local").gaussian_mechanism.get_sigma_gaussian(epsilon, delta))


def dp_accounting(kind: str) -> ModuleType:
    """Return the package dp-accounting; raises ConfigError, for privacy=`kind`, where it is not installed."""
    try:
        import dp_accounting  # imports SciPy, which is slow
    except ImportError as error:
        raise ConfigError(
            f"privacy={kind} needs the package dp-accounting{' on the server' if kind == 'central' else ''} ({error}): "
            'pip install -e ".[privacy]", or set privacy=none'
        ) from error
    return dp_accounting
