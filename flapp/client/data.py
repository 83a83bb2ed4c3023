"""The data of one client: its own shard, or its part of a shared artifact; and its claim, which describes the data.

Both give the same batches for the same assignment. So a run over shards (not streamed) and one over the shared artifact
end with byte-identical models. A process (such as a Ray actor) keeps data open between messages, and opens and checks
them again when one of their files has changed.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flapp.config.schema import Config, ConfigError, DatasetConfig, NodeConfig
from flapp.custom import own, source_digest, versions
from flapp.data.artifact import check_samples, check_settings
from flapp.data.loader import ClientLoader
from flapp.data.offline import OfflineDataset
from flapp.data.partition import label_histogram
from flapp.data.shards.client import SHARD_FILES, DistributedShardLoader
from flapp.data.shards.dataset import ShardStream
from flapp.files import Stamp, stamp
from flapp.messages import Claim
from flapp.partitions import cached_partition, stamp_of_shared_files
from flapp.training import Batches

Splits = dict[str, tuple[Any, np.ndarray]]  # for each split a dataset and the rows of it


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
        found = f"a message for {whom} reached the node of client {node_config.client_id}"
        raise ConfigError(f"{found}: give each SuperNode the client-id of its own site")


def open_client_data(
    config: Config, node_config: NodeConfig, client_id: str, shared_files: Callable[[], Stamp] | None = None
) -> ClientData:
    """Open a client's data; raises ConfigError for an unknown client, DataError for unusable data.

    shared_files: returns the stamp of the files that all clients share, which are looked up here by default.
    """
    if not config.distributed_data.enabled:
        files = shared_files() if shared_files else stamp_of_shared_files(config)
        return open_once(config, config.data_dir / config.dataset.name, client_id, files)
    path = Path(node_config.shard_path or config.shards_dir / f"client_{client_id}")
    if config.distributed_data.streaming:  # each round reads it from disk, and so checks it again
        return open_own_shard(config, path, client_id)
    return open_once(config, path, client_id, stamp(path, SHARD_FILES))


@lru_cache(maxsize=4096)
def open_once(config: Config, path: Path, client_id: str, files: Stamp) -> ClientData:
    """Open a client's data and keep them open while `files` stay as they are."""
    if config.distributed_data.enabled:
        return open_own_shard(config, path, client_id)
    if not (client_id.isdecimal() and str(int(client_id)) == client_id and int(client_id) < config.clients):
        raise ConfigError(f"client-id {client_id} is not one of the {config.clients} clients 0 to {config.clients - 1}")
    return open_shared_part(config, path, int(client_id), files)


def open_own_shard(config: Config, path: Path, client_id: str) -> ClientData:
    """Open the shard of a client."""
    settings = config.distributed_data
    shard = DistributedShardLoader(
        path, settings.strict_check, settings.streaming, client_id, config.dataset.normalization
    )
    check_settings(str(path), shard.kind.settings, config.dataset.samples)
    splits = {split: (shard.split(split), np.arange(count)) for split, count in shard.num_samples.items()}
    return _with_claim(client_id, splits, path, shard.label_hist, shard.digest)


def open_shared_part(config: Config, path: Path, client: int, files: Stamp) -> ClientData:
    """Open a client's part of the artifact that all clients share; its digest covers artifacts and indices."""
    partition = cached_partition(config, files)
    splits: Splits = {}
    digest = hashlib.sha256()
    held = {"train": partition.train, "test": partition.test} | ({"val": partition.val} if partition.val else {})
    for split, parts in held.items():
        dataset = cached_dataset(path / ("test" if split == "test" else "train"), config.dataset, files)
        splits[split] = (dataset, parts[client])
        digest.update(dataset.artifact.digest.encode() + parts[client].astype("<i8").tobytes())
    dataset, rows = splits["train"]
    histogram = label_histogram(dataset.artifact.labels[rows], config.dataset.classes)
    return _with_claim(str(client), splits, path, histogram, digest.hexdigest())


def _with_claim(client_id: str, splits: Splits, path: Path, histogram: Iterable[int], digest: str) -> ClientData:
    train, test = (len(splits[split][1]) for split in ("train", "test"))
    val = len(splits["val"][1]) if "val" in splits else 0
    source = {"source_digest": source_digest(), "versions": versions()}
    return ClientData(splits, path, Claim(client_id, train, val, test, tuple(histogram), digest, **source))


def make_batches(config: Config, data: ClientData, split: str, device: torch.device, seed: int | None) -> Batches:
    """Return the batches of a split, in an order drawn from seed (None: as stored), for a model on `device`.

    On a CUDA device images travel as uint8 and are normalized there, unless they are streamed or augmented by the
    user's own code.
    """
    dataset, rows = data.splits[split]
    size = config.train.batch_size if split == "train" else config.evaluate.batch_size
    if isinstance(dataset, ShardStream):
        return ShardStream(dataset.path, dataset.normalization, size, seed, kind=dataset.kind)
    if split == "train" and seed is not None and (function := own(config, "dataset.augment")):
        loader = ClientLoader(dataset, rows, size, seed, config.model.image_size)
        return Changed(loader, lambda inputs: function(inputs, loader.augment_generator))
    augment = config.dataset.augment is True and split == "train"
    on_device = device.type == "cuda" and dataset.has_images
    output = "uint8" if on_device else "float32"
    loader = ClientLoader(dataset, rows, size, seed, config.model.image_size, output, augment=augment)
    return Changed(loader, lambda pixels: loader.to_input(pixels.to(device))) if on_device else loader


@dataclass(frozen=True)
class Changed:
    """Iterate over a loader, changing the inputs of each batch."""

    loader: ClientLoader
    change: Callable[[Tensor], Tensor]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in self.loader:
            yield self.change(inputs), labels


@lru_cache(maxsize=8)
def cached_dataset(folder: Path, settings: DatasetConfig, files: Stamp) -> OfflineDataset:
    """Open a split and keep it open while `files` stay as they are; raises DataError when it is not as configured."""
    dataset = OfflineDataset(folder, normalization=settings.normalization)
    check_samples(dataset.artifact, settings.shape, settings.classes, settings.normalization)
    return dataset
