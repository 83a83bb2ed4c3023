"""Artifacts, partitions, shards and batches; imports neither Flower, Hydra nor models.

Reading order: artifact, sources, decode, folder, table_files, tables, partition, images, offline, loader, shards.
The names below are for users' own code; flapp imports from the modules.
"""

from flapp import lazy_names

# Imported on first use: preparing data needs no PyTorch, whose import takes more than a second.
_HOMES = {
    "DistributedShardLoader": "shards.client",
    "OfflineCIFAR10": "offline",
    "OfflineCIFAR100": "offline",
    "OfflineDataset": "offline",
    "load_manifest": "shards.manifest",
    "open_artifact": "artifact",
    "write_artifact": "artifact",
}

__getattr__ = lazy_names(__name__, _HOMES)
