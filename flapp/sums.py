"""Weighted sums of models as they travel, in float64 and in a fixed order: pure maths on Arrays.

A round's average is  sum over groups in order ( sum over the group's clients in order ( weight x tensor ) ) / total
weight, rounded once to the tensor's own dtype. A client's node and the server get the same bits for the same part of
it. Arrays are read where they lie in the messages, never copied.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord

from flapp.messages import HeldArray, as_record, pack, view, views

BLOCK = 1 << 17  # elements: two float64 blocks about fill the level-2 cache, and are large enough for threads to pay
THREADS = 2  # numpy frees the GIL in its loops; memory bandwidth is used up by two
WORTH_THREADS = 1 << 20  # elements: fewer are added faster in one thread
UNMOVED = 2.0**-44  # relative: the float64 mean of equal integers is this close to them, however large they are

MARGIN = 1e-5  # relative: the error of a length is below it, because sums of ROW float32 squares have less
ROW = 128  # elements

Weighted = tuple[Mapping[str, Array], float]
Tensors = Mapping[str, np.ndarray]
T = TypeVar("T")


class WeightedSum:
    """Add up weighted models, group by group, in float64."""

    def __init__(self) -> None:
        self._totals: dict[str, np.ndarray] = {}

    @property
    def arrays(self) -> dict[str, Array]:
        """Return the sum so far, not copied; empty before the first group."""
        return {key: HeldArray(total) for key, total in self._totals.items()}

    def add(self, *groups: Sequence[Weighted]) -> None:
        """Add the weighted sum of each group, in the order given. A group is its clients' models with their weights.

        A sum that a node has computed is a group of one with weight 1.
        """
        if is_new := not self._totals:
            self._totals = {key: np.empty(array.shape) for key, array in groups[0][0][0].items()}
        flat = {key: [_flat(key, group) for group in groups] for key in self._totals}

        def add_block(key: str, part: slice) -> None:
            block, rest = self._totals[key].reshape(-1)[part], flat[key]
            if is_new:
                _sum_group(rest[0], part, block)
                rest = rest[1:]
            for group in rest:
                np.add(block, _sum_group(group, part, np.empty(block.size)), out=block)

        over_blocks({key: total.size for key, total in self._totals.items()}, add_block)

    def mean(self, weight: float, like: Mapping[str, Array]) -> ArrayRecord:
        """Return the sum divided by the total weight, in the dtypes of `like`, and free the sum.

        Integers are rounded to the nearest, and stay as in `like` where no client has moved them; booleans become true
        where clients with more than half of the weight have true.
        """
        found = ArrayRecord()
        for key in list(self._totals):  # one after another, so that each sum is freed before the next mean is made
            total, before = self._totals.pop(key).reshape(-1), view(like[key])
            flat, mean = before.reshape(-1), np.empty(before.size, before.dtype)
            for part in _blocks(mean.size):
                mean[part] = _divided(total[part], weight, flat[part])
            found[key] = pack(mean.reshape(before.shape))
        return found

    def unrounded_mean(self, weight: float, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the means of some tensors in float64."""
        return {key: self._totals[key] / weight for key in keys}


def weighted_average(records: Sequence[ArrayRecord], weights: Sequence[float]) -> ArrayRecord:
    """Return sum_k w_k x_k / sum_k w_k of every tensor; give the records sorted by client id, not as they arrived."""
    total = float(np.sum(weights, dtype=np.float64))
    flat = {key: _flat(key, list(zip(records, weights, strict=True))) for key in records[0]}
    found = {key: np.empty(values.shape, values.dtype) for key, values in views(records[0]).items()}

    def average(key: str, part: slice) -> None:
        block = _sum_group(flat[key], part, np.empty(part.stop - part.start))
        found[key].reshape(-1)[part] = _divided(block, total, flat[key][0][0][part])

    over_blocks({key: values.size for key, values in found.items()}, average)
    return as_record({key: pack(found.pop(key)) for key in records[0]})


def clip_update(trained: Mapping[str, Array], sent: Mapping[str, Array], factor: float) -> ArrayRecord:
    """Return the tensors of `sent` plus `factor` times the update to `trained`, in the dtypes of `trained`.

    Only floating tensors are clipped. The sums are taken in float64 and rounded once.
    """
    found = {}
    for key, array in trained.items():
        after, before = view(array), view(sent[key])
        if after.dtype.kind == "f":
            after = (before + factor * np.subtract(after, before, dtype=np.float64)).astype(after.dtype)
        found[key] = pack(after)
    return as_record(found)


def clip(sent: Tensors, trained: Tensors, norm: float) -> Tensors | None:
    """Return `sent` plus the update to `trained`, clipped to length `norm` over all tensors; None where it is shorter.

    Lengths are measured with an error below MARGIN. So a clipped update is never longer than `norm`, and shorter by at
    most 3 * MARGIN, or more if large values have to be rounded towards `sent`. Raises ValueError when the tensors do
    not match, and FloatingPointError when the update is not finite.
    """
    if not trained.keys() <= sent.keys():
        raise ValueError(f"trained {min(trained.keys() - sent.keys())}, which was not sent")
    length, limit = update_length(sent, trained), norm * (1 - MARGIN)
    if length <= limit:
        return None
    factor = norm * (1 - 2 * MARGIN) / length
    found = {key: np.empty(after.size, after.dtype) for key, after in trained.items()}

    def shorten(key: str, part: slice) -> float:
        old, new = sent[key].reshape(-1)[part], found[key][part]
        change = _change(old, trained[key].reshape(-1)[part])
        np.multiply(change, factor, out=change)
        new[:] = np.add(old, change, out=change)
        return squares(_change(old, new))

    with np.errstate(over="ignore", invalid="ignore"):
        total = sum(over_blocks({key: values.size for key, values in found.items()}, shorten))
    if not math.sqrt(total) <= limit:  # values so large that rounding to their dtype made the update too long
        return {key: _shortened_towards(sent[key], after, factor) for key, after in trained.items()}
    return {key: values.reshape(trained[key].shape) for key, values in found.items()}


def update_length(sent: Tensors, trained: Tensors) -> float:
    """Return the Euclidean length of an update over all tensors, with a relative error below MARGIN.

    Raises FloatingPointError when it is not finite.
    """
    sizes = {key: after.size for key, after in trained.items()}
    for most in (np.float32, np.float64):  # squares beyond float32 are rare

        def measure(key: str, part: slice, most: type = most) -> float:
            return squares(_change(sent[key].reshape(-1)[part], trained[key].reshape(-1)[part], most))

        with np.errstate(over="ignore", invalid="ignore"):
            total = sum(over_blocks(sizes, measure))
        if math.isfinite(total):
            return math.sqrt(total)
    raise FloatingPointError("the update is not finite, so it cannot be clipped: lower train.lr")


def _change(before: np.ndarray, after: np.ndarray, most: type = np.float32) -> np.ndarray:
    """Return after - before, in float64 except for float32, for which it is in the dtype `most`."""
    return np.subtract(after, before, dtype=most if after.dtype == np.float32 else np.float64)


def squares(values: np.ndarray) -> float:
    """Return the sum of squares. Rows are short, so that the relative error of float32 sums stays below 1e-5."""
    whole = values.size // ROW * ROW
    rows, rest = values[:whole].reshape(-1, ROW), values[whole:].astype(np.float64)
    return float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64) + rest @ rest)


def _shortened_towards(before: np.ndarray, after: np.ndarray, factor: float) -> np.ndarray:
    """Return before + factor * (after - before), rounded towards `before`: rounding never makes a change larger."""
    step = np.subtract(after, before, dtype=np.float64) * factor
    moved = np.asarray(before + step).astype(after.dtype)
    is_longer = np.abs(np.subtract(moved, before, dtype=np.float64)) > np.abs(step)
    return np.where(is_longer, np.nextafter(moved, before), moved)


def over_blocks(sizes: Mapping[str, int], work: Callable[[str, slice], T]) -> list[T]:
    """Return work(key, part) for every block of every tensor, in their order; in two threads where that pays."""
    parts = [(key, part) for key, size in sizes.items() for part in _blocks(size)]
    if sum(sizes.values()) < WORTH_THREADS:
        return [work(*each) for each in parts]
    middle = len(parts) // 2
    with ThreadPoolExecutor(THREADS) as threads:
        halves = threads.map(lambda some: [work(*each) for each in some], (parts[:middle], parts[middle:]))
        return [found for half in halves for found in half]


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))


def _divided(block: np.ndarray, weight: float, before: np.ndarray) -> np.ndarray:
    """Divide a block of a sum in place; return it, rounded as WeightedSum.mean says if `before` is not of floats."""
    np.divide(block, weight, out=block)
    if before.dtype == np.bool_:
        return block > 0.5
    if before.dtype.kind not in "iu":
        return block
    is_unmoved = np.abs(np.subtract(block, before, dtype=np.float64)) <= UNMOVED * np.abs(block)
    with np.errstate(invalid="ignore"):  # the largest integers are beyond their dtype once they are float64
        return np.where(is_unmoved, before, np.rint(block).astype(before.dtype))


def _flat(key: str, group: Sequence[Weighted]) -> list[tuple[np.ndarray, float]]:
    return [(view(arrays[key]).reshape(-1), weight) for arrays, weight in group]


def _sum_group(group: Sequence[tuple[np.ndarray, float]], part: slice, part_sum: np.ndarray) -> np.ndarray:
    """Write the weighted sum of one block of a group's tensors to part_sum, and return it."""
    out = part_sum
    for values, weight in group:
        np.copyto(out, values[part])  # a cast of its own is faster than one inside multiply
        if weight != 1.0:
            np.multiply(out, weight, out=out)
        if out is part_sum:
            out = np.empty(part_sum.size)
        else:
            np.add(part_sum, out, out=part_sum)
    return part_sum
