"""Hashing and reading chunk after chunk, with threads that keep both processors busy."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from flapp.checkpoint.chunks import CheckpointError, Part
from flapp.checkpoint.records import Entry
from flapp.checkpoint.store import Store

Hashing = tuple[Future[bytes], list[Part], list[memoryview]]
HASH_THREADS = 2  # hashlib and blake3 free the GIL; memory bandwidth is used up by two
HASH_AHEAD = 6  # chunks
VERIFY_AHEAD = 4  # chunks in buffers that stay in the processor's cache
VERIFY_BYTES = 4 << 20  # the most that such a buffer holds


def pieces_of(parts: Iterable[Part], buffers: Mapping[str, memoryview]) -> list[memoryview]:
    return [buffers[part.key][part.offset : part.offset + part.nbytes] for part in parts]


def hashed(
    store: Store, chunks: list[list[Part]], buffers: Mapping[str, memoryview]
) -> Iterator[tuple[bytes, list[Part], list[memoryview]]]:
    """Yield hash, parts and bytes of every chunk, hashed ahead in a thread, but no further than the cache holds."""
    ahead: deque[Hashing] = deque()
    with ThreadPoolExecutor(1) as thread:
        for parts in chunks:
            pieces = pieces_of(parts, buffers)
            ahead.append((thread.submit(store.hash, pieces), parts, pieces))
            if len(ahead) > HASH_AHEAD:
                yield _next(store, ahead)
        while ahead:
            yield _next(store, ahead)


def _next(store: Store, ahead: deque[Hashing]) -> tuple[bytes, list[Part], list[memoryview]]:
    """Return the first of `ahead`; while its hash is not there, help by hashing the last that nobody works on."""
    future, parts, pieces = ahead.popleft()
    for i in reversed(range(len(ahead))):
        if future.done():
            break
        if ahead[i][0].cancel():
            ahead[i] = (Future(), *ahead[i][1:])
            ahead[i][0].set_result(store.hash(ahead[i][2]))
    return future.result(), parts, pieces


def fits(entries: Iterable[Entry]) -> bool:
    """Say whether every chunk fits the buffers of verify()."""
    return all(entry.size <= VERIFY_BYTES for entry in entries)


def verify(store: Store, round_num: int, entries: list[Entry]) -> None:
    """Read and verify chunks without keeping them: reading them twice costs less than memory touched for once."""
    largest = max((entry.size for entry in entries), default=0)
    spare = [memoryview(bytearray(largest)) for _ in range(VERIFY_AHEAD)]
    checks: deque[Future[CheckpointError | None]] = deque()
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        for i, entry in enumerate(entries):
            if len(checks) == VERIFY_AHEAD and (damage := checks.popleft().result()):
                raise damage
            data = [spare[i % VERIFY_AHEAD][: entry.size]]
            store.read(entry, data)
            checks.append(threads.submit(store.damage, round_num, entry, data))
        for check in checks:
            if damage := check.result():
                raise damage


def fill(store: Store, entries: list[Entry], buffers: Mapping[str, memoryview]) -> None:
    """Read chunks, verified in this transaction, into a live model; only a disk that fails now leaves it mixed."""
    for entry in entries:
        store.read(entry, pieces_of(entry.parts, buffers))


def read(store: Store, round_num: int, entries: list[Entry], buffers: Mapping[str, memoryview]) -> None:
    """Read chunks to where they belong, verifying in threads what has been read."""
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        checks = []
        for entry in entries:
            pieces = pieces_of(entry.parts, buffers)
            store.read(entry, pieces)
            checks.append(threads.submit(store.damage, round_num, entry, pieces))
        for check in checks:
            if damage := check.result():
                raise damage
