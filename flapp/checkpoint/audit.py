"""Looking at a store as a whole: every problem in it, what changed between rounds, and a round as safetensors."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flapp.checkpoint import streams
from flapp.checkpoint.chunks import CheckpointError, Spec, check_believable, join, layout, round_digest
from flapp.checkpoint.records import Entry
from flapp.checkpoint.sql import CHUNKS, ORPHANS, STRAY_ROUNDS
from flapp.checkpoint.store import Store

if TYPE_CHECKING:
    from torch import Tensor

MOST_PROBLEMS = 100


@dataclass(frozen=True)
class Verification:
    """What was checked, and every problem found in it, at most MOST_PROBLEMS of them."""

    rounds: int
    chunks: int
    bytes: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class TensorChange:
    """How a tensor differs from one round to another.

    kind: 'changed', 'added', 'removed' or 'reshaped' (another shape or dtype). norm: the 2-norm of the change,
    relative_norm: that over the norm of the first; both NaN unless 'changed'. changed: how many elements differ.
    """

    key: str
    kind: str
    norm: float
    relative_norm: float
    changed: int


def verify(store: Store) -> Verification:
    """Check the file's structure, every round's metadata and, once each, every chunk's hash."""
    problems: list[str] = []
    sizes: dict[int, int] = {}
    with store.transaction():
        records = store.records()
        if store.meta:
            problems += _structure_problems(store)
        for record in records.values():
            problems += _round_problems(store, record, sizes)
    return Verification(len(records), len(sizes), sum(sizes.values()), tuple(problems[:MOST_PROBLEMS]))


def _structure_problems(store: Store) -> Iterator[str]:
    for (text,) in store.execute(f"PRAGMA integrity_check({MOST_PROBLEMS})"):
        if text != "ok":
            yield f"{store.path}: {text}"
    for (number,) in store.execute(STRAY_ROUNDS):
        yield f"{store.path}: round {number} has chunks, but is no round: save or drop it again"
    if orphans := len(store.execute(ORPHANS)):
        yield f"{store.path}: {orphans} chunks belong to no round: they go when a round expires"


def _round_problems(store: Store, record: tuple[Any, ...], sizes: dict[int, int]) -> Iterator[str]:
    """Yield the problems of a round, and note the size of every chunk that is read, none twice."""
    round_num, entries = record[0], []
    try:
        store.round(record)
    except CheckpointError as error:
        yield str(error)
    for values in store.execute(CHUNKS, round_num):
        try:
            entry = store.entry(round_num, values)
            entries.append(entry)
            if entry.rowid not in sizes:
                sizes[entry.rowid] = entry.size
                data = [memoryview(bytearray(entry.size))]
                store.read(entry, data)
                if damage := store.damage(round_num, entry, data):
                    yield str(damage)
        except CheckpointError as error:
            yield str(error)
    try:
        check_metadata(store, round_num, record[6], entries)
        check_size(store, round_num, entries)
    except CheckpointError as error:
        yield str(error)


def check_metadata(store: Store, round_num: int, digest: str, entries: list[Entry]) -> dict[str, Spec]:
    """Return the tensors of a round; raises CheckpointError unless its chunks are those of its model digest."""
    try:
        specs = join(entry.parts for entry in entries)
        if round_digest((entry.hash, entry.parts) for entry in entries) != digest:
            raise ValueError("its metadata is not what was saved (another model digest)")
    except ValueError as error:
        raise CheckpointError(f"{store.path}: round {round_num}: {error}: restore the file from a copy") from None
    return specs


def check_size(store: Store, round_num: int, entries: list[Entry]) -> None:
    """Raise CheckpointError for a round of more bytes than what is stored of it may stand for."""
    stored = {entry.rowid: entry.size for entry in entries}
    try:
        check_believable(sum(entry.size for entry in entries), sum(stored.values()))
    except ValueError as error:
        raise CheckpointError(f"{store.path}: round {round_num}: {error}") from None


def diff(store: Store, rounds: tuple[int, int], held: list[list[Entry]]) -> list[TensorChange]:
    """Compare what two rounds hold; only tensors of one kind, but not of the same chunks, are read."""
    old, new = (layout((entry.hash, entry.parts) for entry in entries) for entries in held)
    changes: dict[str, TensorChange | None] = {}
    for key in {**old, **new}:
        if key not in old or key not in new or old[key][:2] != new[key][:2]:
            kind = "added" if key not in old else "removed" if key not in new else "reshaped"
            changes[key] = TensorChange(key, kind, math.nan, math.nan, math.prod((new.get(key) or old[key])[1]))
        elif old[key][3] != new[key][3]:
            changes[key] = None  # takes its place in the order
    keys = {key for key, change in changes.items() if change is None}
    a, b = (_read(store, number, entries, keys) for number, entries in zip(rounds, held, strict=True))
    found = (change or _change(key, a[key], b[key]) for key, change in changes.items())
    return [change for change in found if change]


def _read(store: Store, round_num: int, entries: list[Entry], keys: set[str]) -> "dict[str, Tensor]":
    """Return tensors of which those in `keys` are whole, and others are where these share a chunk with them."""
    from flapp.checkpoint.tensors import new_tensors, raw

    entries = [entry for entry in entries if any(part.key in keys for part in entry.parts)]
    parts = [part for entry in entries for part in entry.parts]
    tensors = new_tensors({part.key: Spec(part.spec.dtype, part.spec.shape) for part in parts})
    streams.read(store, round_num, entries, {key: raw(tensor) for key, tensor in tensors.items()})
    return tensors


def _change(key: str, old: "Tensor", new: "Tensor") -> TensorChange | None:
    from flapp.checkpoint.tensors import raw

    width = old.element_size()
    differs = (np.asarray(raw(old)) != np.asarray(raw(new))).reshape(-1, width).any(axis=1)
    if not differs.any():
        return None
    import torch

    wide = torch.complex128 if old.is_complex() else torch.float64
    norm = float((new.to(wide) - old.to(wide)).norm())
    base = float(old.to(wide).norm())
    return TensorChange(key, "changed", norm, norm / base if base else math.inf, int(differs.sum()))


def export(tensors: "Mapping[str, Tensor]", round_num: int, path: Path) -> str:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_name(path.name + ".tmp")
    header = json.dumps({"format_version": 1, "round": round_num}, sort_keys=True)
    seen: set[int] = set()
    own = {}
    for key, tensor in tensors.items():
        own[key] = tensor.clone() if id(tensor) in seen else tensor
        seen.add(id(tensor))
    try:
        save_file(own, partial, metadata={"flapp": header})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(partial, path)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"round {round_num} cannot be exported to {path} ({error})") from error
    return digest
