"""Averages, weights, bounds, lengths and server optimisers against numpy in float64."""

import io
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from flapp.checks import check_update, find_fault, find_value_fault
from flapp.messages import MessageError, pack, view
from flapp.strategy import aggregation
from flapp.strategy.aggregation import NormBound, cap_shares, spread
from flapp.strategy.server_optimizer import ServerOptimizer
from flapp.sums import BLOCK, weighted_average

SHAPES = {"weight": (BLOCK + 7, 2), "bias": (5,), "scalar": (), "empty": (0, 3)}


def models(count: int, dtype: str = "float32") -> list[ArrayRecord]:
    rng = np.random.default_rng(0)
    return [
        ArrayRecord({key: Array(np.asarray(rng.normal(size=shape), dtype)) for key, shape in SHAPES.items()})
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_average_is_float64_numpys_rounded_once(count: int, dtype: str) -> None:
    records, weights = models(count, dtype), [float(i * i + 1) for i in range(count)]
    before = [{key: array.data for key, array in record.items()} for record in records]
    averaged = weighted_average(records, weights)
    assert list(averaged) == list(records[0])
    for key, shape in SHAPES.items():
        total = sum(r[key].numpy().astype(np.float64) * w for r, w in zip(records, weights, strict=True))
        found = averaged[key].numpy()
        assert (found.shape, found.dtype) == (shape, dtype)
        np.testing.assert_array_equal(found, np.asarray(total / sum(weights)).astype(dtype))
    assert before == [{key: array.data for key, array in record.items()} for record in records]


def test_the_average_agrees_with_stock_flower() -> None:
    records, weights = models(5), [3.0, 1.0, 4.0, 1.0, 5.0]
    contents = [
        RecordDict({"arrays": r, "metrics": MetricRecord({"num-examples": w})})
        for r, w in zip(records, weights, strict=True)
    ]
    flower = aggregate_arrayrecords(contents, "num-examples")
    ours = weighted_average(records, weights)
    for key in SHAPES:
        np.testing.assert_allclose(ours[key].numpy(), flower[key].numpy(), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_infinite_values_of_every_dtype_are_a_fault(dtype: str, value: float) -> None:
    assert find_value_fault(np.array([1, value], dtype)) == "1 NaN or infinite values of 2"
    assert find_value_fault(np.array([1, 65504], dtype)) is None


def test_integers_stay_integers_and_booleans_follow_the_weighted_majority() -> None:
    def average(values: list[tuple[int, bool]], weights: list[float]) -> dict[str, np.ndarray]:
        records = [
            ArrayRecord({"n": Array(np.array(n)), "b": Array(np.array([flag])), "u": Array(np.uint8([n]))})
            for n, flag in values
        ]
        return {key: array.numpy() for key, array in weighted_average(records, weights).items()}

    found = average([(10, True), (13, False), (4, False)], [3.0, 1.0, 1.0])
    assert found["n"] == 9  # (30 + 13 + 4) / 5 = 9.4
    assert (found["n"].dtype, found["u"].dtype) == (np.int64, np.uint8)
    assert found["b"].tolist() == [True]
    for flags, majority in (((True, False, False), False), ((False, True, True), True)):
        found = average([(0, flag) for flag in flags], [3.0, 2.0, 2.0])  # the largest, 3 of 7, is not a majority
        assert found["b"].tolist() == [majority]
    assert average([(0, True), (0, False)], [1.0, 1.0])["b"].tolist() == [False]


PLAIN = [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((3, 2))), np.zeros((0, 3)), np.array([True])]


@pytest.mark.parametrize("values", [*PLAIN, np.array(3), np.array(3, np.float32)])
def test_view_and_pack_use_flowers_format(values: np.ndarray) -> None:
    np.testing.assert_array_equal(view(Array(values)), values)
    np.testing.assert_array_equal(pack(values).numpy(), values)
    np.testing.assert_array_equal(view(pack(values)), values)
    assert view(pack(values)).shape == values.shape
    assert not view(Array(values)).flags.writeable or not values.size


def test_bytes_that_are_not_a_plain_array_are_a_fault_and_pickles_are_never_loaded() -> None:
    expected = models(1)[0]
    header, pickled = np.lib.format.MAGIC_PREFIX + b"\x01\x00\x10\x00", io.BytesIO()
    np.save(pickled, np.array([print] * 5, dtype=object), allow_pickle=True)
    for data, fault in (
        *((data, "not a plain array") for data in (b"", b"garbage", expected["bias"].data[:-3], header + b"{bad")),
        (header + b"{'descr': ((((((((", "not a plain array"),
        (pickled.getvalue(), "it holds Python objects"),
    ):
        record = ArrayRecord(dict(expected))
        record["bias"] = Array("float32", (5,), "numpy.ndarray", data)
        assert fault in str(find_fault(record, expected))


@pytest.mark.parametrize(("value", "sound"), [(1e19, True), (-1e19, True), (3e38, False), (-3e38, False)])
def test_finite_values_are_refused_only_when_their_squares_overflow_float32(value: float, sound: bool) -> None:
    record = ArrayRecord({"x": Array(np.array([0.0, value], np.float32))})
    fault = find_fault(record, record)
    assert fault is None if sound else "sent x with values up to 3e+38" in str(fault)


def test_the_spread_is_numpys_percentiles() -> None:
    values = {str(i): float(v) for i, v in enumerate([5, 1, 4, 2, 3])}
    assert spread(values) == {"min": 1, "p10": 1.4, "median": 3, "p90": 4.6, "max": 5}
    assert spread({}) == {}


@pytest.mark.parametrize("size", [1.0, 1e16, 9e18], ids=str)
def test_the_length_of_an_update_is_numpys(size: float) -> None:
    rng = np.random.default_rng(0)
    shapes = (((1 << 17) + 3, "f4"), ((70_000,), "f8"), ((2, 3), "f2"), ((0, 3), "f4"), ((), "f4"))
    before = {f"{i}": rng.normal(size=shape).astype(kind) for i, (shape, kind) in enumerate(shapes)}
    after = {key: rng.normal(size=values.shape).astype(values.dtype) for key, values in before.items()}
    after["0"][5] = size
    exact = np.concatenate([(after[key].astype(np.float64) - before[key]).ravel() for key in before])
    sent, trained = ({key: pack(values) for key, values in each.items()} for each in (before, after))
    whole = {"n": pack(np.array([3]))}
    found = check_update(trained | {"n": pack(np.array([9]))}, sent | whole, math.inf)
    assert found == pytest.approx(np.linalg.norm(exact), rel=1e-5)
    assert check_update(whole, whole, 0.0) == 0.0


def test_the_length_of_an_update_of_equal_values_is_numpys() -> None:
    # Rounding errors of equal squares all have the same sign.
    for value in (0.3, 0.7, 1.1):
        after = np.full(1 << 16, value, np.float32)
        found = check_update({"w": pack(after)}, {"w": pack(np.zeros_like(after))}, math.inf)
        assert found == pytest.approx(np.linalg.norm(after.astype(np.float64)), rel=1e-5)


def test_an_update_from_values_that_nobody_can_square_is_too_long() -> None:
    sent, trained = ({"x": pack(np.array([value, 1.0]))} for value in (1e300, 0.0))
    with pytest.raises(MessageError, match=r"sent an update of length inf, the limit is 1e\+09"):
        check_update(trained, sent, 1e9)


def test_the_limit_follows_the_medians_of_the_last_two_rounds() -> None:
    bound = NormBound(10.0)
    assert not bound.is_known  # until a round has been accepted
    assert bound.limit({"a": 1.0, "b": 1.2, "c": 13.0}) == 12.0
    assert bound.limit({"a": 1.0, "b": 11.0}) == 10.0  # of two, the shorter is the median
    assert bound.limit({"a": 0.0, "b": 1.0}) == NormBound(None).limit({"a": 1.0}) == math.inf
    for accepted, limit in (({"a": 1.0, "b": 3.0, "c": 9.0}, 30.0), ({"a": 0.5}, 30.0), ({"a": 0.4}, 5.0)):
        bound.accept(accepted)
        assert bound.is_known
        assert bound.limit({"a": 1e9}) == limit


@pytest.mark.parametrize("most", [0.5, 0.3, 0.25])
def test_no_share_exceeds_the_bound_and_the_rest_keep_their_proportions(most: float) -> None:
    weights = [5.0, 1e12, 7.0, 300.0, 2.0, 11.0]
    capped = cap_shares(weights, most)
    assert max(capped) / sum(capped) == pytest.approx(most)
    small = [i for i, weight in enumerate(capped) if weight == weights[i]]
    assert len(small) >= 3
    assert all(capped[i] == max(capped) for i in range(6) if i not in small)


@pytest.mark.parametrize(
    ("weights", "most", "capped"),
    [([3, 2, 1], 0.5, [3, 2, 1]), ([9, 1], 0.5, [9, 1]), ([9, 1, 1], None, [9, 1, 1]), ([1, 0, 0], 0.5, [1, 1, 1])],
)
def test_weights_stay_if_they_are_within_the_bound_or_fewer_than_three(
    weights: list[float], most: float | None, capped: list[float]
) -> None:
    assert cap_shares(weights, most) == capped


def alignment_weights(updates: list[list[np.ndarray]]) -> list[float]:
    """Return the weights of updates, with their lengths taken by numpy."""
    return aggregation.alignment_weights(updates, [float(np.linalg.norm(flatten(update))) for update in updates])


def flatten(update: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([tensor.ravel() for tensor in update]).astype(np.float64)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_alignment_follows_the_cosine_with_the_mean_update(offset: float) -> None:
    rng = np.random.default_rng(6)
    shapes: list[tuple[int, ...]] = [(aggregation.BLOCK + 5, 2), (3,), (), (0, 4)]
    given = [[np.asarray(rng.normal(offset, size=shape), np.float32) for shape in shapes] for _ in range(6)]
    given[2] = [-3 * tensor for tensor in given[3]]  # pulls the other way
    flat = np.array([flatten(update) for update in given])
    norms = np.linalg.norm(flat, axis=1)
    mean = (flat * np.minimum(1, np.sort(norms)[2] / norms)[:, None]).mean(axis=0)
    cosines = np.maximum(0, flat @ mean / norms / np.linalg.norm(mean))
    np.testing.assert_allclose(alignment_weights(given), cosines / cosines.sum(), rtol=1e-9)
    assert 0.0 in alignment_weights(given)


def test_one_long_update_against_nine_others_gets_no_weight() -> None:
    rng = np.random.default_rng(1)
    honest = [[np.asarray(1 + rng.normal(size=100), np.float32)] for _ in range(9)]
    weights = alignment_weights([*honest, [-100 * honest[0][0]]])
    assert weights[-1] == 0.0
    assert min(weights[:-1]) > 0.05


RIGHT, UP, TINY = np.float32([1, 0]), np.float32([0, 1]), np.full(10, 1e-44, np.float32)


@pytest.mark.parametrize(
    ("updates", "weights"),
    [
        ([RIGHT, UP], [1 / 2, 1 / 2]),
        ([3 * RIGHT, 4 * UP], [1 / 2, 1 / 2]),  # only lengths up to the median count in the mean
        ([RIGHT, 3 * RIGHT, 4 * UP], [4 / 11, 4 / 11, 3 / 11]),
        ([RIGHT, 0 * RIGHT, RIGHT], [1 / 2, 0, 1 / 2]),  # a client that did not move has no weight
        ([0 * UP, 0 * UP, 0 * UP], [1 / 3, 1 / 3, 1 / 3]),
        ([UP, -UP, 0 * UP], [1 / 3, 1 / 3, 1 / 3]),  # updates that cancel have no direction
        ([(0.1 + 0.2) * UP.astype(float), -0.3 * UP.astype(float), 0 * UP], [1 / 3, 1 / 3, 1 / 3]),
        ([TINY, -TINY, TINY], [1 / 2, 0, 1 / 2]),  # the smallest float32 updates still have a direction
    ],
)
def test_alignment_in_small_cases(updates: list[np.ndarray], weights: list[float]) -> None:
    assert alignment_weights([[update] for update in updates]) == pytest.approx(weights)


RNG = np.random.default_rng(0)
START = {"w": RNG.normal(size=(3, 2)).astype(np.float32), "steps": np.array(5)}
AVERAGES = [{"w": START["w"] + RNG.normal(size=(3, 2)).astype(np.float32), "steps": np.array(5 + n)} for n in (1, 2, 3)]


OPTIMIZERS = ["fedadam", "fedyogi", "fedavgm"]


def record(tensors: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({key: Array(value) for key, value in tensors.items()})


def steps(optimizer: ServerOptimizer, first: int = 1, current: ArrayRecord | None = None) -> ArrayRecord:
    current = record(START) if current is None else current
    for number in range(first, 4):
        current = optimizer.step(current, record(AVERAGES[number - 1]), number)
    return current


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_three_rounds_are_those_of_the_documented_formulas_in_float64(name: str, momentum: float) -> None:
    found = steps(ServerOptimizer(name, 0.1, momentum))
    x, b2, tau = START["w"].astype(np.float64), 0.99, 1e-3
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, average in enumerate(AVERAGES, 1):
        d = average["w"] - x
        m = momentum * m + (d if name == "fedavgm" else (1 - momentum) * d)
        if name == "fedavgm":
            x = x + 0.1 * m
            continue
        if name == "fedadam":
            eta, v = 0.1 * np.sqrt(1 - b2 ** (t + 1)) / (1 - momentum ** (t + 1)), b2 * v + (1 - b2) * d**2
        else:
            eta, v = 0.1, v - (1 - b2) * d**2 * np.sign(v - d**2)
        x = x + eta * m / (np.sqrt(v) + tau)
    np.testing.assert_allclose(found["w"].numpy(), x, rtol=1e-5, atol=1e-6)
    assert found["w"].numpy().dtype == np.float32
    assert found["steps"].numpy() == 8  # whole numbers are averaged, not stepped


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_taken_back_go_on_as_if_nothing_had_happened(name: str) -> None:
    whole = steps(ServerOptimizer(name, 0.1, 0.8))
    first, later = ServerOptimizer(name, 0.1, 0.8), ServerOptimizer(name, 0.1, 0.8)
    after_one = first.step(record(START), record(AVERAGES[0]), 1)
    later.restore(first.state(after_one))
    np.testing.assert_array_equal(steps(later, 2, after_one)["w"].numpy(), whole["w"].numpy())
