"""The SQLite file of a chunk store: its tables, its durability and its transactions.

    chunk_data      one row for each distinct chunk: its hash, codec 0 (raw) and its bytes
    chunk_metadata  (round, chunk_id) -> hash, parts (JSON, see chunks.py) and size in bytes
    rounds          the metadata of a round and its digest; `saved` numbers the saves and decides which rounds expire
    store_meta      format version, hash algorithm and how the store cuts tensors

A store may come from somebody else. It is refused unless its schema is exactly SCHEMA, without any other trigger, view,
index, virtual table or constraint. The parts of a round must cover each tensor exactly once, and its size must be
believable (chunks.py) unless it is loaded into a model.

With journal_mode=TRUNCATE and synchronous=FULL, a finished save survives a power cut, and everything is written only
once. With WAL and NORMAL, or with DELETE and FULL, a power cut may undo the last save. Chunks are inserted before old
rounds expire: SQLite writes pages without journaling them only if they were free when the transaction began.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import apsw
from blake3 import blake3

from flapp.checkpoint.chunks import RESTORE, CheckpointError
from flapp.files import sync
from flapp.untrusted import check_regular, printable

FORMAT_VERSION = 1
HASH = "blake3"  # of new stores
HASHES: dict[Any, Callable[[], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}  # older stores may have SHA-256
BUSY_SECONDS = 60
PRAGMAS = ("trusted_schema=OFF", "cell_size_check=ON", "journal_mode=TRUNCATE", "synchronous=FULL", "secure_delete=OFF")
# A malicious file may try to run code through its schema or through damaged pages.
SAFE = {"DEFENSIVE": 1, "TRUSTED_SCHEMA": 0, "ENABLE_TRIGGER": 0, "ENABLE_VIEW": 0}
SCHEMA = (
    "CREATE TABLE chunk_data(id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, codec INTEGER NOT NULL, data BLOB)",
    "CREATE TABLE chunk_metadata(round INTEGER, chunk_id INTEGER, hash BLOB NOT NULL, parts TEXT, size INTEGER,"
    " PRIMARY KEY(round, chunk_id)) WITHOUT ROWID",
    "CREATE TABLE rounds(round INTEGER PRIMARY KEY, saved INTEGER, created_at TEXT, metrics TEXT, config_digest TEXT,"
    " input_digest TEXT, model_digest TEXT, facts_digest TEXT)",
    "CREATE TABLE store_meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID",
)
# Exactly what these statements leave in sqlite_schema, in any order.
SCHEMA_ROWS: set[tuple[Any, ...]] = {("table", sql.split()[2].partition("(")[0], sql) for sql in SCHEMA}
SCHEMA_ROWS |= {("index", "sqlite_autoindex_chunk_data_1", None)}
NOT_A_STORE = "it is not a flapp checkpoint store: move it away, or give another path"
DAMAGED = "it is damaged: restore it from a copy, or move it away to start a new one"
FIXES: dict[type[Exception], str] = {
    apsw.BusyError: "another process has held its lock for a minute: wait for it, or stop it",
    apsw.ReadOnlyError: "it may not be written: check the permissions of the file and its folder",
    apsw.IOError: "its disk reports errors: look at the system log, and restore the file from a copy if they continue",
    apsw.CorruptError: DAMAGED,
    UnicodeDecodeError: DAMAGED,
    apsw.FullError: "its disk is full, earlier rounds are intact: make room and save again",
    apsw.CantOpenError: "it cannot be opened: check that it is a file in a folder that may be written",
    apsw.NotADBError: NOT_A_STORE,
}


class Database:
    """One open database; threads take turns by transaction()."""

    def __init__(self, path: Path, create: bool) -> None:
        self.path = path
        self.meta: dict[str, Any] = {}
        self._lock = threading.RLock()
        with self._one_line("cannot be opened"):
            existed = _is_file(path)
            if not existed and not create:
                raise CheckpointError(f"{path} is not there: give the path of a checkpoint store")
            _make_folder(path.parent)
            self._db = apsw.Connection(str(path))
            try:
                self._db.set_busy_timeout(BUSY_SECONDS * 1000)
                for name, value in SAFE.items():
                    self._db.config(getattr(apsw, f"SQLITE_DBCONFIG_{name}"), value)
                for pragma in PRAGMAS:
                    self.execute(f"PRAGMA {pragma}")
                if not existed:
                    sync(path.parent)
                with self.transaction():
                    self._read_meta()
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        """Close the database; a second call does nothing."""
        self._db.close()

    def execute(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run a statement and return all its rows."""
        return list(self._db.execute(statement, values))

    @contextmanager
    def _one_line(self, what: str) -> Iterator[None]:
        """Turn what SQLite and the file system raise into one CheckpointError."""
        try:
            yield
        except (apsw.Error, UnicodeDecodeError) as error:
            fix = next((f": {fix}" for kind, fix in FIXES.items() if isinstance(error, kind)), "")
            raise CheckpointError(f"{self.path} {what} ({error}){fix}") from error
        except OSError as error:
            raise CheckpointError(f"{self.path} {what} ({error.strerror or error})") from error

    @contextmanager
    def transaction(self, begin: str = "BEGIN", what: str = "cannot be read") -> Iterator[None]:
        """Hold a transaction; it is rolled back when the block raises."""
        with self._lock, self._one_line(what):
            self.execute(begin)
            try:
                yield
                self.execute("COMMIT")
            except BaseException:
                # SQLite rolls back by itself when the disk is full: a second ROLLBACK would hide the reason.
                if self._db.in_transaction:
                    with suppress(apsw.Error):
                        self.execute("ROLLBACK")
                raise

    def _read_meta(self) -> None:
        """Check the schema and read store_meta; a database without tables leaves `meta` empty."""
        schema = set(self.execute("SELECT type, name, sql FROM sqlite_schema"))
        if not schema:
            return
        if ("table", "store_meta") not in {row[:2] for row in schema}:
            raise CheckpointError(f"{self.path} is an SQLite database of another program: {NOT_A_STORE}")
        if odd := sorted(schema ^ SCHEMA_ROWS, key=str):
            names = printable(", ".join(dict.fromkeys(f"{kind} {name}" for kind, name, _ in odd)))
            found = f"{self.path} does not have the schema of a flapp checkpoint store ({names})"
            raise CheckpointError(f"{found}: do not trust it, and {RESTORE}")
        meta = dict(self.execute("SELECT key, value FROM store_meta"))
        version, algorithm = meta.get("format_version"), meta.get("hash")
        if version != FORMAT_VERSION:
            found = f"has format {printable(repr(version))}, this flapp reads {FORMAT_VERSION}"
            raise CheckpointError(f"{self.path} {found}: update flapp")
        if algorithm not in HASHES:
            found = f"hashes by {printable(repr(algorithm))}, which this flapp does not know"
            raise CheckpointError(f"{self.path} {found}: update flapp")
        for name in ("chunk_bytes", "chunk_num"):
            if type(size := meta.get(name, 1)) is not int or size < 1:
                raise CheckpointError(f"{self.path} is damaged ({name} is {printable(repr(size))}): {RESTORE}")
        # SQLite chooses how many pages to cache before it knows their size: with pages of 64 KiB it would keep 30 MB.
        self.execute("PRAGMA cache_size=-2048")
        self.meta = meta

    def has_tables(self) -> bool:
        """Return whether the store has its tables, which this or another process creates with the first round."""
        if not self.meta:
            self._read_meta()
        return bool(self.meta)

    @contextmanager
    def saving(self, round_num: int, size: int, chunk_bytes: int | None, chunk_num: int | None) -> Iterator[None]:
        """Hold the write transaction of a round of `size` bytes; a new database gets pages and tables to suit it."""
        with self._lock:
            known = self.meta
            if not known:
                with self._one_line("cannot be written"):
                    self.execute(f"PRAGMA page_size={page_size_for(size)}")
                    self.execute("PRAGMA auto_vacuum=INCREMENTAL")
            try:
                with self.transaction("BEGIN IMMEDIATE", f"cannot take round {round_num}"):
                    self._read_meta()
                    if not self.meta:
                        self._create(chunk_bytes, chunk_num)
                        self._read_meta()
                    yield
            except BaseException:
                self.meta = known  # tables made in this transaction are gone with it
                raise

    def _create(self, chunk_bytes: int | None, chunk_num: int | None) -> None:
        for statement in SCHEMA:
            self.execute(statement)
        ((page_size,),) = self.execute("PRAGMA page_size")
        chunk_bytes = chunk_bytes or chunk_bytes_for(page_size)
        meta = {"format_version": FORMAT_VERSION, "hash": HASH, "chunk_bytes": chunk_bytes}
        meta |= {"chunk_num": chunk_num} if chunk_num else {}
        for item in meta.items():
            self.execute("INSERT INTO store_meta VALUES (?, ?)", *item)

    def vacuum(self) -> None:
        """Give free pages back to the file system in place: a new file would lose what others are writing."""
        with self._lock, self._one_line("cannot be compacted"):
            self.execute("PRAGMA incremental_vacuum")

    def hash(self, pieces: Iterable[memoryview]) -> bytes:
        """Return the hash of bytes in pieces, by the store's algorithm."""
        hasher = HASHES[self.meta["hash"]]()
        for piece in pieces:
            hasher.update(piece)
        return bytes(hasher.digest())


def page_size_for(size: int) -> int:
    """Return SQLite's page size for a model of `size` bytes: large pages are fast, small ones waste little."""
    limits = ((64 << 20, 65536), (16 << 20, 32768), (1 << 20, 16384), (16 << 10, 4096), (4 << 10, 1024))
    return next((page for limit, page in limits if size > limit), 512)


def chunk_bytes_for(page_size: int) -> int:
    """Return a chunk size, at least 1 MiB, whose row nearly fills its k overflow pages.

    It is k (U - 4) + M bytes, less the other columns. U is the page size, M what stays in the leaf
    (https://sqlite.org/fileformat2.html, "B-tree Cell Format").
    """
    leaf = (page_size - 12) * 32 // 255 - 23 - 64
    return (-(-((1 << 20) - leaf) // (page_size - 4)) * (page_size - 4) + leaf) // 16 * 16


def _is_file(path: Path) -> bool:
    """Say whether there is a file; raises CheckpointError for anything else at `path` or beside it, such as a pipe.

    SQLite also opens the files beside it, and would wait for a pipe for ever.
    """
    there = []
    try:
        for suffix in ("", "-journal", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                check_regular(Path(f"{path}{suffix}"))
                there.append(suffix)
    except OSError as error:
        found = f"{path} cannot be opened ({error.strerror}: {error.filename})"
        raise CheckpointError(f"{found}: give the path of a checkpoint store") from error
    return "" in there


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they survive a power cut."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)
