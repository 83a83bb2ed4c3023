"""Artifacts, partitions and batches; knows neither Flower, Hydra nor models."""

from flapp.data.artifact import Artifact, DataError, open_artifact, write_artifact
from flapp.data.embedded import EMBEDDED, ensure_artifacts
from flapp.data.loader import ClientLoader
from flapp.data.offline import OfflineCIFAR10, OfflineCIFAR100, OfflineDataset
from flapp.data.partition import Partition, label_histogram, load_partition, make_partition
from flapp.data.pixels import to_input

__all__ = [
    "EMBEDDED",
    "Artifact",
    "ClientLoader",
    "DataError",
    "OfflineCIFAR10",
    "OfflineCIFAR100",
    "OfflineDataset",
    "Partition",
    "ensure_artifacts",
    "label_histogram",
    "load_partition",
    "make_partition",
    "open_artifact",
    "to_input",
    "write_artifact",
]
