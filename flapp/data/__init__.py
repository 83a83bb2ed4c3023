"""Artifacts, partitions and batches; knows neither Flower, Hydra nor models."""

from flapp.data.artifact import Artifact, DataError, open_artifact, write_artifact, write_rows
from flapp.data.blocks import ReadRows
from flapp.data.cifar import CIFAR, cifar_files, cifar_sha256, download_cifar, read_cifar
from flapp.data.embedded import EMBEDDED, arrays_sha256, ensure_artifacts, is_prepared
from flapp.data.materialized import materialize, materialized_folder
from flapp.data.offline import ClientLoader, OfflineDataset
from flapp.data.partition import Partition, label_histogram, load_partition, make_partition

__all__ = [
    "CIFAR",
    "EMBEDDED",
    "Artifact",
    "ClientLoader",
    "DataError",
    "OfflineDataset",
    "Partition",
    "ReadRows",
    "arrays_sha256",
    "cifar_files",
    "cifar_sha256",
    "download_cifar",
    "ensure_artifacts",
    "is_prepared",
    "label_histogram",
    "load_partition",
    "make_partition",
    "materialize",
    "materialized_folder",
    "open_artifact",
    "read_cifar",
    "write_artifact",
    "write_rows",
]
