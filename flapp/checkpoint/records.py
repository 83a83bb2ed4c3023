"""What saving and looking at a store answer with."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from flapp.checkpoint.chunks import Part, Parts
from flapp.untrusted import parse_json


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


def facts_digest(*facts: object) -> str:
    """Return the SHA-256 over a round's number, saved, created_at, metrics and the three digests, in hexadecimal."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_metrics(*record: object) -> dict[str, Any]:
    """Return the metrics of a row of `rounds`; raises ValueError when its facts are not those that were saved."""
    *facts, digest = record
    if not all(type(fact) is str for fact in facts[2:]):
        raise ValueError("its metrics, digests or date are no text")
    if facts_digest(*facts) != digest:
        raise ValueError("another digest of its date, metrics and digests than noted")
    return dict(parse_json(str(facts[3]), surrogates=True))
