"""What an evaluation says of all clients together, and of how they differ."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def totals(
    metrics: Mapping[str, Mapping[str, float]], held: dict[str, int], weights: dict[str, float], prefix: str
) -> dict[str, Any]:
    """Sum one kind of evaluation over clients; accuracy is None for regression, and all is None where absent.

    held: the samples that each client has; weights: those that it counts for, which are fewer if they are capped.
    """
    out = prefix.replace("-", "_")
    measured = {name: m for name, m in metrics.items() if f"{prefix}loss-sum" in m}
    count = sum(weights[name] for name in measured)
    if not count:
        return {f"{out}loss": None, f"{out}accuracy": None}

    def total(key: str) -> float:
        return sum(m[key] * (weights[name] / held[name]) for name, m in measured.items() if key in m)

    result: dict[str, Any] = {f"{out}loss": total(f"{prefix}loss-sum") / count}
    result[f"{out}loss_spread"] = spread({n: m[f"{prefix}loss-sum"] / held[n] for n, m in measured.items()})
    each = {n: m[f"{prefix}correct"] / held[n] for n, m in measured.items() if f"{prefix}correct" in m}
    if each:
        result[f"{out}accuracy"] = total(f"{prefix}correct") / count
        result[f"{out}accuracy_spread"] = spread(each)
        result[f"{out}accuracy_by_client"] = each
    return {f"{out}accuracy": None} | result


def spread(values: Mapping[str, float]) -> dict[str, float]:
    """Return min, p10, median, p90 and max of one number a client (numpy's linear percentiles)."""
    names = ("min", "p10", "median", "p90", "max")
    if not values:
        return {}
    points = np.percentile(list(values.values()), [0, 10, 50, 90, 100])
    return dict(zip(names, map(float, points), strict=True))
