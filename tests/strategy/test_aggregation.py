"""Averages against float64 numpy and against stock Flower."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from flapp.checks import find_fault
from flapp.messages import pack, view
from flapp.strategy.evaluation import spread
from flapp.sums import BLOCK, weighted_average

SHAPES = {"weight": (BLOCK + 7, 2), "bias": (5,), "scalar": (), "empty": (0, 3)}


def models(count: int, dtype: str = "float32") -> list[ArrayRecord]:
    rng = np.random.default_rng(0)
    return [
        ArrayRecord({key: Array(np.asarray(rng.normal(size=shape), dtype)) for key, shape in SHAPES.items()})
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 10])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_average_is_float64_numpys_rounded_once(count: int, dtype: str) -> None:
    records, weights = models(count, dtype), [float(i * i + 1) for i in range(count)]
    averaged = weighted_average(records, weights)
    assert list(averaged) == list(records[0])
    for key, shape in SHAPES.items():
        total = sum(r[key].numpy().astype(np.float64) * w for r, w in zip(records, weights, strict=True))
        found = averaged[key].numpy()
        assert found.shape == shape
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, np.asarray(total / sum(weights)).astype(dtype))


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


def test_equal_models_average_to_themselves_bit_for_bit() -> None:
    record = models(1)[0]
    averaged = weighted_average([record] * 7, [0.1, 0.7, 3.0, 11.0, 2.0, 5.0, 0.3])
    assert all(averaged[key].data == record[key].data for key in SHAPES)


def test_integers_stay_integers_and_booleans_follow_the_weighted_majority() -> None:
    def record(number: int, flag: bool) -> ArrayRecord:
        return ArrayRecord({"n": Array(np.array(number)), "b": Array(np.array([flag])), "u": Array(np.uint8([number]))})

    averaged = weighted_average([record(10, True), record(13, False), record(4, False)], [3.0, 1.0, 1.0])
    assert averaged["n"].numpy().dtype == np.int64
    assert averaged["n"].numpy() == 9  # (30 + 13 + 4) / 5 = 9.4
    assert averaged["u"].numpy().dtype == np.uint8
    assert averaged["b"].numpy().tolist() == [True]
    for flags, majority in (((True, False, False), False), ((False, True, True), True)):
        records = [record(0, flag) for flag in flags]  # the largest weight, 3 of 7, is not a majority
        assert weighted_average(records, [3.0, 2.0, 2.0])["b"].numpy().tolist() == [majority]
    tied = weighted_average([record(0, True), record(0, False)], [1.0, 1.0])
    assert tied["b"].numpy().tolist() == [False]


def test_the_inputs_are_left_as_they_were() -> None:
    records = models(3)
    before = [{key: array.data for key, array in record.items()} for record in records]
    weighted_average(records, [1.0, 2.0, 3.0])
    assert before == [{key: array.data for key, array in record.items()} for record in records]


@pytest.mark.parametrize("values", [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((3, 2))), np.array(3)])
def test_view_and_pack_speak_flowers_format(values: np.ndarray) -> None:
    np.testing.assert_array_equal(view(Array(values)), values)
    np.testing.assert_array_equal(pack(values).numpy(), values)
    assert not view(Array(values)).flags.writeable


def test_bytes_that_are_no_plain_array_are_a_fault_not_a_crash() -> None:
    expected = models(1)[0]
    header = np.lib.format.MAGIC_PREFIX + b"\x01\x00\x10\x00"
    for data in (b"", b"garbage", expected["bias"].data[:-3], header + b"{bad", header + b"{'descr': (((((((("):
        record = ArrayRecord(dict(expected))
        record["bias"] = Array("float32", (5,), "numpy.ndarray", data)
        assert "sent bias as not a plain array" in str(find_fault(record, expected))


def test_pickled_objects_are_never_loaded() -> None:
    import io

    stream = io.BytesIO()
    np.save(stream, np.array([print], dtype=object), allow_pickle=True)
    record = ArrayRecord({"bias": Array("object", (1,), "numpy.ndarray", stream.getvalue())})
    assert "it holds Python objects" in str(find_fault(record, ArrayRecord({"bias": Array(np.zeros(1))})))


def test_finite_values_are_refused_only_when_their_squares_overflow_float32() -> None:
    for value, sound in ((1e19, True), (-1e19, True), (3e38, False), (-3e38, False)):
        record = ArrayRecord({"x": Array(np.array([0.0, value], np.float32))})
        fault = find_fault(record, record)
        assert fault is None if sound else "sent x with values up to 3e+38" in str(fault)


def test_the_spread_is_numpys_percentiles() -> None:
    values = {str(i): float(v) for i, v in enumerate([5, 1, 4, 2, 3])}
    assert spread(values) == {"min": 1, "p10": 1.4, "median": 3, "p90": 4.6, "max": 5}
    assert spread({}) == {}


def test_packing_keeps_the_values_of_an_array_in_fortran_order() -> None:
    values = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(view(pack(values)), values)
    assert view(pack(np.array(7))).shape == ()
