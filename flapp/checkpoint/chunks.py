"""What a store holds: tensors cut into chunks, rounds, and the digests of both; needs no torch.

A chunk is elements start to end of one or more tensors, one after the other, as raw row-major little-endian bytes,
each tensor in its own dtype. The database says in JSON what a chunk holds, by tensor: start, end, shape, dtype and, for
tied weights, the key of the earlier tensor that has the same memory:

    {"head.weight": [[0, 640, [10, 64], "float32"]], "tied.weight": [[0, 8, [8], "bfloat16", "embedding.weight"]]}
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from flapp.untrusted import parse_json, printable

ITEM_SIZES = {f"{kind}{8 * size}": size for kind in ("int", "uint") for size in (1, 2, 4, 8)}
ITEM_SIZES |= {"bool": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
ITEM_SIZES |= {"complex32": 4, "complex64": 8, "complex128": 16}
ITEM_SIZES |= {f"float8_{kind}": 1 for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")}
LARGEST = 1 << 62  # bytes of one tensor, so that no product of sizes overflows
# Equal chunks are stored once, so a small file can claim a model of any size. Without a model to load it into, a round
# may claim at most ALWAYS_BELIEVED bytes, or MOST_REPEATED times the bytes of its distinct chunks.
ALWAYS_BELIEVED = 128 << 20
MOST_REPEATED = 8
RESTORE = "restore the file from a copy"  # the fix for damage
Parts = dict[str, list[tuple[int, int, tuple[int, ...]]]]


class CheckpointError(ValueError):
    """A store, or a model for it, cannot be used; the message is one line, with the fix if one is known."""


class Cut(TypedDict):
    """What one chunk of ChunkManager.split_model holds: (start, end, shape) by tensor, and its number of elements."""

    chunk_id: int
    parts: Parts
    flat_size: int


@dataclass(frozen=True)
class Spec:
    """A tensor's dtype (one of ITEM_SIZES), shape, and the key of the tensor whose memory it shares, if any."""

    dtype: str
    shape: tuple[int, ...]
    tied: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_SIZES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Part:
    """Elements start to end of the tensor `key`, as one chunk holds them."""

    key: str
    start: int
    end: int
    spec: Spec

    @property
    def nbytes(self) -> int:
        return (self.end - self.start) * ITEM_SIZES[self.spec.dtype]

    def of(self, buffer: memoryview) -> memoryview:
        """Return the part's bytes in those of its whole tensor."""
        offset = self.start * ITEM_SIZES[self.spec.dtype]
        return buffer[offset : offset + self.nbytes]


@dataclass(frozen=True)
class Chunk:
    """A stored chunk: its data are the bytes of its parts, one after the other."""

    chunk_id: int
    hash: str
    parts: Parts
    size: int
    data: bytes


@dataclass(frozen=True)
class Entry:
    """Where a chunk of a round is stored: `rowid` in chunk_data."""

    chunk_id: int
    hash: bytes
    parts: list[Part]
    size: int
    rowid: int


@dataclass(frozen=True)
class Saved:
    """What saving a round stored: its tensors, chunks and bytes, and how many of those are new in the store."""

    round: int
    tensors: int
    chunks: int
    new_chunks: int
    bytes: int
    new_bytes: int
    model_digest: str


@dataclass(frozen=True)
class Round:
    """A stored round; created_at is UTC in ISO 8601."""

    round: int
    created_at: str
    metrics: dict[str, Any]
    config_digest: str
    input_digest: str
    model_digest: str
    chunks: int
    bytes: int


def cut_tensors(specs: Mapping[str, Spec], chunk_bytes: int) -> list[list[Part]]:
    """Cut each tensor separately into chunks of at most `chunk_bytes`, so that an unchanged tensor keeps its chunks."""
    chunks: list[list[Part]] = []
    for key, spec in specs.items():
        step = max(1, chunk_bytes // ITEM_SIZES[spec.dtype])
        starts = range(0, max(spec.numel, 1), step)
        chunks += [[Part(key, start, min(start + step, spec.numel), spec)] for start in starts]
    return chunks


def cut_evenly(specs: Mapping[str, Spec], chunk_num: int) -> list[list[Part]]:
    """Cut all tensors, one after the other, into `chunk_num` chunks whose element counts differ by at most one.

    No chunk is empty, so fewer elements than `chunk_num` make fewer chunks.
    """
    total = sum(spec.numel for spec in specs.values())
    count = max(1, min(chunk_num, total)) if specs else 0
    ends = [total * (i + 1) // count for i in range(count)]
    chunks: list[list[Part]] = [[] for _ in ends]
    position = current = 0
    for key, spec in specs.items():
        start = 0
        while True:
            current += position == ends[current] and spec.numel > 0
            end = min(spec.numel, start + ends[current] - position)
            chunks[current].append(Part(key, start, end, spec))
            position, start = position + end - start, end
            if start == spec.numel:
                break
    return chunks


def ranges_of(parts: Iterable[Part]) -> Parts:
    """Return (start, end, shape) of each part, by tensor."""
    ranges: Parts = {}
    for part in parts:
        ranges.setdefault(part.key, []).append((part.start, part.end, part.spec.shape))
    return ranges


def encode_parts(parts: Iterable[Part]) -> str:
    """Return the JSON described at the top of this file."""
    ranges: dict[str, list[Any]] = {}
    for part in parts:
        tied = [part.spec.tied] if part.spec.tied is not None else []
        row = [part.start, part.end, part.spec.shape, part.spec.dtype, *tied]
        ranges.setdefault(part.key, []).append(row)
    return json.dumps(ranges, separators=(",", ":"))


def decode_parts(text: object) -> list[Part]:
    """Read the JSON of encode_parts; raises ValueError for anything else, and for sizes beyond any memory."""
    try:
        ranges = parse_json(text, surrogates=True) if isinstance(text, str) else None
        return [_part(key, *row) for key, rows in ranges.items() for row in rows]  # type: ignore[union-attr]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"its parts are not what flapp writes ({printable(error)})") from None


def _part(key: str, start: int, end: int, shape: list[int], dtype: str, tied: str | None = None) -> Part:
    numbers = [start, end, *shape]
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in numbers) or start > end:
        raise ValueError(f"{key} has a bad range or shape")
    if type(dtype) is not str or dtype not in ITEM_SIZES or type(tied) not in (str, type(None)):
        raise ValueError(f"{key} has an unknown dtype or tie")
    if math.prod(max(n, 1) for n in shape) > LARGEST // 16 or len(shape) > 64:
        raise ValueError(f"{key} has a shape larger than any memory")
    return Part(key, start, end, Spec(dtype, tuple(shape), tied))


def join(chunks: Iterable[list[Part]]) -> dict[str, Spec]:
    """Return the tensors that chunks hold; raises ValueError unless they hold each element exactly once, in order."""
    specs: dict[str, Spec] = {}
    filled: dict[str, int] = {}
    for part in (part for parts in chunks for part in parts):
        if specs.setdefault(part.key, part.spec) != part.spec:
            raise ValueError(f"tensor {part.key} is {specs[part.key]} in one chunk and {part.spec} in another")
        end = filled.get(part.key, 0)
        if part.start != end:
            raise ValueError(f"tensor {part.key} continues at element {part.start:,}, not at {end:,}")
        filled[part.key] = part.end
    for key, spec in specs.items():
        if filled[key] != spec.numel:
            raise ValueError(f"tensor {key} ends at element {filled[key]:,} of {spec.numel:,}")
        if spec.tied is not None and specs.get(spec.tied) != Spec(spec.dtype, spec.shape):
            fault = "is missing, is tied itself, or has another dtype or shape"
            raise ValueError(f"tensor {key} is tied to {spec.tied}, which {fault}")
    return specs


def check_believable(where: str, entries: list[Entry]) -> None:
    """Raise CheckpointError when a round claims far more bytes than its distinct chunks contain."""
    claimed = sum(entry.size for entry in entries)
    stored = sum({entry.rowid: entry.size for entry in entries}.values())
    most = max(ALWAYS_BELIEVED, MOST_REPEATED * stored)
    if claimed > most:
        raise CheckpointError(
            f"{where}: it claims tensors of {claimed:,} bytes, but its distinct chunks hold {stored:,}, and without a "
            f"model at most {most:,} are read: pass the model that it belongs to, or do not trust the file"
        )


def layout(chunks: Iterable[tuple[bytes, list[Part]]]) -> dict[str, list[Any]]:
    """Return dtype, shape, tie and [start, end, offset in the chunk, hash of the chunk] of each part, by tensor."""
    tensors: dict[str, list[Any]] = {}
    for digest, parts in chunks:
        offset = 0
        for part in parts:
            spec = part.spec
            ranges = tensors.setdefault(part.key, [spec.dtype, spec.shape, spec.tied, []])[3]
            ranges.append([part.start, part.end, offset, digest.hex()])
            offset += part.nbytes
    return tensors


def round_digest(chunks: Iterable[tuple[bytes, list[Part]]]) -> str:
    """Return the SHA-256 over the sorted (key, dtype, shape, tie, chunk hashes and ranges) of a round, in hex."""
    return hashlib.sha256(json.dumps(sorted(layout(chunks).items())).encode()).hexdigest()


def facts_digest(*facts: object) -> str:
    """Return the SHA-256 over a round's number, saved, created_at, metrics and three digests, in hex."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
