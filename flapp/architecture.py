"""The model that the settings describe, as server and clients build it; its weights come from elsewhere."""

from pathlib import Path

import torch
from torch import nn

from flapp.model import StorageManager, add_lora, build_model, parse_points
from flapp.settings import Config, DatasetConfig, LoRAConfig, ModelConfig

LARGEST_IMAGE = 32  # pixels: the dense layer of `cnn` then has 8.4 million weights; LEAF's images have 28 pixels
MOST_PARAMETERS = 100  # for each training sample


def build(model: ModelConfig, dataset: DatasetConfig) -> nn.Module:
    """Build the model for samples of a dataset, with weights drawn from torch's global generator."""
    return build_model(model.name, dataset.shape, dataset.classes, model.image_size, model.dropout, model.channels)


def find_oversize(model: ModelConfig, dataset: DatasetConfig, samples: int) -> str | None:
    """Return a warning where the dense layer of `cnn` outgrows the training samples, or None.

    Its weights grow with the square of the image size: at 64 pixels they are 99 % of 34 million parameters.
    """
    size = model.image_size or dataset.shape[0]
    if model.name != "cnn" or size <= LARGEST_IMAGE:
        return None
    with torch.device("meta"):  # without memory for the weights
        built = build(model, dataset)
    dense, whole = (sum(p.numel() for p in part.parameters()) for part in (built.get_submodule("fc1"), built))
    if whole <= MOST_PARAMETERS * samples:
        return None
    return (
        f"model=cnn on images of {size} pixels has {whole / 1e6:.1f} million parameters, {dense / whole:.1%} of them "
        f"in its dense layer, for {samples:,} training samples: set model=vit_tiny or model.image_size=28"
    )


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
