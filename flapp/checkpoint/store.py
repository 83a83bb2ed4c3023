"""Rounds in the database of a chunk store: written in one transaction, dropped, read and verified."""

import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flapp.checkpoint.chunks import (
    RESTORE,
    CheckpointError,
    Entry,
    Part,
    Round,
    Saved,
    Spec,
    check_believable,
    decode_parts,
    encode_parts,
    facts_digest,
    join,
    round_digest,
)
from flapp.checkpoint.database import Database
from flapp.untrusted import parse_json

HASH_THREADS = 2  # hashing frees the GIL; two threads use up the memory bandwidth
HASH_AHEAD = 6  # chunks that are hashed ahead of the writing, few enough to stay in the processor's cache
VERIFY_AHEAD = 4  # buffers, few enough to stay in the processor's cache
VERIFY_BYTES = 4 << 20  # the largest chunk that is verified in such a buffer
WRITEBACK_BYTES = 16 << 20
SYNC_FILE_RANGE_WRITE = 2  # of <fcntl.h>
ORPHANS = "SELECT id FROM chunk_data WHERE hash NOT IN (SELECT hash FROM chunk_metadata)"
CHUNKS = """SELECT m.chunk_id, m.hash, m.parts, m.size, d.id, d.codec, length(d.data), typeof(d.data)
    FROM chunk_metadata m LEFT JOIN chunk_data d ON d.hash = m.hash WHERE m.round = ? ORDER BY m.chunk_id"""
Pieces = list[memoryview]


class Store(Database):
    """The rounds of one store; every method without a transaction of its own must be called inside transaction()."""

    def put_round(
        self,
        round_num: int,
        chunks: Iterable[tuple[list[Part], Pieces]],
        facts: tuple[str, str, str],
        keep: int | None,
        pinned: Collection[int],
    ) -> Saved:
        """Write a round inside saving(), and expire others.

        chunks: parts and bytes in pieces, by chunk_id; facts: metrics, config_digest, input_digest.
        """
        replaced = len(self.execute("SELECT 1 FROM rounds WHERE round = ?", round_num))
        self._drop([round_num])
        written, new_chunks, new_bytes = self._put_chunks(round_num, chunks)
        model_digest = round_digest(written)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        ((saved,),) = self.execute("SELECT coalesce(max(saved), 0) + 1 FROM rounds")
        record = (round_num, saved, now, *facts, model_digest)
        self.execute("INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?, ?)", *record, facts_digest(*record))
        if self._expire(keep, pinned) or replaced:
            self._drop_orphans()
        held = "SELECT count(*) FROM chunk_metadata m JOIN chunk_data d ON d.hash = m.hash WHERE m.round = ?"
        ((kept,),) = self.execute(held, round_num)
        if kept != len(written) or not self.execute("SELECT 1 FROM rounds WHERE round = ?", round_num):
            found = f"{self.path} did not keep round {round_num} ({kept} of {len(written)} chunks)"
            raise CheckpointError(f"{found}: {RESTORE}, or move it away to start a new one")
        tensors = {part.key for _, parts in written for part in parts}
        size = sum(part.nbytes for _, parts in written for part in parts)
        return Saved(round_num, len(tensors), len(written), new_chunks, size, new_bytes, model_digest)

    def _put_chunks(
        self, round_num: int, chunks: Iterable[tuple[list[Part], Pieces]]
    ) -> tuple[list[tuple[bytes, list[Part]]], int, int]:
        """Write the chunks of a round; return (hash, parts) of each, and the number and bytes of new ones."""
        written: list[tuple[bytes, list[Part]]] = []
        new_chunks = new_bytes = started = 0
        start_writeback = writeback_of(self.path)
        ((rowid,),) = self.execute("SELECT coalesce(max(id), 0) FROM chunk_data")
        for chunk_id, (digest, parts, pieces) in enumerate(self.hashed(chunks, HASH_AHEAD)):
            size = sum(part.nbytes for part in parts)
            if not self.execute("SELECT 1 FROM chunk_data WHERE hash = ?", digest):
                rowid += 1
                self.write(rowid, digest, size, pieces)
                new_chunks, new_bytes = new_chunks + 1, new_bytes + size
                if new_bytes - started >= WRITEBACK_BYTES:
                    started = new_bytes
                    start_writeback()
            row = (round_num, chunk_id, digest, encode_parts(parts), size)
            self.execute("INSERT INTO chunk_metadata VALUES (?, ?, ?, ?, ?)", *row)
            written.append((digest, parts))
        return written, new_chunks, new_bytes

    def write(self, rowid: int, digest: bytes, size: int, pieces: Pieces) -> None:
        """Insert the bytes of a chunk."""
        self.execute("INSERT INTO chunk_data VALUES (?, ?, 0, zeroblob(?))", rowid, digest, size)
        if size:
            with self._db.blob_open("main", "chunk_data", "data", rowid, True) as blob:
                for piece in pieces:
                    blob.write(piece)

    def hashed(self, chunks: Iterable[tuple[Any, Pieces]], ahead: int) -> Iterator[tuple[bytes, Any, Pieces]]:
        """Yield hash, item and bytes of every chunk.

        While a chunk is yielded, threads hash up to `ahead` of the next ones.
        """
        waiting: deque[tuple[Future[bytes], Any, Pieces]] = deque()
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            for item, pieces in chunks:
                waiting.append((threads.submit(self.hash, pieces), item, pieces))
                if len(waiting) > ahead:
                    future, item, pieces = waiting.popleft()
                    yield future.result(), item, pieces
            for future, item, pieces in waiting:
                yield future.result(), item, pieces

    def expire(self, keep: int | None = None, after: int | None = None) -> None:
        """Drop rounds: all but the `keep` saved last, or all numbered above `after`.

        Then drop chunks that no round has.
        """
        with self.transaction("BEGIN IMMEDIATE", "cannot be cleaned up"):
            later = [] if after is None else [number for number in self.records() if number > after]
            self._drop(later)
            if self.has_tables() and (self._expire(keep, ()) or later):
                self._drop_orphans()

    def _expire(self, keep: int | None, pinned: Collection[int]) -> list[int]:
        newest = [] if keep is None else self.execute("SELECT round FROM rounds ORDER BY saved DESC")
        expired = [number for (number,) in newest[keep:] if number not in pinned]
        self._drop(expired)
        return expired

    def _drop(self, rounds: Iterable[int]) -> None:
        for number in rounds:
            self.execute("DELETE FROM chunk_metadata WHERE round = ?", number)
            self.execute("DELETE FROM rounds WHERE round = ?", number)

    def _drop_orphans(self) -> None:
        self.execute(f"DELETE FROM chunk_data WHERE id IN ({ORPHANS})")

    def records(self) -> dict[int, tuple[Any, ...]]:
        """Return the row of every round, to be checked by round()."""
        return {row[0]: row for row in self.execute("SELECT * FROM rounds ORDER BY round")} if self.has_tables() else {}

    def rounds(self) -> list[Round]:
        """Return all rounds by number."""
        return [self.round(record) for record in self.records().values()]

    def round(self, record: tuple[Any, ...]) -> Round:
        """Return the metadata of a round; raises CheckpointError when it was changed after saving."""
        number, _, created_at, metrics, *digests, digest = record
        try:
            if not all(type(fact) is str for fact in (created_at, metrics, *digests)):
                raise ValueError("its metrics, digests or date are not text")
            if facts_digest(*record[:-1]) != digest:
                raise ValueError("the digest of its date, metrics and digests differs from the one saved")
            values = dict(parse_json(metrics, surrogates=True))
        except (ValueError, TypeError, RecursionError) as error:
            found = f"{self.path}: round {number}: its metadata is damaged ({error})"
            raise CheckpointError(f"{found}: {RESTORE}") from None
        sizes = "SELECT count(*), coalesce(sum(size), 0) FROM chunk_metadata WHERE round = ?"
        return Round(number, created_at, values, *digests, *self.execute(sizes, number)[0])

    def totals(self) -> tuple[int, int, int]:
        """Return the number of rows of chunk_metadata and of chunks, and the bytes of the chunks."""
        if not self.has_tables():
            return 0, 0, 0
        counts = "(SELECT count(*) FROM chunk_metadata), count(*), coalesce(sum(length(data)), 0)"
        ((entries, chunks, size),) = self.execute(f"SELECT {counts} FROM chunk_data")
        return entries, chunks, size

    def entry(self, round_num: int, row: tuple[Any, ...]) -> Entry:
        """Return a chunk of a round from its row of CHUNKS; raises CheckpointError if that cannot be right."""
        chunk_id, digest, text, size, rowid, codec, length, kind = row
        where = f"{self.path}: round {round_num}, chunk {chunk_id}"
        try:
            parts = decode_parts(text)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}: {RESTORE}") from None
        where += f" ({_names(parts)})"
        if rowid is None:
            raise CheckpointError(f"{where}: its bytes are not in the store: {RESTORE}")
        if codec != 0:
            raise CheckpointError(f"{where}: it is stored by codec {codec!r}, unknown to this flapp: update flapp")
        claimed = sum(part.nbytes for part in parts)
        if kind != "blob" or type(digest) is not bytes or type(size) is not int or not size == claimed == length:
            found = f"{length} bytes stored, {size} noted, {claimed} in its parts"
            raise CheckpointError(f"{where}: its sizes or types are wrong ({found}): {RESTORE}")
        return Entry(chunk_id, digest, parts, size, rowid)

    def check(self, round_num: int, digest: str, entries: list[Entry], bounded: bool = True) -> dict[str, Spec]:
        """Return the tensors of a round; raises CheckpointError unless its chunks are those of its model digest.

        bounded: refuse a size that is not believable, because no model says how large the tensors may be.
        """
        where = f"{self.path}: round {round_num}"
        if bounded:
            check_believable(where, entries)
        try:
            specs = join(entry.parts for entry in entries)
            if round_digest((entry.hash, entry.parts) for entry in entries) != digest:
                raise ValueError("its metadata is not what was saved (another model digest)")
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}: {RESTORE}") from None
        return specs

    def read(self, entry: Entry, pieces: Pieces) -> None:
        """Read the bytes of a chunk into `pieces`, without verifying them."""
        if entry.size:
            with self._db.blob_open("main", "chunk_data", "data", entry.rowid, False) as blob:
                for piece in pieces:
                    blob.read_into(piece)

    def read_verified(self, round_num: int, places: Iterable[tuple[Entry, Pieces]], ahead: int) -> None:
        """Read every chunk to its place; raises CheckpointError for bytes that are not those saved.

        Threads verify what has been read. When a chunk is read, at most `ahead` others are not verified yet.
        """

        def read_each() -> Iterator[tuple[Entry, Pieces]]:
            for entry, pieces in places:
                self.read(entry, pieces)
                yield entry, pieces

        for digest, entry, _ in self.hashed(read_each(), ahead):
            self._compare(round_num, entry, digest)

    def read_chunk(self, round_num: int, entry: Entry) -> bytearray:
        """Return the bytes of one chunk, verified."""
        data = bytearray(entry.size)
        self.read(entry, [memoryview(data)])
        self._compare(round_num, entry, self.hash([memoryview(data)]))
        return data

    def _compare(self, round_num: int, entry: Entry, digest: bytes) -> None:
        if digest != entry.hash:
            where = f"{self.path}: round {round_num}, chunk {entry.chunk_id} ({_names(entry.parts)})"
            raise CheckpointError(f"{where}: its bytes are damaged (another {self.meta['hash']} than noted): {RESTORE}")

    def read_into(self, round_num: int, entries: list[Entry], buffers: Mapping[str, memoryview]) -> None:
        """Read chunks into the bytes of their tensors, whose values are not valid until this returns."""
        places = ((entry, pieces_of(entry.parts, buffers)) for entry in entries)
        self.read_verified(round_num, places, len(entries))

    def load_into(self, round_num: int, entries: list[Entry], buffers: Mapping[str, memoryview]) -> None:
        """Read chunks into a live model once all are verified, in one transaction, which keeps other writers out.

        The chunks are read twice, to verify and to load them: that is cheaper than memory for all of them.
        """
        before = self.path.stat().st_mtime_ns  # shows unlocked writes; hashing twice would cost 60 % of a load
        largest = max((entry.size for entry in entries), default=0)
        spare = [memoryview(bytearray(largest)) for _ in range(VERIFY_AHEAD)]
        places = ((entry, [spare[i % VERIFY_AHEAD][: entry.size]]) for i, entry in enumerate(entries))
        self.read_verified(round_num, places, VERIFY_AHEAD - 1)
        try:
            for entry in entries:
                self.read(entry, pieces_of(entry.parts, buffers))
            if self.path.stat().st_mtime_ns != before:
                raise CheckpointError("another program wrote to it at the same time")
        except Exception as error:
            found = f"{self.path}: round {round_num} could be verified, but not loaded ({error})"
            raise CheckpointError(f"{found}: the model is partly overwritten and must be loaded again") from error


def pieces_of(parts: Iterable[Part], buffers: Mapping[str, memoryview]) -> Pieces:
    """Return the bytes of each part in the bytes of its tensor."""
    return [part.of(buffers[part.key]) for part in parts]


def writeback_of(path: Path) -> Callable[[], object]:
    """Return a function that starts writing the dirty pages of the open file `path` to disk, on Linux.

    While more pages are still to come, that leaves less to do for the last fsync. It borrows SQLite's own descriptor:
    closing another one would drop every lock that this process holds on the file
    (https://sqlite.org/howtocorrupt.html, "POSIX advisory locks").
    """
    descriptors = Path("/proc/self/fd").glob("*") if sys.platform == "linux" else ()
    for descriptor in (int(entry.name) for entry in descriptors):
        with suppress(OSError):  # the descriptor that lists the folder is closed by now
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                start = ctypes.CDLL(None).sync_file_range
                start.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
                return lambda: start(descriptor, 0, 0, SYNC_FILE_RANGE_WRITE)
    return lambda: None


def _names(parts: Iterable[Part]) -> str:
    return ", ".join(dict.fromkeys(part.key for part in parts))[:200]
