"""Which folder of home/runs a run may have: a new one, or that of a failed start of its name.

A run that ended before its first round was complete is a failed start. The next start of its name replaces its folder,
all but log.txt, whatever the settings of either.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from flapp.checkpoint import CheckpointError, ChunkManager
from flapp.metric_lines import read_line, sound_summary
from flapp.settings import Config, ConfigError
from flapp.untrusted import read_json

METRICS, STORE = "metrics.jsonl", "server_chunks.db"


def taken(config: Config) -> str:
    """Say that a new run cannot have the name it asks for."""
    path = config.runs_dir / config.run_name
    return f"run_name={config.run_name} is taken: {path} exists; choose another name, or set resume=true to continue it"


def restarts(config: Config) -> bool:
    """Say whether the name of this run is that of a failed start, whose folder the new start replaces."""
    return config.resume_from is None and is_failed_start(config.runs_dir / config.run_name)


def is_failed_start(path: Path) -> bool:
    """Say whether a run ended before its first round was complete. A run that is still running did not."""
    if not is_run(path):
        return False
    try:
        with _lock(path / METRICS) as lock:
            return lock is not None and _has_no_round(path)
    except (OSError, ValueError):
        return False  # a folder that we may not write, or a file that is damaged


def check_new(config: Config) -> Path:
    """Return the folder that a new run will have; raises ConfigError when it is taken, or inside another run's."""
    path = config.runs_dir / config.run_name
    if path.exists() and not restarts(config):
        fix = f"{path} exists and is not a run (a sweep's folder has runs inside): choose another name"
        raise ConfigError(taken(config) if is_run(path) else f"run_name={config.run_name} is taken: {fix}")
    for outer in path.parents[: len(Path(config.run_name).parts) - 1]:
        if is_run(outer):
            raise ConfigError(
                f"run_name={config.run_name} lies inside the folder of run {outer.relative_to(config.runs_dir)}, "
                "which writes and removes files there: choose another name"
            )
    return path


def is_run(path: Path) -> bool:
    return (path / "config.yaml").exists()


def _has_no_round(path: Path) -> bool:
    """Say whether no file in the folder of a run tells of a complete round."""
    summary = path / "metrics.json"
    if summary.exists() and sound_summary(read_json(summary))[0].get("status") != "failed":
        return False
    if any((path / name).exists() for name in ("model.safetensors", "releases.jsonl")):
        return False  # what clients have released privately is counted for ever
    lines = [parse(text) for text in (path / METRICS).read_text().splitlines(keepends=True)]
    if any(line.get("kind") == "round" or line.get("round", 0) > 1 for line in lines if line is not None):
        return False
    if not (path / STORE).exists():
        return not lines  # it was killed before it made one; otherwise the store was taken away
    try:
        with ChunkManager(path / STORE, create=False) as store:
            return not store.rounds()
    except CheckpointError:
        return False


def put_in_place(made: Path, path: Path, config: Config) -> None:
    """Give the folder of a new run its name; a failed start of that name is removed, and leaves its log.txt.

    Raises ConfigError when something else has that name by now.
    """
    if not path.exists():
        made.rename(path)
        return
    with _lock(path / METRICS) as lock:
        if lock is None or not _has_no_round(path):
            raise ConfigError(taken(config))
        if (path / "log.txt").exists():
            shutil.copy(path / "log.txt", made)
        old = made.with_name(made.name.replace(".new-", ".old-"))
        path.rename(old)
        made.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def open_locked(path: Path, config: Config) -> TextIO:
    """Open a file and keep other processes out for as long as it is open; the system lets go when we are killed."""
    if path.exists() and not path.is_file():  # opening a pipe would block
        raise ConfigError(f"{path} is not a regular file: restore the run directory from a copy")
    file = path.open("a+")
    if not _is_locked(file, path):
        file.close()
        raise ConfigError(f"run_name={config.run_name} is still running: stop it before resume=true")
    return file


@contextmanager
def _lock(path: Path) -> Iterator[TextIO | None]:
    """Hold the lock of a run's file meanwhile; None when another process has it."""
    with path.open("a+") as file:
        yield file if _is_locked(file, path) else None


def _is_locked(file: TextIO, path: Path) -> bool:
    """Lock an open file, which must still be the one at `path`, and say whether that was possible."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def parse(text: str) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl, or None when it was torn off or is not a line of a run."""
    try:
        return read_line(text) if text.endswith("\n") else None
    except ValueError:
        return None
