"""Opening an artifact whose bytes are compared with its meta.json, once and not by every process.

    <data>/<dataset>/<split>.verified.json   the stamp of the files when their bytes were last compared

A process that finds the stamp of the files there does not read them again. In a folder that cannot be written, every
process compares once for itself.
"""

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from flapp.data.artifact import Artifact, open_artifact

FILES = ("meta.json", "images.npy", "labels.npy")
Stamp = tuple[tuple[str | int, ...], ...]

_compared: set[Stamp] = set()


def stamp(folder: Path, files: Sequence[str] = FILES) -> Stamp:
    """Return the path, inode, size and times of files in `folder`, which differ once one of them is written or gone."""
    return tuple(_stamp(folder / name) for name in files)


def open_verified(folder: Path) -> Artifact:
    """Open the split in `folder`, whose bytes must be what meta.json says; raises DataError naming what is wrong."""
    artifact, found = open_artifact(folder), stamp(folder)
    if found not in _compared:
        path = _note(folder)
        with _locked(path) as note:
            if not _is_noted(path, found):
                artifact = open_artifact(folder, verify=True)
                if note:
                    note.truncate(0)
                    note.write(json.dumps(found))
        _compared.add(found)
    return artifact


def is_verified(folder: Path) -> bool:
    """Say whether the bytes of the split in `folder` have been compared since they were last written."""
    found = stamp(folder)
    return found in _compared or _is_noted(_note(folder), found)


def _note(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.verified.json")


def _stamp(path: Path) -> tuple[str | int, ...]:
    try:
        facts = path.stat()
    except OSError:
        return (str(path),)
    return str(path), facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


@contextmanager
def _locked(path: Path) -> Iterator[TextIO | None]:
    """Open and lock a file, so that one process compares while others wait; None where it cannot be written."""
    try:
        file = path.open("a")
    except OSError:
        yield None
        return
    with file:
        with suppress(OSError):  # a file system without locks: several processes may compare at once
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _is_noted(path: Path, found: Stamp) -> bool:
    try:
        return bool(json.loads(path.read_text()) == [list(file) for file in found])
    except (OSError, ValueError):
        return False
