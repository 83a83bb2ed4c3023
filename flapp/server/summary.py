"""What the lines of metrics.jsonl add up to: totals, the best round, and whether the run stops before its last."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from math import inf, isfinite
from typing import Any

from flapp.config.schema import Config

FIGURES = ("accuracy", "loss", "personal_accuracy")
VALIDATION_FIGURES = tuple(f"val_{figure}" for figure in FIGURES)
MOST_REFUSED = 20


class StoppedEarly(Exception):
    """Leaves Flower's loop after a complete round."""


@dataclass
class Best:
    """The best value of a metric so far, its round, and the evaluations since one was better by more than min_delta."""

    metric: str
    min_delta: float = 0.0
    round: int | None = None
    value: float | None = None
    waited: int = 0
    mark: float = -inf

    def add(self, server_round: int, value: float | None) -> bool:
        """Take an evaluation and say whether it is the best: never without a finite value, of equals the first."""
        score = self._score(value)
        better = score > self._score(self.value)
        if better:
            self.round, self.value = server_round, value
        if score > self.mark + self.min_delta:
            self.mark, self.waited = score, 0
        else:
            self.waited += 1
        return better

    def _score(self, value: float | None) -> float:
        if value is None or not isfinite(value):
            return -inf
        return -value if self.metric.endswith("loss") else value


def figure_of(config: Config, metric: str) -> str:
    """Name the figure by which this run chooses where a setting says `metric`: of validation samples, if it has any."""
    return f"val_{metric}" if config.validates else metric


def in_words(figure: str) -> str:
    """Return the name of a figure as people read it, such as `validation accuracy` for val_accuracy."""
    return figure.replace("val_", "validation ").replace("_", " ")


class Summary:
    """Add up lines; `totals` is what metrics.json says of them, `best` is by evaluate.objective."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.totals: dict[str, Any] = {"rounds": 0, "bytes_up": 0, "bytes_down": 0, "stopped_early": False}
        self.figures = FIGURES + (VALIDATION_FIGURES if config.validates else ())
        self.best = Best(figure_of(config, config.evaluate.objective))
        watched = config.stopping.metric or config.evaluate.objective
        self.watched = Best(figure_of(config, watched), config.stopping.min_delta)

    def add(self, line: Mapping[str, Any]) -> None:
        """Take a line."""
        self.totals["rounds"] = max(self.totals["rounds"], line["round"])
        for key in ("bytes_up", "bytes_down"):
            self.totals[key] += line.get(key, 0)
        if "aggregation_error" in line:
            self.totals["aggregation_error"] = line["aggregation_error"]
        if "refused" in line:
            self.totals["refused"] = dict(islice(line["refused"].items(), MOST_REFUSED))
            self.totals["refused_count"] = len(line["refused"])
        if line["kind"] == "evaluate":
            self._add_evaluation(line)
        if line["kind"] == "resumed_anyway":
            notes = self.totals.setdefault("resumed_anyway", [])
            notes.append({"round": line["round"], "changed": line["changed"]})
        self.totals["stopped_early"] |= line["kind"] == "stop"

    def _add_evaluation(self, line: Mapping[str, Any]) -> None:
        best = self.best.add(line["round"], line.get(self.best.metric))
        self.watched.add(line["round"], line.get(self.watched.metric))
        if best or self.config.evaluate.select == "last" or self.best.round is None:
            self.totals |= {key: line.get(key) for key in self.figures}

    def selected_round(self) -> int:
        """Name the round whose model and figures the run would end with: the last if there is no best."""
        best = self.best.round if self.config.evaluate.select == "best" else None
        return self.totals["rounds"] if best is None else best

    def stops_after(self, server_round: int) -> bool:
        """Say whether the run has waited long enough for a better evaluation, with rounds left to save."""
        stopping = self.config.stopping
        waited = self.watched.waited >= stopping.patience
        return stopping.metric is not None and waited and server_round < self.config.num_rounds
