"""Which client gets which writer, and which of a writer's samples become train, val and test."""

import hashlib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from flapp.data.artifact import DataError, refusing
from flapp.data.shards.source import Writer
from flapp.untrusted import read_json

MAPPING = '{"0": ["writer", ...], "1": [...]}, the values of the client column that each client gets'
STRATEGIES = ("round_robin", "random", "natural", "manual")
_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def assign_writers(
    writers: Collection[str], strategy: str, clients: int | None, seed: int, mapping: Path | None = None
) -> dict[str, list[str]]:
    """Return the writers of each client id, ids in numeric order; raises DataError when it cannot be done.

    round_robin: sorted writers are dealt in turn; random: the same in random order; natural: one writer a client,
    `clients` of them drawn at random when there are more; manual: as in the JSON file `mapping`,
    {client id: [writer, ...]}.
    """
    if strategy not in STRATEGIES:
        raise DataError(f"partition={strategy} does not make shards: choose one of {', '.join(STRATEGIES)}")
    if mapping is None and strategy == "manual":
        raise DataError(f"partition=manual needs partition.mapping=FILE, JSON of the form {MAPPING}: add it")
    if mapping is not None and strategy != "manual":
        raise DataError(f"partition={strategy} takes no partition.mapping, partition=manual does: leave it out")
    names = sorted(writers)
    if mapping is not None:
        return _manual(names, clients, mapping)
    if clients is None and strategy == "natural":
        clients = len(names)
    if clients is None or not 1 <= clients <= len(names):
        raise DataError(f"clients={clients} cannot share {len(names)} writers: set clients between 1 and {len(names)}")
    rng = np.random.default_rng(seed)
    if strategy == "natural" and clients < len(names):
        names = sorted(names[i] for i in rng.permutation(len(names))[:clients])
    if strategy == "random":
        names = [names[i] for i in rng.permutation(len(names))]
    return {str(client): sorted(names[client::clients]) for client in range(clients)}


def split_samples(
    name: str, writer: Writer, has_test: bool, seed: int, val_fraction: float, test_fraction: float
) -> dict[str, np.ndarray]:
    """Split a writer's samples into sorted indices of train, val and test, drawn from (seed, writer's name).

    A writer with three samples or more is in every split, one with fewer only in train. With has_test the source's
    own test samples stay the test split, and val is drawn from the others.
    """
    own = writer.count - writer.held_out
    drawn = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    order = np.random.default_rng(int.from_bytes(drawn)).permutation(own)
    test = 0 if has_test else _share(own, test_fraction, own - 2)
    val = _share(own, val_fraction, own - test - 1)
    parts = {"train": order[test + val :], "val": order[test : test + val], "test": order[:test]}
    if has_test:
        parts["test"] = np.arange(own, writer.count)
    return {split: np.sort(part) for split, part in parts.items()}


def _counting_order(client_id: str) -> tuple[bool, int, str]:
    """Return a key that sorts 2 before 10, and numbers before names."""
    number = client_id.isdigit()
    return not number, int(client_id) if number else 0, client_id


def _share(count: int, fraction: float, most: int) -> int:
    if fraction == 0 or count < 3:
        return 0
    return min(max(1, int(count * fraction + 0.5)), most)


def _manual(names: list[str], clients: int | None, path: Path) -> dict[str, list[str]]:
    mapping = _read_mapping(path)
    if clients is not None and clients != len(mapping):
        raise DataError(f"{path} names {len(mapping)} clients, clients={clients}: leave clients out or make them agree")
    known, owner = set(names), dict[str, str]()
    for client, writers in mapping.items():
        for writer in writers:
            if writer not in known:
                raise DataError(f"{path}: client {client} has writer {writer!r}, who is not in the source")
            if writer in owner:
                twice = f"clients {owner[writer]} and {client}" if owner[writer] != client else f"client {client} twice"
                raise DataError(f"{path}: writer {writer} is given to {twice}: a writer belongs to one client")
            owner[writer] = client
    if forgotten := [name for name in names if name not in owner]:
        some = ", ".join(forgotten[:5])
        raise DataError(f"{path} leaves {len(forgotten)} writers of the source out ({some}): assign every writer")
    return {client: sorted(mapping[client]) for client in sorted(mapping, key=_counting_order)}


def _read_mapping(path: Path) -> dict[str, list[str]]:
    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for client, writers in pairs:
            if client in mapping:
                raise DataError(f"{path} names client {client} twice: give each client one list of writers")
            if not _CLIENT_ID.fullmatch(client):
                raise DataError(f"{path}: client id {client!r} must be letters, digits, dot, dash or underscore")
            if not isinstance(writers, list) or not writers or not all(isinstance(writer, str) for writer in writers):
                raise DataError(f"{path}: client {client} must have a list of one writer or more, as text")
            mapping[client] = writers
        return mapping

    with refusing(path, "write {client id: [writer, ...]} as JSON"):
        mapping = read_json(path, checked)
    if not isinstance(mapping, dict) or not mapping:
        raise DataError(f"{path} must hold {{client id: [writer, ...]}}, got {type(mapping).__name__}")
    return mapping
