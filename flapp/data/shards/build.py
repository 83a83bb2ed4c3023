"""All shards of a federation: who gets which writer, and all clients' folders, which appear together at the end.

<out>/client_<id>/     one shard a client (client.py)
      manifest.json    with clients.jsonl: what each shard holds (manifest.py)
"""

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flapp.data.artifact import DataError, check_space, locked, refusing, remove_leftovers, write_rows
from flapp.data.partition import Partition, save_partition
from flapp.data.shards.client import SPLITS, DistributedShardLoader, Part, read_blocks, read_rows, write_shard
from flapp.data.shards.leaf import open_source
from flapp.data.shards.manifest import Manifest, ShardRecord, load_manifest, write_manifest
from flapp.data.shards.source import Kind, Source, Writer
from flapp.files import replacing_folder
from flapp.untrusted import read_json

_FOLDER_BYTES = 64 << 10
MAPPING = '{"0": ["writer", ...], "1": [...]}, the values of the client column that each client gets'
STRATEGIES = ("round_robin", "random", "natural", "manual")
_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

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
    fractions are of each writer's samples. Shards in `out` that come from the same samples and settings are kept if all
    are whole, and otherwise written again; other shards are refused, or replaced with overwrite. Raises DataError for a
    source and settings that do not fit, and for a full disk.
    """
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        fault = f"val_fraction={val_fraction} and test_fraction={test_fraction} leave no training samples"
        raise DataError(f"{fault}: each must be at least 0 and their sum below 1")
    out = Path(out)
    with locked(out.with_name(f"{out.name}.lock")):
        remove_leftovers(out)
        _check_folder(out)
        found = source if isinstance(source, Source) else open_source(Path(source), progress, out.parent)
        plan = assign_writers(found.writers, strategy, clients, seed, mapping)
        _check_training(found, plan)
        settings = {"seed": seed, "val_fraction": val_fraction, "test_fraction": test_fraction}
        recipes = {client: _recipe(found, client, writers, settings) for client, writers in plan.items()}
        if left := len(found.writers) - sum(map(len, plan.values())):
            log.warning("%d of %d writers go to no client: clients=%s", left, len(found.writers), clients)
        facts = settings | found.kind.facts()
        facts |= {"strategy": strategy, "source_test": found.has_test, "left_out": left}
        facts |= {"recipes_sha256": hashlib.sha256(json.dumps(recipes, sort_keys=True).encode()).hexdigest()}
        if not overwrite and (manifest := _whole_shards(out, facts)) is not None:
            return manifest
        samples = sum(found.writers[name].count for writers in plan.values() for name in writers)
        check_space(out, samples * (found.kind.pixels + 8) + len(plan) * _FOLDER_BYTES)
        with replacing_folder(out) as partial:
            shown = tqdm(recipes.values(), "writing", unit="client", disable=None if progress else True)
            write_manifest(partial, [_write_client(found, partial, recipe) for recipe in shown], facts)
        return load_manifest(out)


def export_artifacts(manifest: Path, folder: Path) -> Path:
    """Write the samples of all shards as shared artifacts, and return the saved partition over them.

    Client k of the partition holds the samples of shard k in the same order. The train artifact has the training
    samples of all clients, then their validation samples. Raises DataError unless client ids are 0 to clients - 1.
    """
    records = load_manifest(manifest)
    ids = list(records)
    if ids != [str(number) for number in range(len(ids))]:
        found = f"{manifest} has client ids such as {ids[-1]}"
        raise DataError(f"{found}: make the shards again, with the ids 0 to {len(ids) - 1} in partition.mapping")
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

    source, found = hashlib.sha256(), [np.empty(0, np.int64)]
    for path, count in zip(files, counts, strict=True):
        for images, labels in read_blocks(path, count, kind):
            source.update(images.data)
            found.append(labels)
    labels = np.concatenate(found)
    source.update(labels.data)
    write = partial(write_rows, normalization=kind.normalization, preparation=preparation)
    write(folder, read, (len(labels), *kind.shape), labels, kind.classes, source.hexdigest())


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
    facts = {"client_id": client, "writers": writers, "source_sha256": digest.hexdigest()}
    return settings | facts | {"source_test": source.has_test}


def _check_folder(out: Path) -> None:
    """Raise DataError if `out`, which is replaced as a whole, holds anything but shards."""
    ours = {"manifest.json", "clients.jsonl", "clients.idx"}
    for path in out.iterdir() if out.exists() else ():
        if path.name not in ours and not path.name.startswith(("client_", ".client")):
            raise DataError(f"{path} is not part of the shards: move it away, or choose another folder for the shards")


def _whole_shards(out: Path, facts: dict[str, Any]) -> Manifest | None:
    """Return the manifest of the shards in `out`, None if there are none or one is damaged.

    Raises DataError if they were made with facts other than `facts`.
    """
    if not out.exists() or not any(out.iterdir()):
        return None
    manifest = load_manifest(out)
    if {key: manifest.facts.get(key) for key in facts} != facts:
        found = f"{out} comes from another source or other settings"
        raise DataError(f"{found}: add overwrite=true to replace all shards there, or choose another home")
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
            fix = "give its writers to a client with others, or split the source by sample instead of by user"
            raise DataError(f"client {client} would have no training sample (writers {', '.join(names)[:80]}): {fix}")


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


def assign_writers(
    writers: Collection[str], strategy: str, clients: int | None, seed: int, mapping: Path | None = None
) -> dict[str, list[str]]:
    """Return the writers of each client id, ids in numeric order; raises DataError when it cannot be done.

    round_robin: sorted writers are dealt in turn; random: the same in random order; natural: one writer a client, a
    random choice when there are more; manual: as in the JSON file `mapping`, {client id: [writer, ...]}.
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

    Each split with a fraction above 0 gets at least one sample of a writer who has three or more. A writer with fewer
    has samples in train only. With has_test the source's own test samples stay the test split, and val is drawn from
    the others.
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
                found = f"{path}: client {client} has writer {writer!r}, who is not in the source"
                raise DataError(f"{found}: correct or remove the name")
            if writer in owner:
                twice = f"clients {owner[writer]} and {client}" if owner[writer] != client else f"client {client} twice"
                raise DataError(f"{path}: writer {writer} is given to {twice}: a writer belongs to one client")
            owner[writer] = client
    if forgotten := [name for name in names if name not in owner]:
        some = ", ".join(forgotten[:5])
        raise DataError(f"{path} leaves {len(forgotten)} writers of the source out ({some}): assign every writer")
    numbers, others = (sorted(name for name in mapping if name.isdigit() is kind) for kind in (True, False))
    return {client: sorted(mapping[client]) for client in (*sorted(numbers, key=int), *others)}


def _read_mapping(path: Path) -> dict[str, list[str]]:
    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for client, writers in pairs:
            if client in mapping:
                raise DataError(f"{path} names client {client} twice: give each client one list of writers")
            if not _CLIENT_ID.fullmatch(client):
                rule = "must be 1 to 100 letters, digits, dots, dashes and underscores, a letter or digit first"
                raise DataError(f"{path}: client id {client!r} {rule}")
            if not isinstance(writers, list) or not writers or not all(isinstance(writer, str) for writer in writers):
                raise DataError(f"{path}: client {client} must have a list of one writer or more, as text")
            mapping[client] = writers
        return mapping

    with refusing(path, "write {client id: [writer, ...]} as JSON"):
        mapping = read_json(path, checked)
    if not isinstance(mapping, dict) or not mapping:
        raise DataError(f"{path} must hold {{client id: [writer, ...]}}, got {type(mapping).__name__}")
    return mapping
