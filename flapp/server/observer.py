"""Observe a run: time each phase, write metrics.jsonl, progress.json and TensorBoard events, and sum up metrics.

The run and the strategy report events to the observer; it never makes decisions.
"""

import importlib.util
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from flapp.config.schema import Config, ConfigError
from flapp.files import finite
from flapp.listing import by_kind, by_reason
from flapp.server import LOGGER
from flapp.server.publish import count_kinds, is_whole, published
from flapp.server.summary import Summary

PHASES = ("configure", "send", "train", "aggregate", "evaluate", "central", "save")
SHOWN_SECONDS = 0.2  # between two updates of progress.json


class Stopwatch:
    """Divide a round's wall time into phases, of which one is always running."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin a round with its first phase."""
        self.phase = PHASES[0]
        self.phases = dict.fromkeys(PHASES, 0.0)
        self._began = self._entered = time.monotonic()

    def enter(self, phase: str) -> None:
        """End the running phase and begin another."""
        now = time.monotonic()
        self.phases[self.phase] += now - self._entered
        self.phase, self._entered = phase, now

    def end(self) -> tuple[float, dict[str, float]]:
        """End the round and return its seconds and those of each phase; the next round begins at this moment."""
        self.enter(PHASES[0])
        seconds, phases = self._entered - self._began, {name: round(t, 6) for name, t in self.phases.items()}
        self.start()
        return round(seconds, 6), phases


class Observer:
    """Write down what happens in a run; `metrics` is its metrics.jsonl, opened to read and append."""

    def __init__(self, folder: Path, config: Config, metrics: TextIO) -> None:
        self.folder = folder
        self.config = config
        self.summary = Summary(config)
        self.clock = Stopwatch()
        self._metrics = metrics
        self._events: Events | None = None
        self._started = time.monotonic()
        self._shown = 0.0

    def enter(self, phase: str) -> None:
        """Begin a phase of the round."""
        self.clock.enter(phase)

    def sent(self) -> None:
        """Note that all messages of a phase have been handed over."""
        if self.clock.phase == "send":
            self.clock.enter("train")

    def append(self, kind: str, server_round: int, **values: Any) -> None:
        """Add a line to metrics.jsonl; later lines of a kind do not replace earlier ones.

        metrics.json, TensorBoard's events and the commands take what they say of finished rounds from these lines.
        """
        whole = {"kind": kind, "round": server_round, "time": self.seconds(), **values}
        line = finite(published(self.config.privacy, whole))
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
        self._metrics.flush()
        self.summary.add(line)
        if self._events:
            self._events.add(line)

    def warn(self, server_round: int, texts: Sequence[str], instead: str) -> None:
        """Log warnings about single clients; with privacy.publish=totals, log `instead` once in place of them all."""
        if not is_whole(self.config.privacy):
            texts = [instead] if texts else []
        for text in texts:
            LOGGER.warning("round %d: %s", server_round, text)

    def warn_of_failures(self, server_round: int, failures: Mapping[str, str]) -> str:
        """Log whom a phase left out and why, by client, as far as that is published; return it in one line."""
        instead = by_kind(count_kinds(failures.values()))
        self.warn(server_round, [f"client {name}: {reason}" for name, reason in sorted(failures.items())], instead)
        return by_reason(failures, 3) if is_whole(self.config.privacy) else instead

    def end_round(self, server_round: int, store: Mapping[str, int]) -> None:
        """Write a round's last line; store: the bytes that the server's store took."""
        seconds, phases = self.clock.end()
        self.append("round", server_round, seconds=seconds, phases=phases, store=store)

    def show_progress(self, server_round: int, phase: str, done: int, asked: int) -> None:
        """Write the current state to progress.json; within a phase at most every SHOWN_SECONDS."""
        now = time.monotonic()
        if done not in (0, asked) and now < self._shown + SHOWN_SECONDS:
            return
        self._shown = now
        values = {"round": server_round, "rounds": self.config.num_rounds, "phase": phase, "replies": done}
        partial = self.folder / "progress.json.tmp"
        partial.write_text(json.dumps(values | {"asked": asked}))
        os.replace(partial, self.folder / "progress.json")  # not synced: it is of no use after a power cut

    def open_events(self) -> None:
        """Write TensorBoard events from now on, if the config says so; raises ConfigError without its package."""
        if self.config.results.tensorboard:
            lines = map(json.loads, self.texts())
            self._events = Events(self.folder / "tensorboard", time.time() - self.seconds(), lines)

    def seconds(self) -> float:
        """Return the seconds since the run began, without the pauses between starts."""
        return round(time.monotonic() - self._started, 3)

    def texts(self) -> list[str]:
        """Return all of metrics.jsonl, line by line."""
        self._metrics.seek(0)
        return self._metrics.read().splitlines(keepends=True)

    def keep(self, texts: Iterable[str], seconds: float) -> None:
        """Cut metrics.jsonl down to these first lines; seconds: the `time` of the last of them."""
        self._started -= seconds
        self._metrics.truncate(sum(len(text.encode()) for text in texts))
        self._metrics.seek(0, os.SEEK_END)

    def sync(self) -> None:
        """Wait until metrics.jsonl is on disk."""
        os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Close the files, which gives up the lock on the run."""
        if self._events:
            self._events.close()
        self._metrics.close()


class Events:
    """Write TensorBoard events: the numbers of metrics.jsonl, as `scalars` names them, over rounds.

    lines: the lines that metrics.jsonl already has. Their numbers are written as events again, and TensorBoard ignores
    the events of earlier starts. began: now, less the seconds that the run has taken, in seconds since the epoch.
    Raises ConfigError without the package tensorboard.
    """

    def __init__(self, folder: Path, began: float, lines: Iterable[Mapping[str, Any]]) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter  # slow, and rarely needed

        self._began = began
        self._writer = SummaryWriter(str(folder), purge_step=0 if folder.exists() else None)
        for line in lines:
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Write the numbers of a line; at the end of a round they are on disk."""
        for tag, value in scalars(line).items():
            self._writer.add_scalar(tag, value, line["round"], walltime=self._began + line["time"])
        if line["kind"] == "round":
            self._writer.flush()

    def close(self) -> None:
        """Write the remaining events."""
        self._writer.close()


def check_tensorboard() -> None:
    """Raise ConfigError when the package tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "results.tensorboard=true needs the package tensorboard, which is not installed: "
            'pip install -e ".[tensorboard]", or set results.tensorboard=false'
        )


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line as <kind>/<key>; a list counts as its length.

    Of the objects, only `phases`, `store` and those named `*_spread` count; values by client are left out, for example.
    """
    found: dict[str, Any] = {}
    for key, value in line.items():
        if key in ("phases", "store") or key.endswith("_spread"):
            found |= {f"{key}/{name}": inner for name, inner in value.items()}
        elif key not in ("round", "time"):
            found[key] = len(value) if isinstance(value, list) else value
    return {f"{line['kind']}/{key}": value for key, value in found.items() if isinstance(value, int | float)}
