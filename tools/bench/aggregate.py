"""Aggregation of ten ViT-B models, against Flower's own."""

import resource
import subprocess
import sys

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from flapp.model import build_model
from flapp.strategy.aggregation import find_fault, weighted_average
from tools.bench import Row, measure

CLIENTS = 10


def replies() -> list[RecordDict]:
    """Return the replies of ten clients, each a ViT-B of its own and as many examples as it likes."""
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


def flower(records: list[RecordDict]) -> ArrayRecord:
    return aggregate_arrayrecords(records, "num-examples")


def ours(records: list[RecordDict]) -> ArrayRecord:
    """Check and average, as the strategy does; Flower's does not check."""
    arrays = [record.array_records["arrays"] for record in records]
    if fault := next(filter(None, (find_fault(record, arrays[0]) for record in arrays)), None):
        raise ValueError(fault)
    return weighted_average(arrays, [float(i + 1) for i in range(CLIENTS)])


def average_only(records: list[RecordDict]) -> ArrayRecord:
    return weighted_average([r.array_records["arrays"] for r in records], [float(i + 1) for i in range(CLIENTS)])


def rows() -> list[Row]:
    """Time both on the same replies, and measure what each adds to peak memory in a process of its own."""
    records = replies()
    functions = {
        "flower": lambda: flower(records),
        "average": lambda: average_only(records),
        "checked": lambda: ours(records),
    }
    seconds = measure(functions)
    del records
    memory = {name: added_memory(name) for name in ("flower", "ours")}
    what, against = f"aggregation, {CLIENTS} clients x ViT-B", "flwr's aggregate_arrayrecords"
    return [
        Row(what, against, seconds["flower"] / seconds["average"], 2.0),
        Row(f"{what}, with NaN and shape checks", against, seconds["flower"] / seconds["checked"], 1.0),
        Row(f"{what}, memory added", against, memory["ours"] / memory["flower"], 1.0, higher_is_better=False),
    ]


def added_memory(name: str) -> float:
    """Return the MiB that aggregation adds to the peak memory of a fresh process."""
    code = f"from tools.bench import aggregate; print(aggregate.peak(aggregate.{name}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak(function: object) -> float:
    """Run `function` on the replies and return by how many MiB the process's peak memory grew."""
    records = replies()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function(records)  # type: ignore[operator]
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
