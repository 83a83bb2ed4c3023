"""The lock on a run directory: one process at a time writes there, and running.json says which.

The system releases the lock when that process ends, however it ends. running.json may be left over then: it counts only
while somebody holds the lock.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from flapp.config.schema import ConfigError

METRICS, RUNNING = "metrics.jsonl", "running.json"
PROBE_SECONDS = 0.5  # find_holder, and check_resumable in results.py, hold the lock for a moment only


def lock_run(path: Path, run_name: str) -> TextIO:
    """Open metrics.jsonl of the run directory `path` and lock it until it is closed; raises ConfigError."""
    if (path / METRICS).exists() and not (path / METRICS).is_file():  # opening a pipe would block
        raise ConfigError(f"{path / METRICS} is not a regular file: restore the run directory from a copy")
    end = time.monotonic() + PROBE_SECONDS
    while (file := _open_locked(path)) is None:
        if time.monotonic() > end:
            pid = _read_holder(path).get("pid")
            raise ConfigError(
                f"run_name={run_name} is still running{f' (pid {pid})' if pid else ''}: wait until it ends, or stop it "
                f"with `python -m tools.runs stop {run_name}`, before resume=true"
            )
        time.sleep(PROBE_SECONDS / 10)
    return file


@contextmanager
def held_lock(path: Path) -> Iterator[bool]:
    """Hold the lock of the run directory `path` meanwhile, if no other process has it; say whether it is held."""
    file = _open_locked(path)
    try:
        yield file is not None
    finally:
        if file:
            file.close()


def name_holder(path: Path, run_id: int | None) -> None:
    """Write who holds the lock into running.json: this process, and the id that Flower gave the run."""
    (path / RUNNING).write_text(json.dumps({"pid": os.getpid(), "run_id": run_id}))


def find_holder(path: Path) -> dict[str, Any] | None:
    """Return the content of running.json while a process holds the lock of the run directory, None otherwise."""
    try:
        with (path / METRICS).open() as file:
            return None if _lock(file, fcntl.LOCK_SH) else _read_holder(path)
    except FileNotFoundError:
        return None


def _open_locked(path: Path) -> TextIO | None:
    """Return metrics.jsonl, locked, or None when another process has it or has just put another folder here."""
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
    """Return what running.json says; an empty dict if it has not been written yet."""
    try:
        return dict(json.loads((path / RUNNING).read_text()))
    except (FileNotFoundError, ValueError):
        return {}
