"""Central differential privacy: clipped updates, Gaussian noise on their sum, and how much privacy a run has spent.

Two neighbours are two federations that differ in one client, which is there or not (add or remove one). In a round,
every client takes part with probability q = strategy.fraction_train, independently of the others (Poisson sampling).
A client adds a vector of length C or less to the sum of the updates, or nothing, so the l2 sensitivity is C. The server
adds noise of standard deviation z C to the sum. It divides by q times the number of clients, a number that does not
depend on who takes part. dp-accounting composes the rounds: PoissonSampledDpEvent(q, GaussianDpEvent(z)).

With adaptive clipping (Andrew et al. 2021, arXiv:1905.03871, algorithm 1), each client also says whether its update was
at most C long. 1/2 is subtracted from each bit, so their sum has a sensitivity of 1/2. It gets noise of standard
deviation s. The noise on the updates is raised to z_delta C, so that both together cost as much as z alone:
z_delta = (z^-2 - (2 s)^-2)^(-1/2).

z is rounded up to four digits after the point. A Gaussian number of 53 random bits is never beyond 8.57 standard
deviations. This adds less than 1e-16 to delta for each tensor element and round, which is not counted.
"""

import logging
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from flapp.config.load import derive_seed
from flapp.config.schema import Config, ConfigError, PrivacyConfig
from flapp.privacy import dp_accounting

STEPS = 10_000  # z is a multiple of 1 / STEPS
LEAST_COUNT_NOISE = 1 / 20  # of the expected number of clients, as Andrew et al. recommend
SHORTEST_CLIP, LONGEST_CLIP = 1e-9, 1e9  # adaptive clipping stays between them
Draw = Callable[[int], np.ndarray]  # count: so many independent standard normal numbers, float64


@dataclass(frozen=True)
class Plan:
    """The noise of every round of a run.

    multiplier: z, of all that a round releases; update_multiplier: of the sum of updates alone; count_noise: standard
    deviation of the noise on the count, 0 without one; sampling: q; expected: the clients of a round on average.
    """

    multiplier: float
    update_multiplier: float
    count_noise: float
    sampling: float
    expected: float


def plan_of(config: Config, z: float | None = None) -> Plan:
    """Return the noise that the settings ask for; z: the multiplier that the run has begun with, if it has.

    Raises ConfigError if they cannot be met, or if dp-accounting is not installed.
    """
    privacy, sampling = config.privacy, config.strategy.fraction_train
    expected = sampling * config.clients
    z = z or privacy.noise_multiplier
    if z is None:
        z = _least_multiplier(privacy.epsilon, privacy.delta, privacy.accountant, sampling, config.num_rounds)
    if privacy.clipping == "fixed":
        return Plan(z, z, 0.0, sampling, expected)
    count_noise = privacy.count_noise or max(LEAST_COUNT_NOISE * expected, z)
    if 2 * count_noise <= z:
        raise ConfigError(
            f"privacy.count_noise={count_noise:g} alone spends more than the noise multiplier {z:g} allows: raise it "
            f"above {z / 2:g}, or set it to null"
        )
    return Plan(z, (z**-2 - (2 * count_noise) ** -2) ** -0.5, count_noise, sampling, expected)


@lru_cache(maxsize=4096)
def epsilon_of(z: float, sampling: float, rounds: int, delta: float, accountant: str) -> float:
    """Return the epsilon, at delta, of so many rounds; raises ConfigError without dp-accounting."""
    if rounds == 0:
        return 0.0
    with _quiet():
        return float(_accountant(accountant)().compose(_event(z, sampling), rounds).get_epsilon(delta))


def spent(settings: PrivacyConfig, plan: Plan, rounds: int) -> float:
    """Return the epsilon that so many rounds of a run spend."""
    return epsilon_of(plan.multiplier, plan.sampling, rounds, settings.delta, settings.accountant)


def affordable(settings: PrivacyConfig, plan: Plan, most: int) -> int:
    """Return how many rounds the budget privacy.epsilon is enough for, at most `most`."""
    if spent(settings, plan, most) <= settings.epsilon:
        return most  # the common case is checked first: a search takes several times as long
    return bisect_right(range(most), settings.epsilon, key=lambda n: spent(settings, plan, n + 1))


def describe_central(config: Config) -> str:
    """Return in one line what the settings promise; raises ConfigError as plan_of does."""
    privacy, plan = config.privacy, plan_of(config)
    rounds = affordable(privacy, plan, config.num_rounds)
    if rounds == 0:
        raise ConfigError(
            f"privacy.noise_multiplier={plan.multiplier:g} spends epsilon {spent(privacy, plan, 1):.4g} in one round, "
            f"privacy.epsilon={privacy.epsilon:g} is the budget: raise either"
        )
    total = spent(privacy, plan, rounds)
    drawn = f"each client takes part with probability {plan.sampling:g}" if plan.sampling < 1 else "all clients train"
    early = f" (the budget ends before num_rounds={config.num_rounds})" if rounds < config.num_rounds else ""
    return (
        f"central differential privacy: updates are clipped to length {privacy.clipping_norm:g}, noise on their sum "
        f"has {plan.update_multiplier:.4g} times that as standard deviation, {drawn}; epsilon is {total:.4g} after "
        f"{rounds} rounds{early} (delta {privacy.delta:g}, {privacy.accountant})"
    )


def next_clip(clip: float, settings: PrivacyConfig, within: float) -> float:
    """Return the clipping norm after a round in which (with noise) the share `within` of the updates was shorter."""
    exponent = math.log(clip) - settings.clipping_lr * (within - settings.quantile)
    return math.exp(min(max(exponent, math.log(SHORTEST_CLIP)), math.log(LONGEST_CLIP)))


def is_secure(config: Config) -> bool:
    """Return whether noise, and the clients of a round, are drawn from the system's secure generator."""
    return config.privacy.noise != "seeded"


def drawer(config: Config, *where: int | str) -> Draw:
    """Return the function that draws standard normal numbers, by privacy.noise; `where` selects a seeded stream."""
    if is_secure(config):
        return secure_normals
    return np.random.default_rng(derive_seed(config.seed, "noise", *where)).standard_normal


def secure_normals(count: int) -> np.ndarray:
    """Draw independent standard normal numbers by the method of Box and Muller from the system's secure generator."""
    pairs = (count + 1) // 2
    bits = np.frombuffer(os.urandom(16 * pairs), np.uint64) >> np.uint64(11)
    uniform = bits * 2.0**-53  # 0 is possible, 1 is not
    radius, angle = np.sqrt(-2.0 * np.log1p(-uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


@lru_cache(maxsize=64)
def _least_multiplier(epsilon: float, delta: float, accountant: str, sampling: float, rounds: int) -> float:
    """Return the least z, a multiple of 1 / STEPS, with which so many rounds stay within the budget."""
    package = dp_accounting("central")

    def search(kind: str, low: float, high: float) -> float:
        bracket = package.LowerEndpointAndGuess(low, high)
        return float(
            package.calibrate_dp_mechanism(
                _accountant(kind),
                lambda z: package.SelfComposedDpEvent(_event(z, sampling), rounds),
                epsilon,
                delta,
                bracket_interval=bracket,
                tol=0.5 / STEPS,
            )
        )

    try:
        with _quiet():
            z = search("rdp", 0.1, 1.0)
            z = search("pld", z / 2, z) if accountant == "pld" else z
    except package.mechanism_calibration.NoBracketIntervalFoundError as error:
        raise ConfigError(
            f"privacy.epsilon={epsilon:g} needs a noise multiplier below 0.1 or above 1e8: choose another, or set "
            "privacy.noise_multiplier"
        ) from error
    return math.ceil(z * STEPS) / STEPS


def _event(z: float, sampling: float) -> Any:
    package = dp_accounting("central")
    event = package.GaussianDpEvent(z)
    return package.PoissonSampledDpEvent(sampling, event) if sampling < 1 else event


def _accountant(kind: str) -> Callable[[], Any]:
    """Return the class of an accountant; both take neighbours to differ by one client that is there or not."""
    package = dp_accounting("central")
    return package.pld.PLDAccountant if kind == "pld" else package.rdp.RdpAccountant


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence dp-accounting's warnings about Rényi orders that it skips: epsilon is still an upper bound.

    If the root logger had no handler, such a warning would also make absl print the lines of every logger.
    """
    logger, handler = logging.getLogger("absl"), logging.NullHandler()
    before = logger.level
    logger.setLevel(logging.ERROR)
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        logger.setLevel(before)
