"""Cutting tensors into chunks, the JSON that says what a chunk holds, and the digests of both; needs no torch.

A cut is {chunk_id, parts: {key: [(flat_start, flat_end, shape)]}, flat_size}: elements flat_start to flat_end of each
tensor, laid one behind the other in raw row-major little-endian bytes, each in its own dtype. In the database `parts`
is JSON and carries the dtype as well, and the key of an earlier tensor whose memory this one shares (tied weights):

    {"head.weight": [[0, 640, [10, 64], "float32"]], "tied.weight": [[0, 8, [8], "bfloat16", "embedding.weight"]]}
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from flapp.untrusted import parse_json, printable

Parts = dict[str, list[tuple[int, int, tuple[int, ...]]]]

ITEM_SIZES = {f"{kind}{8 * size}": size for kind in ("int", "uint") for size in (1, 2, 4, 8)}
ITEM_SIZES |= {"bool": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
ITEM_SIZES |= {"complex32": 4, "complex64": 8, "complex128": 16}
ITEM_SIZES |= {f"float8_{kind}": 1 for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")}
LARGEST = 1 << 62  # bytes of one tensor, so that no product of sizes overflows
# A round may hold ALWAYS_BELIEVED bytes, or MOST_REPEATED times those of its different chunks. More must be asked for
# by a model that has as many: equal chunks are stored once, so a small file can claim a model of any size.
ALWAYS_BELIEVED = 128 << 20
MOST_REPEATED = 8


class CheckpointError(ValueError):
    """Says in one line what is wrong with a store or a model for it, and what to do."""


class Cut(TypedDict):
    """What one chunk is made of."""

    chunk_id: int
    parts: Parts
    flat_size: int


@dataclass(frozen=True)
class Spec:
    """A tensor's kind: a dtype of ITEM_SIZES, its shape and the key of the tensor whose memory it shares, if any."""

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
    def offset(self) -> int:
        """Return where the part begins in its tensor, in bytes."""
        return self.start * ITEM_SIZES[self.spec.dtype]

    @property
    def nbytes(self) -> int:
        return (self.end - self.start) * ITEM_SIZES[self.spec.dtype]


def cut_tensors(specs: Mapping[str, Spec], chunk_bytes: int) -> list[Cut]:
    """Cut every tensor on its own into chunks of at most `chunk_bytes`, so that one that stays keeps its chunks."""
    cuts: list[Cut] = []
    for key, spec in specs.items():
        step = max(1, chunk_bytes // ITEM_SIZES[spec.dtype])
        for start in range(0, max(spec.numel, 1), step):
            end = min(start + step, spec.numel)
            cuts.append({"chunk_id": len(cuts), "parts": {key: [(start, end, spec.shape)]}, "flat_size": end - start})
    return cuts


def cut_evenly(specs: Mapping[str, Spec], chunk_num: int) -> list[Cut]:
    """Cut all tensors, one behind the other, into `chunk_num` chunks whose element counts differ by at most one.

    There are fewer chunks when there are fewer elements, since none is empty.
    """
    total = sum(spec.numel for spec in specs.values())
    count = max(1, min(chunk_num, total)) if specs else 0
    bounds = [total * i // max(count, 1) for i in range(count + 1)]
    cuts: list[Cut] = [{"chunk_id": i, "parts": {}, "flat_size": bounds[i + 1] - bounds[i]} for i in range(count)]
    position = current = 0
    for key, spec in specs.items():
        first, last = position, position + spec.numel
        while True:
            current += position == bounds[current + 1] and last > position
            end = min(last, bounds[current + 1])
            cuts[current]["parts"][key] = [(position - first, end - first, spec.shape)]
            position = end
            if position == last:
                break
    return cuts


def parts_of(cut: Cut, specs: Mapping[str, Spec]) -> list[Part]:
    """Return the parts of a cut in the order of their bytes."""
    return [Part(key, start, end, specs[key]) for key, ranges in cut["parts"].items() for start, end, _ in ranges]


def encode_parts(parts: Iterable[Part]) -> str:
    """Return the JSON of the module's docstring."""
    ranges: dict[str, list[Any]] = {}
    for part in parts:
        tied = [part.spec.tied] if part.spec.tied is not None else []
        row = [part.start, part.end, part.spec.shape, part.spec.dtype, *tied]
        ranges.setdefault(part.key, []).append(row)
    return json.dumps(ranges, separators=(",", ":"))


def decode_parts(text: object) -> list[Part]:
    """Read encode_parts' JSON; raises ValueError for anything else, whatever the sizes that it claims."""
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
        raise ValueError(f"{key} has a shape beyond all memory")
    return Part(key, start, end, Spec(dtype, tuple(shape), tied))


def join(chunks: Iterable[list[Part]]) -> dict[str, Spec]:
    """Return the tensors that chunks are parts of; raises ValueError unless each is there once from end to end."""
    specs: dict[str, Spec] = {}
    filled: dict[str, int] = {}
    for part in (part for parts in chunks for part in parts):
        if specs.setdefault(part.key, part.spec) != part.spec:
            raise ValueError(f"tensor {part.key} is {specs[part.key]} in one chunk and {part.spec} in another")
        if part.start != filled.get(part.key, 0):
            raise ValueError(f"tensor {part.key} lacks what stands before element {part.start:,}")
        filled[part.key] = part.end
    for key, spec in specs.items():
        if filled[key] != spec.numel:
            raise ValueError(f"tensor {key} ends at element {filled[key]:,} of {spec.numel:,}")
        if spec.tied is not None and specs.get(spec.tied) != Spec(spec.dtype, spec.shape):
            raise ValueError(f"tensor {key} is tied to {spec.tied}, which is not there or of another kind")
    return specs


def check_believable(claimed: int, stored: int) -> None:
    """Raise ValueError when a round claims more bytes than its different chunks, of `stored` bytes, may stand for."""
    most = max(ALWAYS_BELIEVED, MOST_REPEATED * stored)
    if claimed > most:
        raise ValueError(
            f"it claims tensors of {claimed:,} bytes, but its different chunks hold {stored:,}, from which at most "
            f"{most:,} are read without a model: pass the model that it belongs to, or do not trust the file"
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
