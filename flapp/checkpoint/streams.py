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


def verify(store: Store, round_num: int, entries: list[Entry]) -> None:
    """Read and verify chunks without keeping them: reading them twice costs less than memory touched for once."""
    largest = max((entry.size for entry in entries), default=0)
    spare = [memoryview(bytearray(largest)) for _ in range(VERIFY_AHEAD)]
    places = ([spare[i % VERIFY_AHEAD][: entry.size]] for i, entry in enumerate(entries))
    _read_verified(store, round_num, entries, places, VERIFY_AHEAD)


def read(store: Store, round_num: int, entries: list[Entry], buffers: Mapping[str, memoryview]) -> None:
    """Read chunks to where they belong, verifying in threads what has been read."""
    places = (pieces_of(entry.parts, buffers) for entry in entries)
    _read_verified(store, round_num, entries, places, len(entries))


def _read_verified(
    store: Store, round_num: int, entries: list[Entry], places: Iterable[list[memoryview]], ahead: int
) -> None:
    """Read each chunk to its place; before one more than `ahead` are, the first of them has been verified."""
    checks: deque[Future[CheckpointError | None]] = deque()
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        for entry, pieces in zip(entries, places, strict=True):
            if len(checks) == ahead and (damage := checks.popleft().result()):
                raise damage
            store.read(entry, pieces)
            checks.append(threads.submit(store.damage, round_num, entry, pieces))
        for check in checks:
            if damage := check.result():
                raise damage


def load(store: Store, round_num: int, entries: list[Entry], buffers: Mapping[str, memoryview]) -> None:
    """Read chunks into a live model once all are verified, in one transaction, which keeps other writers out."""
    before = store.path.stat().st_mtime_ns  # shows who wrote without a lock; hashing twice would cost 60 % of a load
    verify(store, round_num, entries)
    try:
        for entry in entries:
            store.read(entry, pieces_of(entry.parts, buffers))
        if store.path.stat().st_mtime_ns != before:
            raise CheckpointError("another program wrote to it meanwhile")
    except Exception as error:
        raise CheckpointError(
            f"{store.path}: round {round_num} could be verified, but not loaded ({error}): the model is partly "
            "overwritten and must be loaded again"
        ) from error
