"""A run as the report needs it: lines by kind, what is known of single clients, checkpoint stores added up."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flapp.server.observer import PHASES
from flapp.server.summary import is_finite, is_number
from tools.cli import by_number

# Settings that say nothing about the experiment, so they are not compared.
OWN_NAMES = ("run_name", "resume", "resume_from", "resume_anyway")
PLACES = ("home", "deployment.", "split.")  # settings, or the groups of them, that say where a run took place
MOST_NAMED, LONGEST_NAME = 3, 38  # settings in the name of a run in legends, and its characters
SPLITS = ("train", "val", "test")
Points = tuple[np.ndarray, np.ndarray]  # rounds and values


@dataclass
class Clients:
    """What the lines say about single clients, gathered over the rounds."""

    sums: dict[str, Counter[str]] = field(default_factory=dict)  # client_bytes_up, client_bytes_down, client_seconds
    last: dict[str, dict[str, float]] = field(default_factory=dict)  # the accuracies by client, and client_ranks
    failures: dict[tuple[str, str], list[tuple[int, str]]] = field(default_factory=dict)  # kind, reason: round, client
    absent: Counter[str] = field(default_factory=Counter)
    capped: dict[str, list[tuple[float, int]]] = field(default_factory=dict)  # client: claimed share, round
    clipped: dict[str, list[tuple[float, int]]] = field(default_factory=dict)  # client: factor, round
    not_taken: dict[str, list[int]] = field(default_factory=dict)  # by krum or multi_krum; client: rounds

    def fold(self, line: dict[str, Any]) -> dict[str, Any]:
        """Take what a line says about single clients and return the rest of it."""
        for key in ("client_bytes_up", "client_bytes_down", "client_seconds"):
            self.sums.setdefault(key, Counter()).update(line.pop(key, None) or {})
        last = [key for key in line if key.endswith("accuracy_by_client") or key == "client_ranks"]
        self.last |= {key: line.pop(key) for key in last}
        self.absent.update(line.pop("absent", None) or ())
        for failure in line.pop("failures", None) or ():
            self.failures.setdefault((line["kind"], failure["reason"]), []).append((line["round"], failure["client"]))
        for key, found in (("capped", self.capped), ("clipped", self.clipped)):
            for name, value in (line.pop(key, None) or {}).items():
                found.setdefault(name, []).append((value, line["round"]))
        for name in line.pop("left_out", None) or ():
            self.not_taken.setdefault(name, []).append(line["round"])
        return line


@dataclass(frozen=True)
class Stores:
    """Checkpoint stores added up. Only `opened` of the `files` were opened."""

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
    """One run directory. `label` is its letter or number, `differs` names its values where settings differ."""

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
    differs: str = ""

    @property
    def title(self) -> str:
        """Return what legends call the run."""
        return f"{self.label} ({self.differs})" if self.differs else self.label

    @property
    def name(self) -> str:
        return str(self.config.get("run_name") or self.path.name)

    @property
    def status(self) -> str:
        return str(self.summary.get("status") or "unfinished")

    @property
    def withholds(self) -> bool:
        """Say whether the run wrote down totals only, and nothing about single clients."""
        return self.config.get("privacy.publish") == "totals"

    @property
    def rounds(self) -> int:
        """Return the number of completed rounds, or of started ones in a run of an older flapp."""
        told = self.lines.get("round") or [line for lines in self.lines.values() for line in lines]
        return max((line["round"] for line in told), default=0)

    @property
    def objective(self) -> str:
        """Name the figure by which rounds and runs are compared: on validation samples if there are any."""
        name = str(self.config.get("evaluate.objective") or "accuracy")
        return f"val_{name}" if len(self.series("evaluate", f"val_{name}")[0]) else name

    def series(self, kind: str, key: str) -> Points:
        """Return the rounds whose line of a kind has a finite number under a key (a.b if nested), and the numbers."""
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
        """Return rounds and seconds by phase; of a run without `round` lines those of training and evaluation."""
        if self.lines.get("round"):
            found = {name: self.series("round", f"phases.{name}") for name in PHASES}
        else:
            found = {name: self.series(name, "seconds") for name in ("train", "evaluate")}
        return {name: pair for name, pair in found.items() if pair[1].any()}

    def roster(self, key: str) -> dict[str, Any]:
        """Return what the starts of the run say about single clients; the latest start counts."""
        said: dict[str, Any] = dict(self.summary.get(key) or {}) if key == "refused" else {}
        for line in (*self.lines.get("roster", ()), *self.lines.get("refused", ())):
            said |= line.get(key) or {}
        for line in self.lines.get("client", ()):
            found = {"samples": {split: line.get(split, 0) for split in SPLITS}, "label_hist": line.get("labels")}
            if key in found and {"client", "labels"} <= line.keys():  # earlier versions wrote the digest alone
                said[line["client"]] = found[key]
        return dict(sorted(said.items(), key=lambda item: by_number(item[0])))

    def resumed_anyway(self) -> list[tuple[int, list[str]]]:
        """Return after which rounds the run was resumed although something had changed, and what."""
        lines = self.lines.get("resumed_anyway") or self.summary.get("resumed_anyway") or ()
        return [(line["round"], line.get("changed") or ["not recorded what"]) for line in lines]


@dataclass(frozen=True)
class Job:
    """One job of a sweep, from its sweep.json."""

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


def names_of(runs: list[Run]) -> list[str]:
    """Name each run by the settings in which the runs differ, as `lr=0.1, seed=0`, or by its own name.

    Settings that always change together, such as seed and partition.seed, are named once, by the shortest name.
    """
    alike: dict[tuple[str, ...], str] = {}
    for key in differing(runs):
        if not key.startswith(PLACES):
            values = tuple(repr(run.config.get(key)) for run in runs)
            alike[values] = min(alike.get(values, key), key, key=lambda name: (name.count("."), len(name), name))
    every = list(dict.fromkeys(key for run in runs for key in run.config))
    keys = sorted(alike.values(), key=every.index)
    said = [", ".join(f"{short(key)}={_brief(run.config.get(key))}" for key in keys[:MOST_NAMED]) for run in runs]
    more = ", …" if len(keys) > MOST_NAMED else ""
    names = [text + more if text and run.config else run.name for text, run in zip(said, runs, strict=True)]
    return [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names]


def short(key: str) -> str:
    """Return the last part of a setting's name, or its group if that says more: train.lr is lr, model.name is model."""
    group, _, last = key.rpartition(".")
    return group.rpartition(".")[2] if group and last in ("name", "kind", "enabled") else last


def _brief(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | None) else str(value)


def differing(runs: list[Run]) -> list[str]:
    """Name the settings in which these runs differ. The run's name and the resume settings do not count."""
    known = [run for run in runs if run.config]
    keys = sorted({key for run in known for key in run.config} - set(OWN_NAMES))
    return [key for key in keys if len({repr(run.config.get(key)) for run in known}) > 1]
