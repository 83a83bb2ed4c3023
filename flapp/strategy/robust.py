"""Averages that survive bad clients: pure maths in numpy on the clients' models, sorted by id.

    norm_bound     updates longer than clip_multiple times the round's median norm are clipped to it, then averaged
    median         the median of every number (Yin et al. 2018, arXiv:1803.01498)
    trimmed_mean   the mean of every number without the f smallest and the f largest values (same paper)
    krum           the model with the least score: the sum of its squared distances from its n - f - 2 nearest models
                   (Blanchard et al. 2017, arXiv:1703.02757)
    multi_krum     the weighted average of the `selected` models with the least scores

f is strategy.malicious, n the number of models. norm_bound is flapp.sums.clip_update before the usual average.

Flower 1.41 has the same maths for all but norm_bound, and the tests compare with it. Its functions are not called. Its
trim_mean and its median turn integer tensors into float64. Its trim_mean adds up in the tensors' own dtype and in the
order in which np.partition leaves the values, which depends on the processor. Its select_multikrum takes distances
from products of whole models in float32, whose rounding is larger than the distances of similar models, and it counts
integer tensors in them.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord

from flapp.config.schema import StrategyConfig
from flapp.messages import as_record, pack, view
from flapp.strategy.aggregation import cap_shares
from flapp.sums import weighted_average

PER_CLIENT = ("median", "trimmed_mean", "krum", "multi_krum")  # they need each client's tensors
NUMBERS = 1 << 18  # in one step, of all clients: two float64 blocks are about as large as the level-2 cache


def robust_average(
    settings: StrategyConfig,
    trained: Mapping[str, ArrayRecord],
    sent: Mapping[str, Array],
    weights: Mapping[str, float],
) -> tuple[ArrayRecord, list[str]]:
    """Return the average by settings.robust, one of PER_CLIENT, and the clients that Krum has left out.

    trained: by client, sorted; sent: the tensors that all of them began with; weights: used by multi_krum only.
    """
    records, bad = list(trained.values()), settings.malicious or 0
    if settings.robust == "median":
        return median(records), []
    if settings.robust == "trimmed_mean":
        return trimmed_mean(records, bad), []
    count = 1 if settings.robust == "krum" else settings.selected or len(records) - bad - 2
    kept = [list(trained)[index] for index in select(krum_scores(records, sent, bad), count)]
    shares = cap_shares([weights[name] for name in kept], settings.max_weight_share)
    return weighted_average([trained[name] for name in kept], shares), [name for name in trained if name not in kept]


def trimmed_mean(records: Sequence[Mapping[str, Array]], cut: int) -> ArrayRecord:
    """Return the mean of every number without the `cut` smallest and largest values, in the dtypes of the records.

    The values are added up in float64, from the smallest to the largest, and rounded once. Integers and booleans take
    the lower median, which is exactly what one of the clients sent.
    """
    return as_record({key: pack(_trim([view(record[key]) for record in records], cut)) for key in records[0]})


def median(records: Sequence[Mapping[str, Array]]) -> ArrayRecord:
    """Return the median of every number: the mean of the two in the middle where the number of records is even."""
    return trimmed_mean(records, (len(records) - 1) // 2)


def krum_scores(records: Sequence[Mapping[str, Array]], sent: Mapping[str, Array], malicious: int) -> np.ndarray:
    """Return Krum's score of each model, float64 (records,): small for one that is near n - malicious - 2 others.

    sent: the model that all clients began with. Distances are of all floating tensors as one vector, from their
    changes, in float64. Distances from a model with huge values are inexact; the others stay exact.
    """
    products = np.zeros((len(records), len(records)))
    for key, array in sent.items():
        if view(array).dtype.kind == "f":
            before = view(array).reshape(-1)
            for part, block in _blocks([view(record[key]) for record in records]):
                block -= before[part]
                products += block @ block.T
    squares = np.diag(products)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0)
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, : len(records) - malicious - 2].sum(axis=1)


def select(scores: np.ndarray, count: int) -> list[int]:
    """Return the indices of the models with the least scores, in ascending order; the first of equal scores wins."""
    return sorted(np.argsort(scores, kind="stable")[:count].tolist())


def _trim(values: Sequence[np.ndarray], cut: int) -> np.ndarray:
    first, middle = values[0], (len(values) - 1) // 2
    result = np.empty(first.size, first.dtype)
    if first.dtype.kind != "f":
        result[:] = np.sort([each.reshape(-1) for each in values], axis=0)[middle]
        return result.reshape(first.shape)
    for part, block in _blocks(values):
        block.sort(axis=0)
        result[part] = block[cut : len(values) - cut].mean(axis=0)
    return result.reshape(first.shape)


def _blocks(values: Sequence[np.ndarray]) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield pieces of tensors of one shape, and the numbers in them as float64 (tensors, numbers)."""
    flat = [each.reshape(-1) for each in values]
    step = max(1, NUMBERS // len(flat))
    for start in range(0, flat[0].size, step):
        part = slice(start, start + step)
        yield part, np.array([each[part] for each in flat], np.float64)
