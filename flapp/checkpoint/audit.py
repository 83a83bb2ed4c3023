"""Inspect a store: find every problem in it, compare two rounds, and export a round as safetensors."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flapp.checkpoint.chunks import RESTORE, CheckpointError, Entry, Spec, layout
from flapp.checkpoint.store import CHUNKS, ORPHANS, Store
from flapp.files import replacing, sha256_of_file

if TYPE_CHECKING:
    from torch import Tensor

MOST_PROBLEMS = 100


@dataclass(frozen=True)
class Verification:
    """What was checked, and the problems found, at most MOST_PROBLEMS of them."""

    rounds: int
    chunks: int
    bytes: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class TensorChange:
    """How a tensor differs between two rounds.

    kind: 'changed', 'added', 'removed' or 'reshaped' (another shape or dtype). norm: the 2-norm of the change;
    relative_norm: that divided by the norm of the first; both NaN unless 'changed'. changed: how many elements differ.
    """

    key: str
    kind: str
    norm: float
    relative_norm: float
    changed: int


def verify(store: Store) -> Verification:
    """Check the file's structure, every round's metadata and the hash of each chunk of a round, each chunk once."""
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
    strays = "SELECT DISTINCT round FROM chunk_metadata WHERE round NOT IN (SELECT round FROM rounds)"
    for (number,) in store.execute(strays):
        found = f"{store.path}: round {number} has chunks, but is not in the list of rounds"
        yield f"{found}: save round {number} again, or {RESTORE}"
    if orphans := len(store.execute(ORPHANS)):
        yield f"{store.path}: {orphans} chunks belong to no round: they are deleted when a round expires"


def _round_problems(store: Store, record: tuple[Any, ...], sizes: dict[int, int]) -> Iterator[str]:
    """Yield the problems of a round; `sizes` holds the size of every chunk read so far; this adds this round's."""
    round_num, entries = record[0], []
    try:
        store.round(record)
    except CheckpointError as error:
        yield str(error)
    for row in store.execute(CHUNKS, round_num):
        try:
            entry = store.entry(round_num, row)
            entries.append(entry)
            if entry.rowid not in sizes:
                sizes[entry.rowid] = entry.size
                store.read_chunk(round_num, entry)
        except CheckpointError as error:
            yield str(error)
    try:
        store.check(round_num, record[6], entries)
    except CheckpointError as error:
        yield str(error)


def diff(store: Store, rounds: tuple[int, int], held: list[list[Entry]]) -> list[TensorChange]:
    """Compare the chunks of two rounds; of tensors with equal chunks nothing is read."""
    old, new = (layout((entry.hash, entry.parts) for entry in entries) for entries in held)
    shared = [key for key in old if key in new and old[key][:2] == new[key][:2]]
    keys = {key for key in shared if old[key][3] != new[key][3]}
    a, b = (_read(store, number, entries, keys) for number, entries in zip(rounds, held, strict=True))
    changes: list[TensorChange | None] = []
    for key in {**old, **new}:
        if key in keys:
            changes.append(_change(key, a[key], b[key]))
        elif key not in shared:
            kind = "added" if key not in old else "removed" if key not in new else "reshaped"
            numel = math.prod((new.get(key) or old[key])[1])
            changes.append(TensorChange(key, kind, math.nan, math.nan, numel))
    return [change for change in changes if change]


def _read(store: Store, round_num: int, entries: list[Entry], keys: set[str]) -> "dict[str, Tensor]":
    """Return the tensors `keys`, and incomplete ones that share a chunk with them."""
    from flapp.checkpoint.tensors import new_tensors, raw

    entries = [entry for entry in entries if any(part.key in keys for part in entry.parts)]
    parts = [part for entry in entries for part in entry.parts]
    tensors = new_tensors({part.key: Spec(part.spec.dtype, part.spec.shape) for part in parts})
    store.read_into(round_num, entries, {key: raw(tensor) for key, tensor in tensors.items()})
    return tensors


def _change(key: str, old: "Tensor", new: "Tensor") -> TensorChange | None:
    import torch

    from flapp.checkpoint.tensors import raw

    differs = (np.asarray(raw(old)) != np.asarray(raw(new))).reshape(-1, old.element_size()).any(axis=1)
    if not differs.any():
        return None
    wide = torch.complex128 if old.is_complex() else torch.float64
    norm = float((new.to(wide) - old.to(wide)).norm())
    base = float(old.to(wide).norm())
    return TensorChange(key, "changed", norm, norm / base if base else math.inf, int(differs.sum()))


def export(tensors: "Mapping[str, Tensor]", round_num: int, path: Path) -> str:
    """Write tensors as a safetensors file, tied ones each on their own, and return its SHA-256."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    header = json.dumps({"format_version": 1, "round": round_num}, sort_keys=True)
    first = {id(tensors[key]): key for key in reversed([*tensors])}
    own = {key: tensor if first[id(tensor)] == key else tensor.clone() for key, tensor in tensors.items()}
    try:
        with replacing(path) as partial:
            save_file(own, partial, metadata={"flapp": header})
            return sha256_of_file(partial)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"round {round_num} cannot be exported to {path} ({error})") from error
