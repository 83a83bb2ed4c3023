"""Artifacts, partitions, shards and batches; knows neither Flower, Hydra nor models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flapp.data.artifact import (
    Artifact,
    DataError,
    arrays_sha256,
    check_samples,
    open_artifact,
    write_artifact,
    write_rows,
)
from flapp.data.blocks import ReadRows
from flapp.data.cifar import CIFAR, cifar_files, cifar_sha256, download_cifar, read_cifar
from flapp.data.client_shard import SHARD_FILES, DistributedShardLoader, read_meta
from flapp.data.embedded import EMBEDDED, ensure_artifacts, is_prepared
from flapp.data.leaf import open_source
from flapp.data.manifest import Manifest, ShardRecord, check_claim, load_manifest, open_manifest
from flapp.data.materialized import materialize, materialized_folder
from flapp.data.partition import (
    Partition,
    check_enough,
    hold_out,
    label_histogram,
    load_partition,
    make_partition,
)
from flapp.data.shards import export_artifacts, open_shard, write_shards
from flapp.data.verified import Stamp, is_verified, open_verified, stamp

if TYPE_CHECKING:
    from flapp.data.loader import ClientLoader
    from flapp.data.offline import OfflineCIFAR10, OfflineCIFAR100, OfflineDataset
    from flapp.data.pixels import to_input
    from flapp.data.shard_dataset import ShardSplit, ShardStream

__all__ = [
    "CIFAR",
    "EMBEDDED",
    "SHARD_FILES",
    "Artifact",
    "ClientLoader",
    "DataError",
    "DistributedShardLoader",
    "Manifest",
    "OfflineCIFAR10",
    "OfflineCIFAR100",
    "OfflineDataset",
    "Partition",
    "ReadRows",
    "ShardRecord",
    "ShardSplit",
    "ShardStream",
    "Stamp",
    "arrays_sha256",
    "check_claim",
    "check_enough",
    "check_samples",
    "cifar_files",
    "cifar_sha256",
    "download_cifar",
    "ensure_artifacts",
    "export_artifacts",
    "hold_out",
    "is_prepared",
    "is_verified",
    "label_histogram",
    "load_manifest",
    "load_partition",
    "make_partition",
    "materialize",
    "materialized_folder",
    "open_artifact",
    "open_manifest",
    "open_shard",
    "open_source",
    "open_verified",
    "read_cifar",
    "read_meta",
    "stamp",
    "to_input",
    "write_artifact",
    "write_rows",
    "write_shards",
]

# Preparing data needs no torch, whose import costs 200 MB and more than a second: only what uses tensors brings it in.
_NEEDS_TORCH = {
    "ClientLoader": "loader",
    "OfflineCIFAR10": "offline",
    "OfflineCIFAR100": "offline",
    "OfflineDataset": "offline",
    "ShardSplit": "shard_dataset",
    "ShardStream": "shard_dataset",
    "to_input": "pixels",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
