"""The checkpoint store: a deduplicated SQLite history of a model; knows neither Flower, Hydra, data nor models."""

from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager

__all__ = ["CheckpointError", "ChunkManager"]
