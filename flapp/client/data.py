"""The data of one client: its own shard, or its part of a shared artifact; with the claim that it makes about them.

Both give the same batches for the same assignment. So a run over shards (not streamed) and one over the shared artifact
end in the same bytes. A process (such as a Ray actor) keeps data open from message to message, and opens and checks
them again when one of their files has been written again.
"""

import hashlib
from collections.abc import Iterable, Iterator
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

Splits = dict[str, tuple[Any, np.ndarray]]  # for each split a dataset and the rows of it
_moment: tuple[object, ...] | None = None


@dataclass(frozen=True)
class ClientData:
    """One client's samples: for each split a dataset and this client's rows of it, the path, and the client's claim."""

    splits: Splits
    path: Path
    claim: Claim


def clients_at(config: Config, node_config: NodeConfig) -> list[str]:
    """Name the clients at a node: its own id in a deployment, every num_partitions-th client in a simulation."""
    if node_config.client_id is not None:
        return [node_config.client_id]
    if node_config.num_partitions < 1:
        raise ConfigError("node-config has no client-id: start the SuperNode with --node-config 'client-id=\"0\"'")
    return [str(i) for i in range(node_config.partition_id, config.clients, node_config.num_partitions)]


def check_lives_here(client_id: str, config: Config, node_config: NodeConfig) -> None:
    """Raise ConfigError when a message has reached the node of another client; simulated nodes serve all of them."""
    if node_config.client_id is None and not node_config.num_partitions:
        clients_at(config, node_config)  # says what the node lacks
    if node_config.client_id is not None and client_id != node_config.client_id:
        whom = f"client {client_id}" if client_id else "a group"
        raise ConfigError(f"a message for {whom} reached the node of client {node_config.client_id}")


def open_client_data(config: Config, node_config: NodeConfig, client_id: str) -> ClientData:
    """Open a client's data; raises ConfigError for an unknown client, DataError for unusable data."""
    if config.distributed_data.streaming:  # each round reads it from disk, and so checks it again
        return open_own_shard(config, node_config, client_id)
    return open_once(config, node_config, client_id, stamp_of_files(config, node_config, client_id))


@lru_cache(maxsize=4096)
def open_once(config: Config, node_config: NodeConfig, client_id: str, files: Stamp) -> ClientData:
    """Open a client's data and keep them open while `files` stay as they are."""
    if config.distributed_data.enabled:
        return open_own_shard(config, node_config, client_id)
    if not (client_id.isdecimal() and str(int(client_id)) == client_id and int(client_id) < config.clients):
        raise ConfigError(f"client-id {client_id} is not one of the {config.clients} clients 0 to {config.clients - 1}")
    return open_shared_part(config, int(client_id), files)


def stamp_of_files(config: Config, node_config: NodeConfig, client_id: str) -> Stamp:
    """Return a value that changes when a file with the client's samples is written again."""
    if config.distributed_data.enabled:
        return stamp(shard_folder(config, node_config, client_id), SHARD_FILES)
    if _moment is None:
        return stamp_of_shared_files(config)
    return _stamp_at(config, _moment)


@contextmanager
def files_looked_up_once(*moment: object) -> Iterator[None]:
    """Check the shared files only once for all messages of a `moment`, such as a round, that this process handles.

    For many clients, checking them each time may take longer than training. For one message at a time, in one thread.
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


def shard_folder(config: Config, node_config: NodeConfig, client_id: str) -> Path:
    """Return the node's shard-path, or in a simulation home/data/<dataset>/shards/client_<id>."""
    return Path(node_config.shard_path or config.shards_dir / f"client_{client_id}")


def open_own_shard(config: Config, node_config: NodeConfig, client_id: str) -> ClientData:
    """Open the shard of a client."""
    settings = config.distributed_data
    path = shard_folder(config, node_config, client_id)
    shard = DistributedShardLoader(
        path, settings.strict_check, settings.streaming, client_id, config.dataset.normalization
    )
    counts = shard.num_samples
    splits = {split: (shard.split(split), np.arange(count)) for split, count in counts.items()}
    return _with_claim(client_id, splits, path, shard.label_hist, shard.digest, shard.last_modified)


def open_shared_part(config: Config, client: int, files: Stamp) -> ClientData:
    """Open a client's part of the artifact that all clients share; its digest covers artifacts and indices."""
    partition = cached_partition(config, files)
    splits: Splits = {}
    digest, modified = hashlib.sha256(), 0.0
    held = {"train": partition.train, "test": partition.test} | ({"val": partition.val} if partition.val else {})
    for split, parts in held.items():
        dataset = cached_dataset(config.data_dir, config.dataset, "test" if split == "test" else "train", files)
        splits[split] = (dataset, parts[client])
        digest.update(dataset.artifact.digest.encode() + parts[client].astype("<i8").tobytes())
        modified = max(modified, (dataset.artifact.path / "labels.npy").stat().st_mtime)
    dataset, rows = splits["train"]
    histogram = label_histogram(dataset.artifact.labels[rows], config.dataset.classes)
    path = config.data_dir / config.dataset.name
    return _with_claim(str(client), splits, path, histogram, digest.hexdigest(), modified)


def _with_claim(
    client_id: str, splits: Splits, path: Path, histogram: Iterable[int], digest: str, modified: float
) -> ClientData:
    train, test = (len(splits[split][1]) for split in ("train", "test"))
    val = len(splits["val"][1]) if "val" in splits else 0
    source = {"source_digest": source_digest(), "versions": versions()}
    return ClientData(splits, path, Claim(client_id, train, val, test, tuple(histogram), digest, modified, **source))


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
