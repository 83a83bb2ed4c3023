"""The checks of tools.verify_data for a folder of shards, or for the shard of one client."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flapp.data.artifact import DataError
from flapp.data.shards.client import DistributedShardLoader, read_meta
from flapp.data.shards.manifest import load_manifest
from flapp.data.shards.split_file import read_blocks
from flapp.untrusted import printable

MOST_TEXT = 1000  # characters of what a check says
Facts = tuple[str, str, bool, str]


def verify_shards(folder: Path, sample: int | None) -> Iterator[Facts]:
    """Yield (where, check, ok, detail): the manifest, and `sample` shards (None: all) by themselves and against it."""
    if not (folder / "manifest.json").exists():
        yield _ask(folder, "shard", partial(_shard, folder))
        return
    loaded = _ask(folder, "manifest", lambda: f"{len(load_manifest(folder)):,} clients")
    yield loaded
    if not loaded[2]:
        return
    manifest = load_manifest(folder)
    whole = _ask(folder, "hashes and totals", partial(_whole, manifest))
    yield whole
    if not whole[2]:  # then what is looked up in it need not be there
        return
    clients = list(manifest)
    yield _ask(folder, "folders", partial(_folders, folder, manifest))
    writers: dict[str, str] = {}
    for i in np.unique(np.linspace(0, len(clients) - 1, sample or len(clients)).astype(int)) if clients else ():
        yield _ask(folder, f"client {clients[i]}", partial(_client, manifest, clients[i], writers))


def _ask(folder: Path, name: str, question: Callable[[], str]) -> Facts:
    try:
        return str(folder), name, True, printable(question(), MOST_TEXT)
    except DataError as error:
        return str(folder), name, False, printable(" ".join(str(error).split()), MOST_TEXT)


def _whole(manifest: Any) -> str:
    manifest.verify()
    return f"as they were written, {manifest.facts['totals']}"


def _folders(folder: Path, manifest: Any) -> str:
    expected = {manifest[client].shard for client in manifest}
    found = {path.name for path in folder.iterdir() if path.is_dir()}
    if missing := sorted(expected - found):
        raise DataError(f"{missing[0]} and {len(missing) - 1} more are missing: make the shards again")
    if strange := sorted(found - expected):
        raise DataError(f"{strange[0]} and {len(strange) - 1} more are not in the manifest: delete them")
    return f"{len(found):,}"


def _client(manifest: Any, client_id: str, writers: dict[str, str]) -> str:
    """Check a client's shard, that it is the one in the manifest, and that its writers are nobody else's."""
    folder, record = manifest.shard_path(client_id), manifest[client_id]
    detail, shard = _shard(folder, client_id), _open(folder, client_id)
    if shard.digest != record.digest or list(shard.label_hist) != list(record.label_hist):
        raise DataError(f"{folder} is not the shard that the manifest lists: make the shards again")
    for writer in read_meta(folder)["writers"]:
        if (other := writers.setdefault(writer, client_id)) != client_id:
            raise DataError(f"writer {writer} is also with client {other}: make the shards again")
    return detail


def _shard(folder: Path, client_id: str | None = None) -> str:
    """Check a shard against its own meta.json, and its images for what no hash can tell."""
    shard = _open(folder, client_id)
    for split, count in shard.num_samples.items():
        highest = 0
        for images, _ in read_blocks(folder / f"{split}.safetensors", count, 4096):
            if not images.reshape(len(images), -1).any(axis=1).all():
                raise DataError(f"{split} of {folder} has an image that is all zero: check the source")
            highest = max(highest, int(images.max(initial=0)))
        if count and highest <= 1:
            raise DataError(f"{split} of {folder} has no pixel above 1 of 255: floats were cast to uint8")
    return ", ".join(f"{count:,} {split}" for split, count in shard.num_samples.items())


def _open(folder: Path, client_id: str | None) -> Any:
    return DistributedShardLoader(folder, expected_client_id=client_id)
