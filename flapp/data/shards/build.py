"""All shards of a federation, written client by client into a temporary folder that takes its place at the end.

<out>/client_<id>/     one shard a client (client.py)
      manifest.json    with clients.jsonl: what each shard holds (manifest.py)
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flapp.data.artifact import DataError, check_space, locked, remove_leftovers, write_rows
from flapp.data.partition import Partition, save_partition
from flapp.data.shards.assign import STRATEGIES, assign_writers, split_samples
from flapp.data.shards.client import (
    SPLITS,
    DistributedShardLoader,
    Part,
    read_blocks,
    read_labels,
    read_rows,
    write_shard,
)
from flapp.data.shards.leaf import open_source
from flapp.data.shards.manifest import Manifest, ShardRecord, load_manifest, write_manifest
from flapp.data.shards.source import Kind, Source
from flapp.files import replacing_folder

_FOLDER_BYTES = 64 << 10

log = logging.getLogger(__name__)


def write_shards(
    source: Path | Source,
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
    """Write the shards of all clients into `out`, whole or not at all, and return the manifest.

    source: opened, or FEMNIST's folder as leaf.py describes it; strategy, clients, mapping: see assign_writers; the
    fractions are of each writer's samples. Shards that are in `out` already are kept if they are whole and come from
    the same samples and settings; others are refused, or replaced with overwrite. Raises DataError for a source and
    settings that do not fit, and for a full disk.
    """
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise DataError(
            f"val_fraction={val_fraction} and test_fraction={test_fraction} leave no training samples: "
            "each must be at least 0 and their sum below 1"
        )
    out = Path(out)
    with locked(out.with_name(f"{out.name}.lock")):
        remove_leftovers(out)
        _check_folder(out)
        found = source if isinstance(source, Source) else open_source(Path(source), progress, out.parent)
        plan = assign_writers(found.writers, strategy, clients, seed, mapping)
        _check_training(found, plan)
        settings = {"seed": seed, "val_fraction": val_fraction, "test_fraction": test_fraction}
        recipes = {client: _recipe(found, client, writers, settings) for client, writers in plan.items()}
        left = len(found.writers) - sum(map(len, plan.values()))
        if left:
            log.warning("%d of %d writers go to no client: clients=%s", left, len(found.writers), clients)
        facts = settings | found.kind.facts()
        facts |= {"strategy": strategy, "source_test": found.has_test, "left_out": left}
        facts |= {"recipes_sha256": hashlib.sha256(json.dumps(recipes, sort_keys=True).encode()).hexdigest()}
        if not overwrite and (manifest := _whole_shards(out, facts)) is not None:
            return manifest
        samples = sum(found.writers[name].count for writers in plan.values() for name in writers)
        check_space(out, samples * (found.kind.pixels + 8) + len(plan) * _FOLDER_BYTES)
        with replacing_folder(out) as partial:
            records = [
                _write_client(found, partial, recipe)
                for recipe in tqdm(recipes.values(), "writing", unit="client", disable=None if progress else True)
            ]
            write_manifest(partial, records, facts)
        return load_manifest(out)


def export_artifacts(manifest: Path, folder: Path) -> Path:
    """Write the samples of all shards as shared artifacts, and return the saved partition over them.

    Client k of the partition holds the samples of shard k in the same order. The train artifact has the training
    samples of all clients first, then their validation samples. Raises DataError unless the client ids are 0 to
    clients - 1, as a partition counts them.
    """
    records = load_manifest(manifest)
    ids = list(records)
    if ids != [str(number) for number in range(len(ids))]:
        raise DataError(f"{manifest} has client ids such as {ids[-1]}: a partition counts them 0 to {len(ids) - 1}")
    for strategy in STRATEGIES:  # a partition of the samples that are replaced here must not stay
        (folder / "partitions" / f"{strategy}.safetensors").unlink(missing_ok=True)
    parts: dict[str, tuple[np.ndarray, ...]] = {}
    paths = {client: open_shard(records, client).path for client in ids}
    preparation = hashlib.sha256("".join(records[client].digest for client in ids).encode()).hexdigest()
    for artifact, splits in (("train", ("train", "val")), ("test", ("test",))):
        counts = [records[client].num_samples[split] for split in splits for client in ids]
        rows = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
        parts |= {split: tuple(rows[i * len(ids) : (i + 1) * len(ids)]) for i, split in enumerate(splits)}
        files = [paths[client] / f"{split}.safetensors" for split in splits for client in ids]
        _join(folder / artifact, records.kind, files, counts, preparation)
    requested = np.array([records[client].label_hist for client in ids], dtype=np.float64)
    path = folder / "partitions" / f"{records.facts['strategy']}.safetensors"
    save_partition(path, Partition(**parts, requested=requested))
    return path


def _join(folder: Path, kind: Kind, files: list[Path], counts: list[int], preparation: str) -> None:
    """Write an artifact of the samples in `files`, `counts` in each, one file after the other."""
    starts = np.cumsum([0, *counts])

    def read(start: int, stop: int) -> np.ndarray:
        found = []
        for at in range(int(np.searchsorted(starts, start, "right")) - 1, int(np.searchsorted(starts, stop))):
            first, last = max(start, starts[at]) - starts[at], min(stop, starts[at + 1]) - starts[at]
            found.append(read_rows(files[at], first, last, kind)[0])
        return np.concatenate(found).reshape(-1, *kind.shape)

    labels = np.concatenate([read_labels(path) for path in files])
    source_sha256 = hashlib.sha256()
    for path, count in zip(files, counts, strict=True):
        for images, _ in read_blocks(path, count, kind):
            source_sha256.update(images.data)
    source_sha256.update(labels.data)
    sha256, shape = source_sha256.hexdigest(), (len(labels), *kind.shape)
    write = partial(write_rows, normalization=kind.normalization, preparation=preparation)
    write(folder, read, shape, labels, kind.classes, sha256)


def open_shard(manifest: Manifest, client_id: str) -> DistributedShardLoader:
    """Open and check a client's shard; raises DataError when it is not the one that the manifest lists."""
    shard = DistributedShardLoader(manifest.shard_path(client_id), expected_client_id=client_id)
    if shard.digest != manifest[client_id].digest:
        raise DataError(f"{shard.path} is not the shard that {manifest.path} lists: make the shards again")
    return shard


def _recipe(source: Source, client: str, writers: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the facts that determine the bytes of a client's shard, under the keys of its meta.json."""
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


def _check_folder(out: Path) -> None:
    """Raise DataError if `out`, which is replaced as a whole, holds anything but shards."""
    ours = {"manifest.json", "clients.jsonl", "clients.idx"}
    for path in out.iterdir() if out.exists() else ():
        if path.name not in ours and not path.name.startswith(("client_", ".client")):
            raise DataError(f"{path} is not a shard's: move it away, or choose another folder for the shards")


def _whole_shards(out: Path, facts: dict[str, Any]) -> Manifest | None:
    """Return the manifest of the shards in `out`, None if there are none or one is damaged.

    Raises DataError if they were made with facts other than `facts`.
    """
    if not out.exists() or not any(out.iterdir()):
        return None
    manifest = load_manifest(out)
    if {key: manifest.facts.get(key) for key in facts} != facts:
        raise DataError(
            f"{out} comes from another source, seed, strategy or number of clients: add overwrite=true to replace all "
            "shards there, or choose another home"
        )
    try:
        for client in manifest:
            open_shard(manifest, client)
    except DataError as error:
        log.warning("%s; all shards are written again", error)
        return None
    return manifest


def _check_training(source: Source, plan: dict[str, list[str]]) -> None:
    for client, names in plan.items():
        if all(source.writers[name].count == source.writers[name].held_out for name in names):
            raise DataError(
                f"client {client} would have no training sample (writers {', '.join(names)[:80]}): give its writers "
                "to a client with others, or split the source by sample instead of by user"
            )


def _write_client(source: Source, out: Path, recipe: dict[str, Any]) -> ShardRecord:
    cuts = {}
    for name in recipe["writers"]:
        fractions = (recipe["val_fraction"], recipe["test_fraction"])
        cuts[name] = split_samples(name, source.writers[name], source.has_test, recipe["seed"], *fractions)
    counts = {split: sum(len(cut[split]) for cut in cuts.values()) for split in SPLITS}

    def parts() -> Iterator[Part]:
        for name, cut in cuts.items():
            for split, chosen in cut.items():
                yield from ((split, *block) for block in source.blocks(name, chosen))

    client = recipe["client_id"]
    meta = write_shard(out / f"client_{client}", source.kind, recipe, counts, parts())
    hist, writers = tuple(meta["label_hist"]), len(meta["writers"])
    return ShardRecord(client, f"client_{client}", meta["num_samples"], hist, writers, meta["digest"])
