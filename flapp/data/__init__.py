"""Artifacts, partitions and batches; knows neither Flower, Hydra nor models."""

from flapp.data.artifact import Artifact, DataError, open_artifact, write_artifact
from flapp.data.embedded import EMBEDDED, ensure_artifacts
from flapp.data.offline import ClientLoader, OfflineDataset
from flapp.data.partition import Partition, label_histogram, load_partition, make_partition

__all__ = [
    "EMBEDDED",
    "Artifact",
    "ClientLoader",
    "DataError",
    "OfflineDataset",
    "Partition",
    "ensure_artifacts",
    "label_histogram",
    "load_partition",
    "make_partition",
    "open_artifact",
    "write_artifact",
]
