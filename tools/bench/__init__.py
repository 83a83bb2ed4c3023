"""Shared by all benchmarks: rows with a ratio, and medians of interleaved measurements in one process."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

HEADS = ("what", "against", "ratio", "target", "limit", "verdict", "note")
SLACK = 1.2  # factor between target and limit if a row sets no limit: ratios vary this much between runs


@dataclass(frozen=True)
class Row:
    """One comparison: `ratio` of `what` against `against`; `target` is the goal, higher_is_better its direction.

    limit: a ratio beyond it is a defect. A row without a ratio was not measured; its note says why.
    """

    what: str
    against: str
    ratio: float | None
    target: float
    higher_is_better: bool = True
    unit: str = "x"
    note: str = ""
    limit: float | None = None

    @property
    def least(self) -> float:
        """Return the limit: where none is given, the target relaxed by a factor of 1.2."""
        relaxed = self.target / SLACK if self.higher_is_better else self.target * SLACK
        return relaxed if self.limit is None else self.limit

    @property
    def verdict(self) -> str:
        """Return met, within limit, MISSED, or not measured."""
        if self.ratio is None:
            return "not measured"
        sign = 1 if self.higher_is_better else -1
        if sign * self.ratio >= sign * self.target:
            return "met"
        return "within limit" if sign * self.ratio >= sign * self.least else "MISSED"

    @property
    def passed(self) -> bool:
        return self.verdict in ("met", "within limit")

    def cells(self) -> tuple[str, ...]:
        """Return the row as text, a cell for each of HEADS."""
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}{self.unit}"
        sign = "" if self.higher_is_better else "at most "
        marks = (f"{sign}{mark:.3g}{self.unit}" for mark in (self.target, self.least))
        return (self.what, self.against, ratio, *marks, self.verdict, self.note)


def measure(
    functions: Mapping[str, Callable[[], object]],
    repeats: int = 7,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Time each function in turn, A B C A B C ..., and return its median seconds, leaving out the `warmup` turns."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            gc.collect()
            start = clock()
            function()
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
