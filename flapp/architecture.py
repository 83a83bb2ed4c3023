"""The model that the settings describe, as server and clients build it; its weights come from elsewhere."""

from pathlib import Path

import torch
from torch import nn

from flapp.model import StorageManager, add_lora, build_model, parse_points
from flapp.settings import Config, DatasetConfig, LoRAConfig, ModelConfig


def build(model: ModelConfig, dataset: DatasetConfig) -> nn.Module:
    """Build the model for samples of a dataset, with weights drawn from torch's global generator."""
    return build_model(model.name, dataset.shape, dataset.classes, model.image_size, model.dropout, model.channels)


def choose_device(name: str) -> str:
    """Return the device that train.device means: `auto` is CUDA where there is some."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def pruned_rank(lora: LoRAConfig, rank: int) -> int:
    """Return the rank to which a client of `rank` may prune its adapters: `rank` itself where there is no pruning."""
    if lora.prune_gamma is None:
        return rank
    return min(rank, max(lora.rank_min, int(lora.prune_gamma * rank)))


def adapt(model: nn.Module, lora: LoRAConfig, rank: int) -> None:
    """Put adapters of `rank` on a model in place; whatever the rank, all scale by lora.alpha / lora.rank."""
    add_lora(model, rank, lora.alpha * rank / lora.rank, lora.targets, lora.dropout)


def split_place(config: Config) -> tuple[Path, str, int, int]:
    """Say where the final model is stored split: the folder, the name of the files and the points."""
    folder = Path(config.split.model_storage_dir or "")
    return folder, StorageManager.get_model_name(config.run_name), *parse_points(config.split.split_config)
