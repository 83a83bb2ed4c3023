"""The checkpoint store: a deduplicated SQLite history of a model; knows neither Flower, Hydra, data nor models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flapp.checkpoint.audit import TensorChange, Verification
from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.records import Chunk, Round, Saved

if TYPE_CHECKING:
    from flapp.checkpoint.tensors import digest_of

__all__ = ["CheckpointError", "Chunk", "ChunkManager", "Round", "Saved", "TensorChange", "Verification", "digest_of"]


def __getattr__(name: str) -> Any:
    if name != "digest_of":  # the only one that needs torch to be named: looking at a store does not
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return import_module(f"{__name__}.tensors").digest_of
