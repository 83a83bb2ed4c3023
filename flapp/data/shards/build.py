"""All shards of a federation: who gets which writer, written client by client, and the manifest over them.

    <out>/client_<id>/     one shard a client (client_shard.py)
          manifest.json    with clients.jsonl and clients.idx (manifest.py), written last

A shard is whole or not there; one that is there, verifies and comes from the same samples, seed and fractions is
kept, so that the same command goes on after a crash and ends in the same bytes.
"""

import hashlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flapp.data.artifact import DataError, locked, write_artifact
from flapp.data.assign import SPLITS, STRATEGIES, assign_writers, check_fractions, split_samples
from flapp.data.leaf import CLASS_NAMES, SIDE, Source, open_source
from flapp.data.partition import Partition, save_partition
from flapp.data.shards.client import DistributedShardLoader, read_meta, verified_meta, write_shard
from flapp.data.shards.manifest import Manifest, ShardRecord, load_manifest, write_manifest
from flapp.data.shards.split_file import SAMPLE_BYTES, read_blocks, sync_folder

__all__ = ["DistributedShardLoader", "export_artifacts", "open_shard", "write_shards"]

_FOLDER_BYTES = 64 << 10

log = logging.getLogger(__name__)


def write_shards(
    source: Path,
    out: Path,
    strategy: str,
    clients: int | None = None,
    seed: int = 0,
    mapping: Path | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Write the shards of all clients into `out`, going on where an earlier run stopped, and return the manifest.

    source: a folder as leaf.py describes; strategy, clients, mapping: see assign_writers; the fractions are of each
    writer's samples. Without overwrite, shards of other data or settings are refused; with it they are replaced.
    Raises DataError before anything is written when source, settings or disk space do not do.
    """
    check_fractions(val_fraction, test_fraction)
    found = open_source(Path(source), progress)
    plan = assign_writers(found.writers, strategy, clients, seed, mapping)
    _check_training(found, plan)
    settings = {"seed": seed, "val_fraction": val_fraction, "test_fraction": test_fraction}
    left = len(found.writers) - sum(map(len, plan.values()))
    if left:
        log.warning("%d of %d writers go to no client: clients=%s", left, len(found.writers), clients)
    out = Path(out)
    with locked(out.with_name(f"{out.name}.lock")):
        recipes = {client: _recipe(found, client, writers, settings) for client, writers in plan.items()}
        done = {} if overwrite else _finished(out, recipes)
        _check_space(out, found, [plan[client] for client in plan if client not in done], overwrite)
        if overwrite:
            _clear(out)
        for client in tqdm(plan, "writing", unit="client", disable=None if progress else True):
            if client not in done:
                done[client] = _write_client(found, out, recipes[client])
        facts = settings | {"dataset": "femnist", "strategy": strategy, "source_test": found.has_test, "left_out": left}
        sync_folder(out)
        return write_manifest(out, [_record(done[client]) for client in plan], facts)


def export_artifacts(manifest: Path, folder: Path) -> Path:
    """Write the samples of all shards as shared artifacts, and return the saved partition over them.

    Client k of the partition holds the samples of shard k in the same order. Images are uint8 (N, 28, 28, 1); the train
    artifact has the training samples of all clients first, then their validation samples. Raises DataError unless the
    client ids are 0 to clients - 1, as a partition counts them.
    """
    records = load_manifest(manifest)
    records.verify()
    ids = list(records)
    if ids != [str(number) for number in range(len(ids))]:
        raise DataError(f"{manifest} has client ids such as {ids[-1]}: a partition counts them 0 to {len(ids) - 1}")
    for strategy in STRATEGIES:  # what deals the samples that are there now must not outlive them
        (folder / "partitions" / f"{strategy}.safetensors").unlink(missing_ok=True)
    parts: dict[str, tuple[np.ndarray, ...]] = {}
    for artifact, splits in (("train", ("train", "val")), ("test", ("test",))):
        held = [(split, client, records[client].num_samples[split]) for split in splits for client in ids]
        total = sum(count for _, _, count in held)
        images, labels = np.empty((total, SIDE, SIDE, 1), np.uint8), np.empty(total, np.int64)
        at = 0
        for split, client, count in held:
            shard = open_shard(records, client)
            parts[split] = (*parts.get(split, ()), np.arange(at, at + count))
            for some, names in read_blocks(shard.path / f"{split}.safetensors", count, 4096):
                images[at : at + len(names), ..., 0], labels[at : at + len(names)] = some, names
                at += len(names)
        source = hashlib.sha256(images.data)
        source.update(labels.data)
        write_artifact(folder / artifact, images, labels, list(CLASS_NAMES), source.hexdigest())
    requested = np.array([records[client].label_hist for client in ids], dtype=np.float64)
    path = folder / "partitions" / f"{records.facts['strategy']}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_partition(path, Partition(**parts, requested=requested))
    return path


def open_shard(manifest: Manifest, client_id: str) -> DistributedShardLoader:
    """Open and check a client's shard; raises DataError when it is not the one that the manifest lists."""
    shard = DistributedShardLoader(manifest.shard_path(client_id), expected_client_id=client_id)
    if shard.digest != manifest[client_id].digest:
        raise DataError(f"{shard.path} is not the shard that {manifest.path} lists: make the shards again")
    return shard


def _recipe(source: Source, client: str, writers: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the bytes of a client's shard, in the words of its meta.json."""
    digest = hashlib.sha256()
    for name in writers:
        writer = source.writers[name]
        digest.update(f"{writer.count} {writer.held_out} {writer.sha256}\n".encode())
    return settings | {
        "client_id": client,
        "writers": writers,
        "source_sha256": digest.hexdigest(),
        "source_test": source.has_test,
    }


def _matches(meta: dict[str, Any], recipe: dict[str, Any]) -> bool:
    return recipe == meta["recipe"] | {"client_id": meta["client_id"], "writers": meta["writers"]}


def _finished(out: Path, recipes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the metas of whole shards in `out`; raises DataError for a shard that these recipes do not make."""
    metas = {}
    for folder in sorted(out.glob("client_*")):
        client = folder.name.removeprefix("client_")
        try:
            fits = client in recipes and _matches(read_meta(folder), recipes[client])
        except DataError:
            fits = client in recipes
        if not fits:
            raise DataError(
                f"{folder} comes from another source, seed, strategy or number of clients: add overwrite=true to "
                "replace all shards there, or choose another home"
            )
        if (meta := verified_meta(folder)) is not None:
            metas[client] = meta
    for partial in out.glob(".client_*.tmp"):
        shutil.rmtree(partial)
    return metas


def _clear(out: Path) -> None:
    """Remove all shards, their manifest first: without it nothing else counts as complete."""
    for name in ("manifest.json", "clients.idx", "clients.jsonl"):
        (out / name).unlink(missing_ok=True)
    for folder in [*out.glob("client_*"), *out.glob(".client_*.tmp")]:
        shutil.rmtree(folder)


def _check_training(source: Source, plan: dict[str, list[str]]) -> None:
    for client, names in plan.items():
        if all(source.writers[name].count == source.writers[name].held_out for name in names):
            raise DataError(
                f"client {client} would have no training sample (writers {', '.join(names)[:80]}): give its writers "
                "to a client with others, or split the source by sample instead of by user"
            )


def _check_space(out: Path, source: Source, missing: list[list[str]], overwrite: bool) -> None:
    samples = sum(source.writers[name].count for names in missing for name in names)
    needed = samples * SAMPLE_BYTES + len(missing) * _FOLDER_BYTES
    out.mkdir(parents=True, exist_ok=True)
    replaced = sum(path.stat().st_size for path in out.glob("client_*/*")) if overwrite else 0
    free = shutil.disk_usage(out).free + replaced
    if needed > free:
        raise DataError(f"{out} needs {needed >> 20} MB for the shards, {free >> 20} MB are free: make room there")


def _write_client(source: Source, out: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    cuts = {
        name: split_samples(
            name,
            source.writers[name],
            source.has_test,
            recipe["seed"],
            recipe["val_fraction"],
            recipe["test_fraction"],
        )
        for name in recipe["writers"]
    }
    counts = {split: sum(len(cut[split]) for cut in cuts.values()) for split in SPLITS}

    def parts() -> Iterator[dict[str, tuple[np.ndarray, np.ndarray]]]:
        for name, cut in cuts.items():
            images, labels = source.read(name)
            yield {split: (images[chosen], labels[chosen]) for split, chosen in cut.items()}

    folder = out / f"client_{recipe['client_id']}"
    shutil.rmtree(folder, ignore_errors=True)
    return write_shard(folder, recipe, counts, parts())


def _record(meta: dict[str, Any]) -> ShardRecord:
    return ShardRecord(
        meta["client_id"],
        f"client_{meta['client_id']}",
        meta["num_samples"],
        tuple(meta["label_hist"]),
        len(meta["writers"]),
        meta["digest"],
    )
