"""The checks of tools.verify_data for a folder of shards, or for the shard of one client."""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from flapp.data import DataError

Facts = tuple[str, str, bool, str]


def verify_shards(folder: Path, sample: int | None) -> Iterator[Facts]:
    """Yield (where, check, ok, detail): the manifest, then each of `sample` shards (None: all) against it."""
    loader = import_module("flapp.data.client_shard").DistributedShardLoader
    if not (folder / "manifest.json").exists():
        yield _ask(folder, "shard", lambda: _counts(loader(folder)))
        return
    try:
        manifest = import_module("flapp.data.manifest").load_manifest(folder)
        clients = list(manifest)
    except DataError as error:
        yield str(folder), "manifest", False, str(error)
        return
    yield str(folder), "manifest", True, f"{len(clients):,} clients"
    spread = np.unique(np.linspace(0, len(clients) - 1, sample or len(clients)).astype(int))
    for client_id in (clients[i] for i in spread):
        yield _ask(folder, f"client {client_id}", partial(_fits, loader, folder, client_id, manifest))


def _ask(folder: Path, name: str, question: Any) -> Facts:
    try:
        return str(folder), name, True, question()
    except DataError as error:
        return str(folder), name, False, str(error)


def _fits(loader: Any, folder: Path, client_id: str, manifest: Any) -> str:
    shard, record = loader(folder / f"client_{client_id}", expected_client_id=client_id), manifest[client_id]
    if shard.digest != record.digest:
        raise DataError(f"client_{client_id} has another digest than the manifest says: make the shards again")
    return _counts(shard)


def _counts(shard: Any) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in shard.num_samples.items())
