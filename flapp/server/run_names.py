"""Which process may use which folder of home/runs: free names, failed starts, and the lock.

A run that ended before its first round was complete is a failed start, unless it has counted releases. The next start
of its name replaces its folder, except log.txt, even if it has other settings. Only one process at a time writes in a
run's folder: it holds a lock on metrics.jsonl, which the system releases when that process ends, however it ends.
running.json names the process; it counts only while somebody holds the lock.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from flapp.config.schema import Config, ConfigError
from flapp.files import write_json
from flapp.server.summary import read_whole_line, sound_summary
from flapp.untrusted import read_json

METRICS, RUNNING, STORE, CLASSES = "metrics.jsonl", "running.json", "server_chunks.db", "classes.json"
PROBE_SECONDS = 0.5  # other processes hold the lock for a moment to see whether the run is still running


def is_run(path: Path) -> bool:
    """Say whether a folder is a run directory."""
    return (path / "config.yaml").exists()


def taken(config: Config) -> str:
    """Return the error for a new run whose name is taken."""
    path = config.runs_dir / config.run_name
    return f"run_name={config.run_name} is taken: {path} exists; choose another name, or set resume=true to continue it"


def check_new(config: Config) -> Path:
    """Return the folder for a new run; raises ConfigError when it is taken, or inside another run's."""
    path = config.runs_dir / config.run_name
    if path.exists() and not restarts(config):
        fix = f"{path} exists and is not a run (a sweep's folder has runs inside): choose another name"
        raise ConfigError(taken(config) if is_run(path) else f"run_name={config.run_name} is taken: {fix}")
    for outer in path.parents[: len(Path(config.run_name).parts) - 1]:
        if is_run(outer):
            found = f"run_name={config.run_name} lies inside the folder of run {outer.relative_to(config.runs_dir)}"
            raise ConfigError(f"{found}, which writes and removes files there: choose another name")
    return path


def restarts(config: Config) -> bool:
    """Say whether the run has the name of a failed start, whose folder the new start replaces."""
    return config.resume_from is None and is_failed_start(config.runs_dir / config.run_name)


def is_failed_start(path: Path) -> bool:
    """Say whether a run is a failed start. A run that is still running is none."""
    if not is_run(path):
        return False
    try:
        with held_lock(path) as held:
            return held and _has_no_round(path)
    except (OSError, ValueError):
        return False  # a folder that we may not write, or a damaged file


def put_in_place(made: Path, path: Path, config: Config) -> None:
    """Rename the folder `made` of a new run to `path`; a failed start there is removed, but its log.txt is kept."""
    if not path.exists():
        made.rename(path)
        return
    with held_lock(path) as held:
        if not held or not _has_no_round(path):
            raise ConfigError(taken(config))
        if (path / "log.txt").exists():
            shutil.copy(path / "log.txt", made)
        old = made.with_name(f"{made.name}.old")
        path.rename(old)
        made.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _has_no_round(path: Path) -> bool:
    summary = path / "metrics.json"
    if summary.exists() and sound_summary(read_json(summary))[0].get("status") != "failed":
        return False
    if any((path / name).exists() for name in ("model.safetensors", "releases.jsonl", "release.safetensors")):
        return False  # the count of private releases must not be lost
    lines = [read_whole_line(text) for text in (path / METRICS).read_text().splitlines(keepends=True)]
    if any(line.get("kind") == "round" or line.get("round", 0) > 1 for line in lines if line is not None):
        return False
    if not (path / STORE).exists():
        return not lines  # without lines the run was killed before it made its store; with lines the store was removed
    try:
        with ChunkManager(path / STORE, create=False) as store:
            return not store.rounds()
    except CheckpointError:
        return False


def lock_run(path: Path, run_name: str) -> TextIO:
    """Open metrics.jsonl of a run directory, locked until it is closed; raises ConfigError if the run is running."""
    if (path / METRICS).exists() and not (path / METRICS).is_file():  # opening a pipe would block
        raise ConfigError(f"{path / METRICS} is not a regular file: restore the run directory from a copy")
    end = time.monotonic() + PROBE_SECONDS
    while (file := _open_locked(path)) is None:
        if time.monotonic() > end:
            pid = _read_holder(path).get("pid")
            fix = f"wait until it ends, or stop it with `python -m tools.runs stop {run_name}`, before resume=true"
            raise ConfigError(f"run_name={run_name} is still running{f' (pid {pid})' if pid else ''}: {fix}")
        time.sleep(PROBE_SECONDS / 10)
    return file


@contextmanager
def held_lock(path: Path) -> Iterator[bool]:
    """Lock a run directory inside the block, if it is free; yield whether the lock was acquired."""
    with _open_locked(path) or nullcontext() as file:
        yield file is not None


def name_holder(path: Path, run_id: int | None) -> None:
    """Write into running.json who holds the lock: this process, and Flower's id of the run."""
    write_json(path / RUNNING, {"pid": os.getpid(), "run_id": run_id})


def find_holder(path: Path) -> dict[str, Any] | None:
    """Return the content of running.json if a process holds the lock of the run directory, otherwise None."""
    try:
        with (path / METRICS).open() as file:
            return None if _lock(file, fcntl.LOCK_SH) else _read_holder(path)
    except FileNotFoundError:
        return None


def _open_locked(path: Path) -> TextIO | None:
    """Return metrics.jsonl, locked, or None when another process holds the lock or has just replaced the folder."""
    file = (path / METRICS).open("a+")
    if _lock(file, fcntl.LOCK_EX):
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (path / METRICS).stat()):
                return file
    file.close()
    return None


def _lock(file: TextIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_holder(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / RUNNING).read_text()))
    except (FileNotFoundError, ValueError):
        return {}
