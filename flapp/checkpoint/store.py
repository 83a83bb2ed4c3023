"""The SQLite file of a chunk store: its schema, its durability and one transaction for every round.

    chunk_data      one row for each different chunk: its hash, codec 0 (raw) and its bytes
    chunk_metadata  (round, chunk_id) -> hash, parts (JSON, see chunks.py) and size in bytes
    rounds          what a round was saved with, and the digest of that; `saved` counts up for retention
    store_meta      format version, hash algorithm and how the store cuts

A store may come from somebody else. It is refused unless its schema is exactly that of sql.py: no trigger, view, index,
virtual table or constraint of anyone else's. The parts of a round must tile each tensor exactly once. Equal chunks are
stored once, so the size of a round is bounded: by the model that it is loaded into, or else by 128 MiB or 8 times the
bytes of its different chunks, whichever is more. Models of more equal bytes can be saved, and are loaded into a model.

TRUNCATE + FULL survives power cuts, which WAL + NORMAL and DELETE + FULL do not, and writes everything only once.
Chunks are inserted before others expire: only pages freed by earlier rounds can be reused without journaling them.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flapp.checkpoint import sql
from flapp.checkpoint.chunks import CheckpointError, Part, decode_parts, encode_parts, round_digest
from flapp.checkpoint.engines import REASONS, engine_errors, error_code, hash_function, open_engine
from flapp.checkpoint.records import Entry, Round, facts_digest, read_metrics
from flapp.checkpoint.writeback import writeback_of
from flapp.untrusted import check_regular, printable

FORMAT_VERSION = 1
WRITEBACK_BYTES = 16 << 20
PRAGMAS = ("trusted_schema=OFF", "cell_size_check=ON", "journal_mode=TRUNCATE", "synchronous=FULL", "secure_delete=OFF")


class Store:
    """One open database. Every public method is one transaction; threads take turns."""

    def __init__(self, path: Path, engine: str, create: bool) -> None:
        self.path = path
        self.meta: dict[str, Any] = {}
        self._new_hash: Callable[[], Any] = hashlib.sha256
        self._lock = threading.RLock()
        self._errors = engine_errors()
        with self._one_line("cannot be opened"):
            existed = _is_file(path)
            if not existed and not create:
                raise CheckpointError(f"{path} is not there: give the path of a checkpoint store")
            _make_folder(path.parent)
            self._db = open_engine(path, engine)
            try:
                for pragma in PRAGMAS:
                    self._db.execute(f"PRAGMA {pragma}")
                if not existed:
                    _sync_folder(path.parent)
                with self.transaction():
                    self._read_meta()
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _one_line(self, what: str) -> Iterator[None]:
        """Turn what SQLite and the file system raise into one CheckpointError."""
        try:
            yield
        except self._errors as error:
            reason = REASONS.get(error_code(error), "")
            raise CheckpointError(f"{self.path} {what} ({error}){': ' * bool(reason)}{reason}") from error
        except OSError as error:
            raise CheckpointError(f"{self.path} {what} ({error.strerror or error})") from error

    @contextmanager
    def transaction(self, begin: str = "BEGIN", what: str = "cannot be read") -> Iterator[None]:
        with self._lock, self._one_line(what):
            self._db.execute(begin)
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                # SQLite rolls back by itself when the disk is full: a second ROLLBACK would hide the reason.
                if self._db.in_transaction():
                    with suppress(*self._errors):
                        self._db.execute("ROLLBACK")
                raise

    def _read_meta(self) -> None:
        schema = set(self._db.execute(sql.FIND_SCHEMA))
        if not schema:
            return
        if ("table", "store_meta") not in {row[:2] for row in schema}:
            raise CheckpointError(f"{self.path} is an SQLite database of something else: {REASONS[26]}")
        if odd := sorted(schema ^ sql.SCHEMA_ROWS, key=str):
            names = printable(", ".join(dict.fromkeys(f"{kind} {name}" for kind, name, _ in odd)))
            raise CheckpointError(
                f"{self.path} does not have the schema of a flapp checkpoint store ({names}): do not trust it, and "
                "restore the file from a copy"
            )
        meta = dict(self._db.execute(sql.META))
        if meta.get("format_version") != FORMAT_VERSION:
            found = printable(repr(meta.get("format_version")))
            raise CheckpointError(f"{self.path} has format {found}, this flapp reads {FORMAT_VERSION}: update flapp")
        self._use(meta)

    @contextmanager
    def saving(
        self, round_num: int, expected_bytes: int, chunk_bytes: int | None, chunk_num: int | None
    ) -> Iterator[None]:
        """Hold the write transaction of a round, in a database made for its first model if it is new."""
        with self._lock:
            known = self.meta
            if not known:
                with self._one_line("cannot be written"):
                    self._db.execute(f"PRAGMA page_size={sql.page_size_for(expected_bytes)}")
                    self._db.execute("PRAGMA auto_vacuum=INCREMENTAL")
            try:
                with self.transaction("BEGIN IMMEDIATE", f"cannot take round {round_num}"):
                    self._read_meta()
                    if not self.meta:
                        self._create(chunk_bytes, chunk_num)
                    yield
            except BaseException:
                self.meta = known  # tables made in this transaction are gone with it
                raise

    def _create(self, chunk_bytes: int | None, chunk_num: int | None) -> None:
        for statement in sql.SCHEMA:
            self._db.execute(statement)
        ((page_size,),) = self._db.execute("PRAGMA page_size")
        meta = {
            "format_version": FORMAT_VERSION,
            "hash": "blake3" if self._db.name == "fast" else "sha256",
            "chunk_bytes": chunk_bytes or sql.chunk_bytes_for(page_size),
        }
        meta |= {"chunk_num": chunk_num} if chunk_num else {}
        for item in meta.items():
            self._db.execute(sql.INSERT_META, *item)
        self._use(meta)

    def _use(self, meta: dict[str, Any]) -> None:
        for name in ("chunk_bytes", "chunk_num"):
            if type(size := meta.get(name, 1)) is not int or size < 1:
                raise CheckpointError(
                    f"{self.path} is damaged ({name} is {printable(repr(size))}): restore the file from a copy"
                )
        self._new_hash = hash_function(meta.get("hash"), self.path)
        self._db.execute("PRAGMA cache_size=-2048")  # counted in pages of the size before: 30 MB of 64 KiB ones
        self.meta = meta

    def hash(self, pieces: Iterable[memoryview]) -> bytes:
        """Return the hash of bytes in pieces, by the store's algorithm; frees the GIL."""
        hasher = self._new_hash()
        for piece in pieces:
            hasher.update(piece)
        return hasher.digest()

    def put_round(
        self,
        round_num: int,
        chunks: Iterable[tuple[bytes, list[Part], list[memoryview]]],
        facts: tuple[str, str, str],
        keep: int | None,
        pinned: Collection[int],
    ) -> tuple[str, int, int]:
        """Write a round inside saving() and expire others; return its model digest, new chunks and new bytes.

        chunks: hash, parts and bytes in pieces, by chunk_id; facts: metrics, config_digest, input_digest.
        """
        replaced = len(self._db.execute(sql.FIND_ROUND, round_num))
        self._drop([round_num])
        written: list[tuple[bytes, list[Part]]] = []
        new_chunks = new_bytes = started = 0
        start_writeback = writeback_of(self.path)
        ((rowid,),) = self._db.execute(sql.LAST_ID)
        for chunk_id, (digest, parts, pieces) in enumerate(chunks):
            size = sum(part.nbytes for part in parts)
            if not self._db.execute(sql.FIND_HASH, digest):
                rowid += 1
                self._db.execute(sql.INSERT_DATA, rowid, digest, size)
                if size:
                    self._db.write_blob(rowid, pieces)
                new_chunks, new_bytes = new_chunks + 1, new_bytes + size
                if new_bytes - started >= WRITEBACK_BYTES:
                    started = new_bytes
                    start_writeback()
            self._db.execute(sql.INSERT_METADATA, round_num, chunk_id, digest, encode_parts(parts), size)
            written.append((digest, parts))
        model_digest = round_digest(written)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        ((saved,),) = self._db.execute(sql.NEXT_SAVED)
        record = (round_num, saved, now, *facts, model_digest)
        self._db.execute(sql.INSERT_ROUND, *record, facts_digest(*record))
        expired = self._expire(keep, pinned)
        if replaced or expired:
            self._db.execute(sql.DELETE_ORPHANS)
        ((kept,),) = self._db.execute(sql.CHECK_SAVED, round_num)
        if kept != len(written) or not self._db.execute(sql.FIND_ROUND, round_num):
            raise CheckpointError(
                f"{self.path} did not keep round {round_num} ({kept} of {len(written)} chunks): restore the file from "
                "a copy, or move it away to start a new one"
            )
        return model_digest, new_chunks, new_bytes

    def expire(self, keep: int) -> None:
        """Drop all rounds but the `keep` that were saved last, and the chunks that no other holds."""
        with self.transaction("BEGIN IMMEDIATE", "cannot be cleaned up"):
            if self.refresh() and self._expire(keep, ()):
                self._db.execute(sql.DELETE_ORPHANS)

    def drop_after(self, round_num: int) -> None:
        """Drop all rounds with a higher number, and the chunks that no other holds."""
        with self.transaction("BEGIN IMMEDIATE", "cannot be cut back"):
            if later := [number for number in self.records() if number > round_num]:
                self._drop(later)
                self._db.execute(sql.DELETE_ORPHANS)

    def _expire(self, keep: int | None, pinned: Collection[int]) -> list[int]:
        saved = [] if keep is None else [number for (number,) in self._db.execute(sql.NEWEST_FIRST)]
        expired = [number for number in saved[keep:] if number not in pinned]
        self._drop(expired)
        return expired

    def _drop(self, rounds: Iterable[int]) -> None:
        for number in rounds:
            self._db.execute(sql.DELETE_METADATA, number)
            self._db.execute(sql.DELETE_ROUND, number)

    def refresh(self) -> bool:
        """Say, inside a transaction, whether the database has its tables by now."""
        if not self.meta:
            self._read_meta()
        return bool(self.meta)

    def records(self) -> dict[int, tuple[Any, ...]]:
        """Return the row of every round, to be checked by round(), inside a transaction."""
        return {row[0]: row for row in self._db.execute(sql.RECORDS)} if self.refresh() else {}

    def round(self, record: tuple[Any, ...]) -> Round:
        """Return what a round was saved with, inside a transaction; raises CheckpointError when that was changed."""
        try:
            metrics = read_metrics(*record)
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path}: round {record[0]}: its metadata is damaged ({error}): restore the file from a copy"
            ) from None
        (sizes,) = self._db.execute(sql.SIZE_OF_ROUND, record[0])
        return Round(record[0], record[2], metrics, *record[4:7], *sizes)

    def rounds(self) -> list[Round]:
        """Return all rounds by number, inside a transaction."""
        return [self.round(record) for record in self.records().values()]

    def entry(self, round_num: int, row: tuple[Any, ...]) -> Entry:
        """Return a chunk of a round from its row of sql.CHUNKS; raises CheckpointError if that cannot be right."""
        chunk_id, digest, text, size, rowid, codec, length, kind = row
        where = f"{self.path}: round {round_num}, chunk {chunk_id}"
        try:
            parts = decode_parts(text)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}: restore the file from a copy or drop the round") from None
        where += f" ({', '.join(dict.fromkeys(part.key for part in parts))[:200]})"
        if rowid is None:
            raise CheckpointError(f"{where}: its bytes are not in the store: restore the file from a copy")
        if codec != 0:
            raise CheckpointError(f"{where}: it is stored by codec {codec!r}, unknown to this flapp: update flapp")
        claimed = sum(part.nbytes for part in parts)
        if kind != "blob" or type(digest) is not bytes or type(size) is not int or not size == claimed == length:
            found = f"{length} bytes stored, {size} noted, {claimed} in its parts"
            raise CheckpointError(f"{where}: its sizes differ ({found}): restore the file from a copy")
        return Entry(chunk_id, digest, parts, size, rowid)

    def read(self, entry: Entry, pieces: list[memoryview]) -> None:
        """Read the bytes of a chunk into `pieces`, which are to be verified by damage()."""
        if entry.size:
            self._db.read_blob(entry.rowid, pieces)

    def damage(self, round_num: int, entry: Entry, pieces: Iterable[memoryview]) -> CheckpointError | None:
        """Return what to raise unless `pieces` have the hash of a chunk; for any thread."""
        if self.hash(pieces) == entry.hash:
            return None
        names = ", ".join(dict.fromkeys(part.key for part in entry.parts))[:200]
        return CheckpointError(
            f"{self.path}: round {round_num}, chunk {entry.chunk_id} ({names}): its bytes are damaged (another "
            f"{self.meta['hash']} than noted): restore the file from a copy"
        )

    def statistics(self) -> tuple[int, int, int]:
        """Return the number of metadata rows and of chunks, and the bytes of those, inside a transaction."""
        if not self.refresh():
            return 0, 0, 0
        ((entries,),) = self._db.execute(sql.COUNT_METADATA)
        ((chunks, size),) = self._db.execute(sql.COUNT_DATA)
        return entries, chunks, size

    def execute(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._db.execute(statement, *values)

    def vacuum(self) -> None:
        """Give free pages back to the file system in place: a new file would lose what others are writing."""
        with self._lock, self._one_line("cannot be compacted"):
            self._db.vacuum()


def _is_file(path: Path) -> bool:
    """Say whether there is a file; raises CheckpointError for anything else there or beside, such as a pipe.

    SQLite opens what is beside it as well, and a pipe would block it for ever.
    """
    there = []
    try:
        for suffix in ("", "-journal", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                check_regular(Path(f"{path}{suffix}"))
                there.append(suffix)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be opened ({error.strerror}: {error.filename}): give the path of a checkpoint store"
        ) from error
    return "" in there


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they outlive a power cut."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
