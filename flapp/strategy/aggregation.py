"""Weighted averages of models as they travel: pure maths on ArrayRecords, whatever the order of replies.

Sums are taken in float64, block by block while a block stays in cache, and rounded once to the model's own dtype;
so equal float32 models average to themselves bit for bit. Arrays are read where they lie in the messages, never copied.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from flwr.app import Array, ArrayRecord

from flapp.messages import one_line, pack, view

LARGEST = 1.8e19  # beyond it a square overflows float32, and no optimiser gets any further
BLOCK = 1 << 17  # elements: two float64 blocks near the level-2 cache, in loops long enough for threads to pay
THREADS = 2  # numpy frees the GIL in its loops; memory bandwidth is used up by two


def find_fault(record: ArrayRecord, expected: Mapping[str, Array]) -> str | None:
    """Return what makes a model unfit to be averaged with `expected`, or None.

    Checked are keys, shapes and dtypes, and that every value is finite and at most LARGEST.
    """
    if record.keys() != expected.keys():
        odd = sorted(set(record) ^ set(expected))
        return f"has other tensors than the model ({len(odd)} differ, the first is {one_line(odd[0])})"
    for key, array in record.items():
        try:
            values = view(array)
        except ValueError as error:
            return f"sent {key} as {error}"
        wanted = view(expected[key])
        if values.shape != wanted.shape or values.dtype != wanted.dtype:
            found, asked = f"{values.dtype} {list(values.shape)}", f"{wanted.dtype} {list(wanted.shape)}"
            return f"sent {key} as {found}, the model has {asked}"
        if fault := find_value_fault(values):
            return f"sent {key} with {fault}"
    return None


def find_value_fault(values: np.ndarray) -> str | None:
    """Return what makes the values of one tensor unfit to train from, or None."""
    if values.dtype.kind != "f" or values.size == 0:
        return None
    highest, lowest = values.max(), values.min()  # both are NaN if any value is
    if max(highest, -lowest) <= LARGEST:
        return None
    if bad := values.size - np.count_nonzero(np.isfinite(values)):
        return f"{bad} NaN or infinite values of {values.size}"
    return f"values up to {max(highest, -lowest):.3g}, whose squares overflow float32"


def weighted_average(records: Sequence[ArrayRecord], weights: Sequence[float]) -> ArrayRecord:
    """Return sum_k w_k x_k / sum_k w_k of every tensor (McMahan et al. 2017, arXiv:1602.05629, algorithm 1).

    Give the records in an order of their own (by client id), never in the order of arrival. Dtypes stay: floats
    are rounded once from float64, integers to the nearest, booleans are taken from the largest weight.
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights, dtype=np.float64)
    by_size = sorted(records[0], key=lambda key: len(records[0][key].data))  # dealt in turn: equal work a thread
    with ThreadPoolExecutor(THREADS) as threads:
        parts = threads.map(lambda start: _average_each(records, by_size[start::THREADS], shares), range(THREADS))
        averaged = {key: array for part in parts for key, array in part.items()}
    return ArrayRecord({key: averaged[key] for key in records[0]})


def _average_each(records: Sequence[ArrayRecord], keys: list[str], shares: np.ndarray) -> dict[str, Array]:
    """Average tensor by tensor in one buffer, since touching fresh memory costs more than the sums."""
    largest = max((view(records[0][key]).nbytes for key in keys), default=0)
    buffer = np.empty(largest, np.uint8)
    return {key: _average([view(record[key]) for record in records], shares, buffer) for key in keys}


def _average(views: list[np.ndarray], shares: np.ndarray, buffer: np.ndarray) -> Array:
    first = views[0]
    if first.dtype == np.bool_:
        return pack(views[int(np.argmax(shares))])
    result = buffer[: first.nbytes].view(first.dtype)
    flat = [values.reshape(-1) for values in views]
    total, term = np.empty(BLOCK), np.empty(BLOCK)
    for start in range(0, result.size, BLOCK):
        part = slice(start, min(start + BLOCK, result.size))
        block, product = total[: part.stop - start], term[: part.stop - start]
        np.multiply(flat[0][part], shares[0], out=block)
        for values, share in zip(flat[1:], shares[1:], strict=True):
            np.copyto(product, values[part])  # a cast of its own is faster than one inside multiply
            np.multiply(product, share, out=product)
            np.add(block, product, out=block)
        result[part] = np.rint(block) if first.dtype.kind in "iu" else block
    return pack(result.reshape(first.shape))


def spread(values: Mapping[str, float]) -> dict[str, float]:
    """Return min, p10, median, p90 and max of one number a client (numpy's linear percentiles)."""
    names = ("min", "p10", "median", "p90", "max")
    if not values:
        return {}
    points = np.percentile(list(values.values()), [0, 10, 50, 90, 100])
    return dict(zip(names, map(float, points), strict=True))
