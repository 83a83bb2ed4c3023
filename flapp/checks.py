"""Check a client's reply: on the node before the client is added to a sum, and on the server."""

import math
import re
from collections.abc import Iterator, Mapping
from math import isfinite

import numpy as np
from flwr.app import Array

from flapp.custom import NAME
from flapp.messages import (
    NUM_EXAMPLES,
    SUMS,
    TRAIN,
    VAL,
    WITHIN_CLIP,
    Answer,
    Claim,
    MessageError,
    one_line,
    view,
    views,
)
from flapp.sums import over_blocks, squares, update_length

LARGEST = 1.8e19  # beyond it a square overflows float32, so that no optimizer can continue
SMALL = 1 << 10  # elements: so few that BLAS computes their product in one thread
BLOCK = 1 << 16  # float32 elements; two such blocks fit into the level-2 cache
LOSS_SUMS = {f"{start}{kind}loss-sum" for start in ("", VAL) for kind in ("", "personal-")}
METRIC = re.compile(f"({VAL})?(personal-)?{SUMS}{NAME.pattern}")  # of evaluate.metrics
BOUNDED = {"train-loss", "seconds", *LOSS_SUMS}
RAISE_LIMIT = "if its data explain this, raise strategy.norm_limit"
TOO_LONG = "run unchanged flapp on its node, which then clips to the length that the server names"
LARGEST_LOSS = float(np.finfo(np.float32).max)  # of one sample


def find_answer_fault(answer: Answer, client_id: str, shard_digest: str) -> str | None:
    """Return why a reply is not from this client with these data, or None."""
    if answer.client_id != client_id:
        return f"answered as client {one_line(answer.client_id)}"
    if answer.shard_digest != shard_digest:
        return f"its data changed: shard digest {one_line(answer.shard_digest[:12])}, attested as {shard_digest[:12]}"
    return None


def find_fault(record: Mapping[str, Array], expected: Mapping[str, Array]) -> str | None:
    """Return why a model cannot be averaged with `expected`, or None.

    Keys, shapes and dtypes must be the same, and every value must be finite and at most LARGEST.
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


def find_value_fault(values: np.ndarray, largest: float = LARGEST) -> str | None:
    """Return why one tensor's values cannot be trained from, or None."""
    if values.dtype.kind != "f" or values.size == 0:
        return None
    highest, lowest = float(values.max()), float(values.min())  # both are NaN if any value is; float16 ends at 65504
    if max(highest, -lowest) <= largest:
        return None
    if bad := values.size - np.count_nonzero(np.isfinite(values)):
        return f"{bad} NaN or infinite values of {values.size}"
    return f"values up to {max(highest, -lowest):.3g}, whose squares overflow float32"


def find_metric_fault(kind: str, claim: Claim, metrics: Mapping[str, float], validates: bool) -> str | None:
    """Return what is wrong with the numbers of a reply of `kind` from a client with this claim, or None.

    validates: whether an evaluation must also have figures for validation samples.
    """
    train = kind == TRAIN
    samples = claim.train if train else claim.test
    held = {key: claim.val if key.startswith(VAL) else samples for key in metrics}
    needed = {NUM_EXAMPLES} | ({"train-loss"} if train else _sums_needed(claim, metrics, validates))
    if missing := sorted(needed - metrics.keys()):
        return f"sent no {missing[0]}"
    if odd := sorted(key for key in metrics if key.endswith("correct") and not claim.label_hist):
        return f"sent {one_line(odd[0])}, but there are no classes"
    if bad := sorted(key for key, value in metrics.items() if not isfinite(value)):
        return f"sent {one_line(bad[0])}={metrics[bad[0]]}"
    if metrics.get("seconds", 0) < 0:
        return f"sent seconds={metrics['seconds']}, which is never below 0"
    if metrics[NUM_EXAMPLES] != samples:
        return f"sent num-examples={metrics[NUM_EXAMPLES]}, attested {samples}"
    counted = {key: value for key, value in metrics.items() if key.endswith("correct")}
    if odd := sorted(key for key, value in counted.items() if not 0 <= value <= held[key]):
        return f"sent {one_line(odd[0])}={metrics[odd[0]]}, which must be from 0 to its {held[odd[0]]} samples"
    if metrics.get(WITHIN_CLIP, 0) not in (0, 1):
        return f"sent {WITHIN_CLIP}={metrics[WITHIN_CLIP]}, which must be 0 or 1"
    sums = {key for key in metrics if SUMS in key}
    if odd := sorted(key for key in sums if not METRIC.fullmatch(key)):
        return f"sent a sum with the name {one_line(odd[0])}, but names have at most 60 letters, digits and _"
    most = {key: LARGEST_LOSS * (1 if train else max(1, held[key])) for key in BOUNDED & metrics.keys() | sums}
    if large := sorted(key for key in most if abs(metrics[key]) > most[key]):
        name = large[0]
        return f"sent {name}={metrics[name]:.3g}, which is beyond the largest number allowed ({most[name]:.3g})"
    return None


def _sums_needed(claim: Claim, metrics: Mapping[str, float], validates: bool) -> set[str]:
    """Return the sums that an evaluation must have. If it has one personalised sum, it must have all of them."""
    starts = ("", VAL) if validates else ("",)
    kinds = ("", "personal-") if any("personal-" in key for key in metrics) else ("",)
    sums = ("loss-sum", "correct") if claim.label_hist else ("loss-sum",)
    return {f"{start}{kind}{total}" for start in starts for kind in kinds for total in sums}


def floating_pairs(trained: Mapping[str, Array], sent: Mapping[str, Array]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each floating tensor of a client, as trained and as it was sent to the client."""
    for key in sorted(trained):
        values = view(trained[key])
        if values.dtype.kind == "f":
            yield values, view(sent[key])


def check_update(
    trained: Mapping[str, Array],
    expected: Mapping[str, Array],
    limit: float,
    multiple: float | None = None,
    fix: str = RAISE_LIMIT,
) -> float:
    """Return the Euclidean length of an update, with a relative error below 1e-5.

    trained: a client's tensors; expected: those it was sent. Raises MessageError as find_fault and find_norm_fault say.
    """
    norm = _squared_length(trained, expected) ** 0.5 if trained.keys() == expected.keys() else math.nan
    # A short update has no infinite or too large value, because the tensors sent have none.
    if not norm < LARGEST / 100:
        if fault := find_fault(trained, expected):
            raise MessageError(fault)
        after = {key: values for key, values in views(trained).items() if values.dtype.kind == "f"}
        try:
            norm = update_length(views(expected), after)
        except FloatingPointError:  # for a float64 model whose own tensors are that large
            norm = math.inf
    if fault := find_norm_fault(norm, limit, multiple, fix):
        raise MessageError(fault)
    return norm


def _squared_length(trained: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """Return the squared length of an update: NaN or infinite if a value is, and NaN if a tensor does not fit."""
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for key, sent in expected.items():
            try:
                after, before = view(trained[key]), view(sent)
            except ValueError:
                return math.nan
            if after.shape != before.shape or after.dtype != before.dtype:
                return math.nan
            if after.dtype.kind == "f":
                total += _squared_distance(after.reshape(-1), before.reshape(-1))
    return total


def _squared_distance(after: np.ndarray, before: np.ndarray) -> float:
    dtype = np.float32 if after.dtype == np.float32 else np.float64
    if after.size <= SMALL:
        change = np.subtract(after, before, dtype=dtype)
        return float(change @ change)
    total, buffer = 0.0, np.empty(min(BLOCK, after.size), dtype)
    for start in range(0, after.size, BLOCK):
        part = slice(start, start + BLOCK)
        block = np.subtract(after[part], before[part], out=buffer[: after.size - start], dtype=dtype)
        total += squares(block)
    return total


def find_norm_fault(norm: float, limit: float, multiple: float | None, fix: str = RAISE_LIMIT) -> str | None:
    """Return why an update of this length is left out, or None.

    multiple (of the median) and fix only appear in the text.
    """
    if norm <= limit:
        return None
    most = f"the limit is {limit:.3g} ({multiple:g} times the median)" if multiple else f"the limit is {limit:.3g}"
    return f"sent an update of length {norm:.3g}, {most}: {fix}"


def find_sum_fault(total: Mapping[str, Array], sent: Mapping[str, Array], weight: float, most: float) -> str | None:
    """Return what is wrong with a weighted sum of models, or None.

    sent: the tensors that each of them began with; weight: the sum of the weights; most: the sum of the weighted
    lengths of the updates. Apart from rounding, the sum cannot be farther from weight times `sent` than `most`.
    """
    if total.keys() != sent.keys():
        return "it has other tensors than the model"
    pairs, size = {}, 0.0
    for key, array in total.items():
        try:
            values, before = view(array), view(sent[key])
        except ValueError as error:
            return f"it has {key} as {error}"
        if values.shape != before.shape or values.dtype != np.float64:
            return f"its {key} is {values.dtype} {list(values.shape)}, not float64 {list(before.shape)}"
        if before.dtype.kind == "f":
            pairs[key] = values.reshape(-1), before.reshape(-1)
            size = max(size, float(np.abs(before).max(initial=0)) * before.size**0.5)

    def measure(key: str, part: slice) -> float:
        values, before = pairs[key]
        return squares(values[part] - np.multiply(before[part], weight, dtype=np.float64))

    with np.errstate(over="ignore", invalid="ignore"):
        length = math.sqrt(sum(over_blocks({key: values.size for key, (values, _) in pairs.items()}, measure)))
    if length <= most * (1 + 1e-4) + 1e-9 * weight * size * len(pairs) ** 0.5:
        return None  # such a sum has no infinite or too large value, because the tensors sent have none
    faults = ((key, find_value_fault(view(array), LARGEST * weight)) for key, array in total.items())
    found = next((f"its {key} has {fault}" for key, fault in faults if fault), None)
    return found or f"it moves the model by {length:.3g}, but the updates in it can move it by at most {most:.3g}"
