"""The two ways to SQLite: Python's own sqlite3, and apsw (extra `fast`), which reads blobs into place.

Both speak the same file format. An error of either has its SQLite result code read by error_code().
"""

import hashlib
import importlib.util
import sqlite3
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from weakref import WeakSet

from flapp.checkpoint.chunks import CheckpointError
from flapp.untrusted import printable

BUSY_SECONDS = 60
NEEDS_FAST = "needs the extra 'fast': pip install \"flapp[fast]\""

REASONS = {  # what to do, by SQLite's primary result code
    5: "another process has held its lock for a minute: wait for it, or stop it",
    8: "it may not be written: check the permissions of the file and its folder",
    10: "its disk fails: look at the system log, and restore the file from a copy if it stays so",
    11: "it is damaged: restore it from a copy, or move it away to start a new one",
    13: "its disk is full, earlier rounds are intact: make room and save again",
    14: "it cannot be opened: check that it is a file in a folder that may be written",
    26: "it is no flapp checkpoint store: move it away, or give another path",
}


_opened: "WeakSet[Stdlib]" = WeakSet()
_opening = threading.Lock()


# Whoever made the file may want to run code by its schema or by damage: SQLITE_DBCONFIG_* that forbid it.
SAFE = {"DEFENSIVE": 1, "TRUSTED_SCHEMA": 0, "ENABLE_TRIGGER": 0, "ENABLE_VIEW": 0}


class Stdlib:
    """Python's sqlite3: a connection to one database, in autocommit mode until BEGIN."""

    name = "stdlib"

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._db: Any = sqlite3.connect(path, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        if hasattr(self._db, "setconfig"):  # since Python 3.12
            for name, value in SAFE.items():
                self._db.setconfig(getattr(sqlite3, f"SQLITE_DBCONFIG_{name}"), bool(value))

    def execute(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return list(self._db.execute(sql, values))

    def write_blob(self, rowid: int, pieces: Iterable[Any]) -> None:
        with self._db.blobopen("chunk_data", "data", rowid) as blob:
            for piece in pieces:
                blob.write(piece)

    def read_blob(self, rowid: int, pieces: Iterable[memoryview]) -> None:
        with self._db.blobopen("chunk_data", "data", rowid, readonly=True) as blob:
            for piece in pieces:
                piece[:] = blob.read(len(piece))

    def vacuum(self) -> None:
        self._db.executescript("PRAGMA incremental_vacuum")  # execute() would stop after its first page

    def in_transaction(self) -> bool:
        return bool(self._db.in_transaction)

    def close(self) -> None:
        self._db.close()
        with _opening:
            _opened.discard(self)


class Fast(Stdlib):
    """apsw, with an SQLite of its own."""

    name = "fast"

    def __init__(self, path: Path) -> None:
        import apsw

        self.path = path.resolve()
        self._db = apsw.Connection(str(path))
        self._db.set_busy_timeout(BUSY_SECONDS * 1000)
        for name, value in SAFE.items():
            self._db.config(getattr(apsw, f"SQLITE_DBCONFIG_{name}"), value)

    def write_blob(self, rowid: int, pieces: Iterable[Any]) -> None:
        with self._db.blob_open("main", "chunk_data", "data", rowid, True) as blob:
            for piece in pieces:
                blob.write(piece)

    def read_blob(self, rowid: int, pieces: Iterable[memoryview]) -> None:
        with self._db.blob_open("main", "chunk_data", "data", rowid, False) as blob:
            for piece in pieces:
                blob.read_into(piece)

    def vacuum(self) -> None:
        self.execute("PRAGMA incremental_vacuum")


def has_fast() -> bool:
    return all(importlib.util.find_spec(name) for name in ("apsw", "blake3"))


def open_engine(path: Path, engine: str) -> Stdlib:
    """Connect by 'stdlib', 'fast', or 'auto', which is fast where its packages are installed."""
    if engine not in ("auto", "stdlib", "fast"):
        raise CheckpointError(f"engine={engine} is not known: choose one of auto, stdlib, fast")
    if engine == "fast" and not has_fast():
        raise CheckpointError(f"engine=fast {NEEDS_FAST}")
    kind = Stdlib if engine == "stdlib" or not has_fast() else Fast
    with _opening:
        if other := next((one for one in _opened if one.path == path.resolve() and one.name != kind.name), None):
            raise CheckpointError(
                f"{path} is open in this process with engine={other.name}: give the same engine here, because two "
                "SQLite libraries in one process do not see each other's locks"
            )
        opened = kind(path)
        _opened.add(opened)
    return opened


def engine_errors() -> tuple[type[Exception], ...]:
    """Return what both engines raise; the text of a damaged file need not be UTF-8."""
    if not has_fast():
        return (sqlite3.Error, UnicodeDecodeError)
    import apsw

    return (sqlite3.Error, apsw.Error, UnicodeDecodeError)


def error_code(error: Exception) -> int:
    """Return SQLite's primary result code of an engine's error, 0 if it has none."""
    if isinstance(error, UnicodeDecodeError):
        return sqlite3.SQLITE_CORRUPT
    return (getattr(error, "sqlite_errorcode", 0) or getattr(error, "result", 0)) & 0xFF


def hash_function(name: object, path: Path) -> Callable[[], Any]:
    """Return the constructor of the hash that a store was written with."""
    if name == "sha256":
        return hashlib.sha256
    if name != "blake3":
        raise CheckpointError(f"{path} hashes by {printable(repr(name))}, which this flapp does not know: update flapp")
    try:
        from blake3 import blake3
    except ImportError:
        raise CheckpointError(f"{path} is hashed by blake3: this store {NEEDS_FAST}") from None
    return blake3
