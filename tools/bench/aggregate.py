"""Aggregation of ten ViT-B models, against Flower's own."""

import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from flapp.checks import find_fault
from flapp.model.build import build_model
from flapp.sums import weighted_average
from tools.bench import Row, measure

CLIENTS = 10


def replies() -> list[RecordDict]:
    """Return the replies of ten clients, each with its own random ViT-B; client k, from 0, has k + 1 examples."""
    rng = np.random.default_rng(0)
    state = build_model("vit_b_16", (224, 224, 3), 1000).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    return [
        RecordDict(
            {
                "arrays": ArrayRecord({k: Array(rng.standard_normal(s, dtype=np.float32)) for k, s in shapes.items()}),
                "metrics": MetricRecord({"num-examples": float(client + 1)}),
            }
        )
        for client in range(CLIENTS)
    ]


def ours(records: list[RecordDict]) -> ArrayRecord:
    """Check and average, as the strategy does."""
    arrays = [record.array_records["arrays"] for record in records]
    if fault := next(filter(None, (find_fault(record, arrays[0]) for record in arrays)), None):
        raise ValueError(fault)
    return weighted_average(arrays, [float(i + 1) for i in range(CLIENTS)])


def rows() -> list[Row]:
    """Time both on the same replies, and measure the memory that each needs."""
    records = replies()
    ways = {"flower": partial(aggregate_arrayrecords, records, "num-examples"), "ours": partial(ours, records)}
    seconds, memory = measure(ways), {name: peak_memory(way) for name, way in ways.items()}
    what, against = f"aggregation, {CLIENTS} clients x ViT-B", "flwr's aggregate_arrayrecords"
    return [
        Row(what, against, seconds["flower"] / seconds["ours"], 2.0, note="ours checks for NaN, shapes and dtypes too"),
        Row(f"{what}, memory added", against, memory["ours"] / memory["flower"], 1.0, higher_is_better=False),
    ]


def peak_memory(function: Callable[[], object]) -> int:
    """Return the peak memory of `function` in bytes, as Python and numpy report it."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
