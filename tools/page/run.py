"""What a run directory says, as the report needs it: lines by kind, clients folded together, stores added up."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flapp.metric_lines import is_finite, is_number
from flapp.stopwatch import PHASES

OWN_NAMES = ("run_name", "resume")  # settings in which any two runs differ
Points = tuple[np.ndarray, np.ndarray]  # rounds and values


@dataclass
class Failures:
    """One reason for which clients were left out: how often, in which rounds, who."""

    count: int = 0
    rounds: set[int] = field(default_factory=set)
    clients: set[str] = field(default_factory=set)


@dataclass
class Clients:
    """What the lines say of single clients, folded over the rounds."""

    sums: dict[str, Counter[str]] = field(default_factory=dict)  # client_bytes_up, client_bytes_down, client_seconds
    last: dict[str, dict[str, float]] = field(default_factory=dict)  # accuracy_by_client and the personal one
    failures: dict[tuple[str, str], Failures] = field(default_factory=dict)  # by kind and reason
    failed: Counter[str] = field(default_factory=Counter)
    absent: Counter[str] = field(default_factory=Counter)

    def fold(self, line: dict[str, Any]) -> dict[str, Any]:
        """Take what a line says of single clients and return the rest of it."""
        for key in ("client_bytes_up", "client_bytes_down", "client_seconds"):
            self.sums.setdefault(key, Counter()).update(line.pop(key, None) or {})
        self.last |= {key: line.pop(key) for key in list(line) if key.endswith("accuracy_by_client")}
        self.absent.update(line.pop("absent", None) or ())
        for failure in line.pop("failures", None) or ():
            found = self.failures.setdefault((line["kind"], failure["reason"]), Failures())
            found.count += 1
            found.rounds.add(line["round"])
            found.clients.add(failure["client"])
            self.failed[failure["client"]] += 1
        return line


@dataclass(frozen=True)
class Stores:
    """Checkpoint stores added up: of so many files, so many opened."""

    files: int = 0
    file_bytes: int = 0
    opened: int = 0
    rounds: int = 0
    logical_bytes: int = 0
    stored_bytes: int = 0
    config_digest: str = ""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """What one run directory says; `label` is what figures call it."""

    path: Path
    label: str
    config: dict[str, Any]  # by dotted name
    summary: dict[str, Any]  # metrics.json
    progress: dict[str, Any]
    lines: dict[str, list[dict[str, Any]]]  # by kind
    clients: Clients
    server: Stores | None
    homes: Stores | None  # of the clients
    log: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.config.get("run_name") or self.path.name)

    @property
    def status(self) -> str:
        return str(self.summary.get("status") or "unfinished")

    @property
    def rounds(self) -> int:
        """Return how many rounds are over, or were begun in a run that does not say which are over."""
        told = self.lines.get("round") or [line for lines in self.lines.values() for line in lines]
        return max((line["round"] for line in told), default=0)

    @property
    def objective(self) -> str:
        """Name the figure that rounds and runs are compared by: of validation samples where they are measured."""
        name = str(self.config.get("evaluate.objective") or "accuracy")
        return f"val_{name}" if len(self.series("evaluate", f"val_{name}")[0]) else name

    def series(self, kind: str, key: str) -> Points:
        """Return the rounds in which a kind of line has a finite number under a key (a.b if nested), and these."""
        found = {line["round"]: value for line in self.lines.get(kind, ()) if (value := number(line, key)) is not None}
        return np.array(list(found), int), np.array(list(found.values()), float)

    def total(self, key: str) -> int:
        """Return bytes_up or bytes_down, from the summary or else from the lines."""
        return int(self.summary.get(key) or sum(self.series(kind, key)[1].sum() for kind in self.lines))

    def final(self, key: str) -> float | None:
        """Return the last figure of the evaluation, from the summary or else from the lines."""
        value = self.summary.get(key)
        return value if is_number(value) else next(iter(self.series("evaluate", key)[1][::-1]), None)

    def best(self) -> tuple[int | None, float | None]:
        """Return the round in which evaluate.objective was best, and its value then."""
        if self.summary.get("best_round") is not None:
            return self.summary["best_round"], self.summary.get("best_value")
        rounds, values = self.series("evaluate", self.objective)
        if not len(values):
            return None, None
        at = int(values.argmin() if self.objective.endswith("loss") else values.argmax())
        return int(rounds[at]), float(values[at])

    def phases(self) -> dict[str, Points]:
        """Return rounds and seconds by phase; of a run without `round` lines those of its two exchanges."""
        if self.lines.get("round"):
            found = {name: self.series("round", f"phases.{name}") for name in PHASES}
        else:
            found = {name: self.series(name, "seconds") for name in ("train", "evaluate")}
        return {name: pair for name, pair in found.items() if pair[1].any()}

    def roster(self, key: str) -> dict[str, Any]:
        """Return what the starts of the run say of single clients, the latest first to be believed."""
        said: dict[str, Any] = {}
        for line in (*self.lines.get("roster", ()), *self.lines.get("refused", ())):
            said |= line.get(key) or {}
        return dict(sorted(said.items(), key=lambda item: by_number(item[0])))


@dataclass(frozen=True)
class Job:
    """One job of a sweep, as its sweep.json tells it."""

    number: str
    overrides: str
    status: str
    error: str
    objective: float | None


def number(values: Mapping[str, Any], key: str) -> float | None:
    """Return the finite number under a dotted key, or None."""
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if is_finite(value) else None


def by_number(name: str) -> list[tuple[str, int]]:
    """Return a key that sorts client 2 before client 10."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def differing(runs: list[Run]) -> list[str]:
    """Name the settings in which runs differ, but for those in which any two do."""
    known = [run for run in runs if run.config]
    keys = sorted({key for run in known for key in run.config} - set(OWN_NAMES))
    return [key for key in keys if len({repr(run.config.get(key)) for run in known}) > 1]
