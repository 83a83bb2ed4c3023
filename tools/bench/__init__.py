"""What every benchmark shares: rows with a ratio, measured interleaved in one process, by medians."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One comparison: `ratio` of `what` against `against`; `target` is the design's, higher_is_better its direction."""

    what: str
    against: str
    ratio: float
    target: float
    higher_is_better: bool = True
    unit: str = "x"
    note: str = ""

    @property
    def met(self) -> bool:
        return self.ratio >= self.target if self.higher_is_better else self.ratio <= self.target


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
