"""Artifacts, partitions, shards and batches; knows neither Flower, Hydra nor models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flapp.data.artifact import Artifact, DataError, open_artifact, write_artifact
from flapp.data.client_shard import DistributedShardLoader
from flapp.data.embedded import EMBEDDED, ensure_artifacts
from flapp.data.leaf import open_source
from flapp.data.manifest import Manifest, ShardRecord, check_claim, load_manifest
from flapp.data.partition import Partition, label_histogram, load_partition, make_partition
from flapp.data.shards import export_artifacts, open_shard, write_shards

if TYPE_CHECKING:
    from flapp.data.offline import ClientLoader, OfflineDataset
    from flapp.data.shard_dataset import ShardSplit, ShardStream

__all__ = [
    "EMBEDDED",
    "Artifact",
    "ClientLoader",
    "DataError",
    "DistributedShardLoader",
    "Manifest",
    "OfflineDataset",
    "Partition",
    "ShardRecord",
    "ShardSplit",
    "ShardStream",
    "check_claim",
    "ensure_artifacts",
    "export_artifacts",
    "label_histogram",
    "load_manifest",
    "load_partition",
    "make_partition",
    "open_artifact",
    "open_shard",
    "open_source",
    "write_artifact",
    "write_shards",
]

# Preparing data needs no torch, whose import costs 200 MB and more than a second: only what uses tensors brings it in.
_NEEDS_TORCH = {
    "ClientLoader": "offline",
    "OfflineDataset": "offline",
    "ShardSplit": "shard_dataset",
    "ShardStream": "shard_dataset",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
