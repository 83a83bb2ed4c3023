"""What saving and looking at a store answer with."""

import json
from dataclasses import dataclass
from typing import Any

from flapp.checkpoint.chunks import Part, Parts


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
class Chunk:
    """A stored chunk: its bytes are those of its parts, one behind the other."""

    chunk_id: int
    hash: str
    parts: Parts
    size: int
    data: bytes


@dataclass(frozen=True)
class Entry:
    """A row of chunk_metadata with the row of chunk_data that belongs to it."""

    chunk_id: int
    hash: bytes
    parts: list[Part]
    size: int
    rowid: int


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


def read_metrics(created_at: object, metrics: object, *digests: object) -> dict[str, Any]:
    """Return the metrics among the columns of a round; raises ValueError when these are not what is saved."""
    if not all(type(column) is str for column in (created_at, metrics, *digests)):
        raise ValueError("its metrics, digests or date are no text")
    read = json.loads(str(metrics))
    if type(read) is not dict:
        raise ValueError(f"its metrics are a {type(read).__name__}")
    return read
