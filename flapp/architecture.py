"""Build the model that the settings describe, on server and clients. Clients load the server's weights into it."""

import copy
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapp.config.schema import Config, ConfigError, DatasetConfig, LoRAConfig, ModelConfig
from flapp.custom import blaming, place_of_code, resolve
from flapp.model.layout import Layout, lay_out
from flapp.model.split.files import StorageManager, parse_points

if TYPE_CHECKING:
    from torch import nn

LARGEST_IMAGE = 32  # pixels: the dense layer of `cnn` then has 8.4 million weights; LEAF's images have 28 pixels
MOST_PARAMETERS = 100  # for each training sample


def plan(model: ModelConfig, dataset: DatasetConfig, lora: LoRAConfig | None = None) -> Layout:
    """Return the layout of the model, with adapters if `lora` enables them; raises ValueError.

    This needs no PyTorch, except for a model of the user's own, which is built.
    """
    if model.name == "custom":
        layout = _layout_of_own(resolve("model.target", str(model.target)), model)
    else:
        sizes = (dataset.shape, dataset.classes, model.image_size, model.channels)
        layout = lay_out(model.name, *sizes, model.variant)
    return layout.with_lora(lora.targets, lora.rank, lora.alpha) if lora is not None and lora.enabled else layout


def build(model: ModelConfig, dataset: DatasetConfig) -> "nn.Module":
    """Build the model for samples of a dataset, with weights drawn from torch's global generator."""
    if model.name == "custom":
        return _build_own(resolve("model.target", str(model.target)), model)
    from flapp.model.build import build_model

    sizes = (dataset.shape, dataset.classes, model.image_size)
    return build_model(model.name, *sizes, model.dropout, model.channels, model.variant)


def _build_own(function: Callable[..., Any], model: ModelConfig) -> "nn.Module":
    """Build a model of the user's own; raises ConfigError when that fails or gives no model."""
    from torch import nn

    given, place = f"model.target={model.target}", place_of_code(function)
    with blaming(f"{given} cannot build the model with {dict(model.kwargs)}", function):
        built = function(**copy.deepcopy(dict(model.kwargs)))
    if not isinstance(built, nn.Module):
        raise ConfigError(f"{given} returned {type(built).__name__}{place}: return an nn.Module")
    if next(built.parameters(), None) is None:
        raise ConfigError(f"{given} returned a model without parameters{place}: add a layer")
    if lazy := [name for name, parameter in built.named_parameters() if nn.parameter.is_lazy(parameter)]:
        raise ConfigError(f"{given} returned a model whose {lazy[0]} has no shape yet{place}: give its layer all sizes")
    return built


@lru_cache(maxsize=8)
def _layout_of_own(function: Callable[..., Any], model: ModelConfig) -> Layout:
    import torch

    from flapp.model.lora import layout_of

    with torch.random.fork_rng():
        return layout_of(_build_own(function, model))


def find_oversize(model: ModelConfig, dataset: DatasetConfig, samples: int) -> str | None:
    """Return a warning where the dense layer of `cnn` outgrows the training samples, or None.

    Its weights grow with the square of the image size: at 64 pixels they are 99 % of 34 million parameters.
    """
    size = model.image_size or dataset.shape[0]
    if model.name != "cnn" or size <= LARGEST_IMAGE:
        return None
    sizes = {key: math.prod(shape) for key, shape in plan(model, dataset).tensors.items()}
    whole = sum(sizes.values())
    dense = sum(count for key, count in sizes.items() if key.startswith("fc1."))
    if whole <= MOST_PARAMETERS * samples:
        return None
    return (
        f"model=cnn on images of {size} pixels has {whole / 1e6:.1f} million parameters, {dense / whole:.1%} of them "
        f"in its dense layer, for {samples:,} training samples: set model=vit_tiny or model.image_size=28"
    )


def choose_device(name: str) -> str:
    """Return the device that train.device means: `auto` is CUDA if available."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def pruned_rank(lora: LoRAConfig, rank: int) -> int:
    """Return the lowest rank to which a client of `rank` may prune its adapters; `rank` itself without pruning."""
    if lora.prune_gamma is None:
        return rank
    return min(rank, max(lora.rank_min, int(lora.prune_gamma * rank)))


def adapt(model: "nn.Module", lora: LoRAConfig, rank: int) -> None:
    """Put adapters of `rank` on a model in place, all scaled by lora.alpha / lora.rank whatever their rank."""
    from flapp.model.lora import add_lora

    add_lora(model, rank, lora.alpha * rank / lora.rank, lora.targets, lora.dropout)


def split_place(config: Config) -> tuple[Path, str, int, int]:
    """Say where the final model is stored split: the folder, the name of the files and the points."""
    folder = Path(config.split.model_storage_dir or "")
    return folder, StorageManager.get_model_name(config.run_name), *parse_points(config.split.split_config)
