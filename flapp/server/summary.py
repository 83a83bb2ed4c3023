"""Read the lines of metrics.jsonl safely, and sum them up for metrics.json.

These files may contain anything in place of a number, because people copy and edit them. This module imports nothing
slow: commands read the results of runs with it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeGuard

from flapp.config.schema import Config
from flapp.untrusted import parse_json

Check = Callable[[Any], bool]
LAST_ROUND = 1 << 31
FIGURES = ("accuracy", "loss", "personal_accuracy")
VALIDATION_FIGURES = tuple(f"val_{figure}" for figure in FIGURES)
STARTS = ("", "personal_", "val_", "val_personal_")
SCORES = tuple(f"{start}scores" for start in STARTS)  # of the user's own metrics, by name
MOST_REFUSED = 20


def is_number(value: Any) -> TypeGuard[int | float]:
    """Say whether a value is a number; True and False are not, NaN and infinities are."""
    return type(value) in (int, float)


def is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def is_round(value: Any) -> bool:
    return type(value) is int and 0 <= value < LAST_ROUND


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _object_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_failure(value: Any) -> bool:
    return isinstance(value, dict) and is_text(value.get("client")) and is_text(value.get("reason"))


def _is_change(value: Any) -> bool:
    return isinstance(value, dict) and is_round(value.get("round")) and _list_of(is_text)(value.get("changed"))


LINE_CHECKS: dict[str, Check] = {
    **{"kind": is_text, "round": is_round, "time": is_finite, "seconds": is_number, "source_digest": is_text},
    **dict.fromkeys(("bytes_up", "bytes_down"), is_finite),
    **dict.fromkeys(("phases", "store"), _object_of(is_number)),
    **dict.fromkeys(("client_seconds", "client_bytes_up", "client_bytes_down"), _object_of(is_number)),
    **dict.fromkeys(("loss", "accuracy", "personal_loss", "personal_accuracy"), _or_none(is_number)),
    **dict.fromkeys(("accuracy_by_client", "personal_accuracy_by_client"), _object_of(_or_none(is_number))),
    **dict.fromkeys(("loss_spread", "accuracy_spread"), _object_of(_or_none(is_number))),
    **dict.fromkeys(("personal_loss_spread", "personal_accuracy_spread"), _object_of(_or_none(is_number))),
    **dict.fromkeys(("refused", "warnings"), _object_of(is_text)),
    **{"aggregation_error": _or_none(is_number), "absent": _list_of(is_text), "failures": _list_of(_is_failure)},
    **{"samples": _object_of(_object_of(is_number)), "label_hist": _object_of(_list_of(is_finite))},
    **{"capped": _object_of(is_finite), "client_ranks": _object_of(is_number), "update_norm": _or_none(is_number)},
    **{"changed": _list_of(is_text), "absent_count": is_round, "clipped": _object_of(is_finite)},
    **{"left_out": _list_of(is_text), "failure_kinds": _object_of(is_round)},
    **dict.fromkeys(("refused_count", "warning_count", "failure_count", "capped_count", "val_capped_count"), is_round),
    **dict.fromkeys(("clipped_count", "left_out_count"), is_round),
    **dict.fromkeys(("epsilon", "clipping_norm", "within_clip", "budget", "value"), _or_none(is_number)),
    **{f"{start}{key}": _object_of(_or_none(is_number)) for start in STARTS for key in ("sums", "scores")},
    **{"client": is_text, "train": is_number, "val": is_number, "test": is_number, "labels": _list_of(is_finite)},
}
SUMMARY_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("status", "error", "model_sha256", "run_dir"), is_text),
    **dict.fromkeys(("bytes_up", "bytes_down", "seconds"), is_finite),
    **dict.fromkeys(("rounds", "best_round", "selected_round"), is_round),
    **dict.fromkeys(("accuracy", "loss", "personal_accuracy", "personal_loss", "objective"), is_number),
    **dict.fromkeys(("best_value", "aggregation_error", "epsilon", "delta"), is_number),
    **dict.fromkeys(SCORES, _object_of(_or_none(is_number))),
    **{"refused": _object_of(is_text), "refused_count": is_round, "resumed_anyway": _list_of(_is_change)},
}


def read_line(text: bytes | str, kind: str | None = None) -> dict[str, Any]:
    """Return a line of metrics.jsonl; raises ValueError unless it is JSON and its known keys hold the right types.

    kind: for a file in which all lines are of this kind; lines written by earlier versions lack it.
    """
    line = parse_json(text, surrogates=True)  # the reasons for failures come from clients
    if kind is not None and isinstance(line, dict) and line.setdefault("kind", kind) != kind:
        raise ValueError(f"it is not of kind {kind}")
    if not isinstance(line, dict) or not {"kind", "round"} <= line.keys():
        raise ValueError("it is not an object with a kind and a round")
    if odd := [key for key, check in LINE_CHECKS.items() if key in line and not check(line[key])]:
        raise ValueError(f"its {odd[0]} is not of the right type")
    return line


def read_whole_line(text: str) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl, or None if it was cut off while it was written or is not a line of a run."""
    try:
        return read_line(text) if text.endswith("\n") else None
    except ValueError:
        return None


def sound_summary(values: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the sound values of metrics.json, and the keys whose values were left out."""
    if not isinstance(values, dict):
        return {}, ["everything"]
    odd = [key for key, check in SUMMARY_CHECKS.items() if values.get(key) is not None and not check(values[key])]
    return {key: value for key, value in values.items() if key not in odd}, odd


class StoppedEarly(Exception):
    """Ends Flower's loop of rounds after a complete round."""


@dataclass
class Best:
    """The best value of a metric so far, its round, and how many evaluations ago it last improved by over min_delta."""

    metric: str
    min_delta: float = 0.0
    round: int | None = None
    value: float | None = None
    waited: int = 0
    mark: float = -math.inf

    def add(self, server_round: int, value: float | None) -> bool:
        """Add an evaluation and say whether it is the best: it must be finite and better than all earlier ones."""
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
        if value is None or not math.isfinite(value):
            return -math.inf
        return -value if self.metric.endswith("loss") else value


def figure_of(config: Config, metric: str) -> str:
    """Return the figure that stands for the setting `metric`: of validation samples, if the run has any."""
    return f"val_{metric}" if config.validates else metric


def in_words(figure: str) -> str:
    """Return the name of a figure as people read it, such as `validation accuracy` for val_accuracy."""
    return figure.replace("val_", "validation ").replace("_", " ")


def in_short(scores: Mapping[str, float]) -> dict[str, str]:
    """Return the user's own scores as people read them."""
    return {name.replace("_", " "): f"{value:.4f}" for name, value in scores.items()}


class Summary:
    """Add up lines: `totals` goes into metrics.json, `best` is the best round by evaluate.objective."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.totals: dict[str, Any] = {"rounds": 0, "bytes_up": 0, "bytes_down": 0, "stopped_early": False}
        self.figures = FIGURES + (VALIDATION_FIGURES if config.validates else ())
        self.best = Best(figure_of(config, config.evaluate.objective))
        watched = config.stopping.metric or config.evaluate.objective
        self.watched = Best(figure_of(config, watched), config.stopping.min_delta)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line."""
        self.totals["rounds"] = max(self.totals["rounds"], line["round"])
        for key in ("bytes_up", "bytes_down"):
            self.totals[key] += line.get(key, 0)
        if "aggregation_error" in line:
            self.totals["aggregation_error"] = line["aggregation_error"]
        if "refused" in line:
            self.totals["refused"] = dict(islice(line["refused"].items(), MOST_REFUSED))
            self.totals["refused_count"] = len(line["refused"])
        if "refused_count" in line:  # with privacy.publish=totals
            self.totals["refused_count"] = line["refused_count"]
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
            self.totals |= {key: line[key] for key in SCORES if key in line}

    def selected_round(self) -> int:
        """Return the round whose model and figures the run ends with: the last, or the best by evaluate.select=best."""
        best = self.best.round if self.config.evaluate.select == "best" else None
        return self.totals["rounds"] if best is None else best

    def stops_after(self, server_round: int) -> bool:
        """Say whether to stop early: no better evaluation within stopping.patience, and this is not the last round."""
        stopping = self.config.stopping
        waited = self.watched.waited >= stopping.patience
        return stopping.metric is not None and waited and server_round < self.config.num_rounds
