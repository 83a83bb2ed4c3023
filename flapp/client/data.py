"""What one client holds: its own shard, or its part of a shared artifact; with the claim it makes about it.

Both give the same batches for the same assignment, so that a run over shards (not streamed) and one over the shared
artifact end in the same bytes. What is opened here survives from message to message inside one process (a Ray actor),
until one of its files is written again: then it is opened and checked again.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flapp.config.schema import Config, ConfigError, DatasetConfig, NodeConfig
from flapp.data.artifact import Stamp, check_samples, stamp
from flapp.data.loader import ClientLoader
from flapp.data.offline import OfflineDataset
from flapp.data.partition import label_histogram
from flapp.data.shards.client import SHARD_FILES, DistributedShardLoader
from flapp.data.shards.dataset import ShardStream
from flapp.messages import Claim
from flapp.partitions import cached_partition, stamp_of_shared_files
from flapp.source import source_digest, versions
from flapp.training import Batches

_moment: tuple[object, ...] | None = None


@dataclass(frozen=True)
class ClientData:
    """One client's samples: per split a dataset and the rows of it that are this client's; where from; its claim."""

    splits: dict[str, tuple[Any, np.ndarray]]
    path: Path
    claim: Claim


def clients_at(config: Config, site: NodeConfig) -> list[str]:
    """Name the clients at a node: its own id in a deployment, every num_partitions-th client in a simulation."""
    if site.client_id is not None:
        return [site.client_id]
    if site.num_partitions < 1:
        raise ConfigError("node-config has no client-id: start the SuperNode with --node-config 'client-id=\"0\"'")
    return [str(i) for i in range(site.partition_id, config.clients, site.num_partitions)]


def check_lives_here(client_id: str, config: Config, site: NodeConfig) -> None:
    """Raise ConfigError when a message for this client has reached the node of another; simulated nodes serve all."""
    if site.client_id is None and not site.num_partitions:
        clients_at(config, site)  # says what the node lacks
    if site.client_id is not None and client_id != site.client_id:
        raise ConfigError(f"a message for client {client_id} reached the node of client {site.client_id}")


def open_client_data(config: Config, site: NodeConfig, client_id: str) -> ClientData:
    """Open what a client holds; raises ConfigError for an unknown client, DataError for data that will not do."""
    if config.distributed_data.streaming:  # it is read anew each round, and so checked anew
        return open_own_shard(config, site, client_id)
    return open_once(config, site, client_id, stamp_of_files(config, site, client_id))


@lru_cache(maxsize=4096)
def open_once(config: Config, site: NodeConfig, client_id: str, files: Stamp) -> ClientData:
    """Open what a client holds and keep it open while `files` stay as they are."""
    if config.distributed_data.enabled:
        return open_own_shard(config, site, client_id)
    if not (client_id.isdecimal() and str(int(client_id)) == client_id and int(client_id) < config.clients):
        raise ConfigError(f"client-id {client_id} is not one of the {config.clients} clients 0 to {config.clients - 1}")
    return open_shared_part(config, int(client_id), files)


def stamp_of_files(config: Config, site: NodeConfig, client_id: str) -> Stamp:
    """Return what differs once a file that a client's samples are read from is written again."""
    if config.distributed_data.enabled:
        return stamp(shard_folder(config, site, client_id), SHARD_FILES)
    if _moment is None:
        return stamp_of_shared_files(config)
    return _stamp_at(config, _moment)


@contextmanager
def files_looked_up_once(*moment: object) -> Iterator[None]:
    """Look shared files up once in all messages of a `moment`, such as a round, that this process handles in a row.

    To look them up for each of many clients may take longer than to train. For one message at a time, in one thread.
    """
    global _moment
    _moment = moment
    try:
        yield
    finally:
        _moment = None


@lru_cache(maxsize=1)
def _stamp_at(config: Config, moment: tuple[object, ...]) -> Stamp:
    return stamp_of_shared_files(config)


def shard_folder(config: Config, site: NodeConfig, client_id: str) -> Path:
    """Return the site's shard-path, in a simulation home/data/<dataset>/shards/client_<id>."""
    return Path(site.shard_path or config.shards_dir / f"client_{client_id}")


def open_own_shard(config: Config, site: NodeConfig, client_id: str) -> ClientData:
    """Open the shard of a client."""
    settings = config.distributed_data
    path = shard_folder(config, site, client_id)
    shard = DistributedShardLoader(
        path, settings.strict_check, settings.streaming, client_id, config.dataset.normalization
    )
    counts = shard.num_samples
    claim = Claim(
        client_id,
        train=counts["train"],
        val=counts["val"],
        test=counts["test"],
        label_hist=tuple(shard.label_hist),
        shard_digest=shard.digest,
        last_modified=shard.last_modified,
        source_digest=source_digest(),
        versions=versions(),
    )
    return ClientData({split: (shard.split(split), np.arange(count)) for split, count in counts.items()}, path, claim)


def open_shared_part(config: Config, client: int, files: Stamp) -> ClientData:
    """Open a client's part of the artifact that all clients share; its digest covers artifacts and indices."""
    partition = cached_partition(config, files)
    splits, digest, modified = {}, hashlib.sha256(), 0.0
    held = {"train": partition.train, "test": partition.test} | ({"val": partition.val} if partition.val else {})
    for split, parts in held.items():
        dataset = cached_dataset(config.data_dir, config.dataset, "test" if split == "test" else "train", files)
        splits[split] = (dataset, parts[client])
        digest.update(dataset.artifact.digest.encode() + parts[client].astype("<i8").tobytes())
        modified = max(modified, (dataset.artifact.path / "labels.npy").stat().st_mtime)
    dataset, rows = splits["train"]
    claim = Claim(
        str(client),
        train=len(rows),
        val=len(partition.val[client]) if partition.val else 0,
        test=len(partition.test[client]),
        label_hist=tuple(label_histogram(dataset.artifact.labels[rows], config.dataset.classes)),
        shard_digest=digest.hexdigest(),
        last_modified=modified,
        source_digest=source_digest(),
        versions=versions(),
    )
    return ClientData(splits, config.data_dir / config.dataset.name, claim)


def make_batches(config: Config, data: ClientData, split: str, device: torch.device, seed: int | None) -> Batches:
    """Return the batches of a split, in an order drawn from seed (None: as stored), for a model on `device`.

    On a CUDA device images travel as uint8 and are normalised there.
    """
    dataset, rows = data.splits[split]
    size = config.train.batch_size if split == "train" else config.evaluate.batch_size
    if isinstance(dataset, ShardStream):
        return ShardStream(dataset.path, dataset.normalization, size, seed)
    augment = config.dataset.augment and split == "train"
    on_device = device.type == "cuda" and dataset.has_images
    output = "uint8" if on_device else "float32"
    loader = ClientLoader(dataset, rows, size, seed, config.model.image_size, output, augment=augment)
    return OnDevice(loader, device) if on_device else loader


@dataclass(frozen=True)
class OnDevice:
    """Iterate over a uint8 loader, normalising each batch on the device."""

    loader: ClientLoader
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in self.loader:
            yield self.loader.to_input(pixels.to(self.device)), labels


@lru_cache(maxsize=8)
def cached_dataset(data: Path, settings: DatasetConfig, split: str, files: Stamp) -> OfflineDataset:
    """Open a split and keep it open while `files` stay as they are; raises DataError when it is not as configured."""
    dataset = OfflineDataset(data / settings.name / split, normalization=settings.normalization)
    check_samples(dataset.artifact, settings.shape, settings.classes)
    return dataset
