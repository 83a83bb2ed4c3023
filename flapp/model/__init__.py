"""Models, their adapters and safetensors files of both; knows neither Flower, Hydra nor data."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flapp.model.files import load_tensors, read_tensors, save_tensors, sha256_of_file
from flapp.model.fitting import check_adapter, check_pretrained, from_torchvision, to_torchvision
from flapp.model.layout import LAYOUTS, Layout, lay_out
from flapp.model.split_files import COMPONENTS, Metadata, StorageManager, check_points, parse_points

if TYPE_CHECKING:
    from flapp.model.adapter_files import Adapter, export_adapter, export_merged, import_adapter
    from flapp.model.build import BUILDERS, build_model
    from flapp.model.lora import (
        LoRALinear,
        adapted_layers,
        add_lora,
        base_state_dict,
        draw_lora_A,
        head_of,
        layout_of,
        load_lora_state_dict,
        lora_state_dict,
        mark_only_lora_as_trainable,
        merge_lora,
        merged_state_dict,
        tail_norm,
        truncate_state,
        unmerge_lora,
    )
    from flapp.model.pretrained import Pretrained, load_pretrained
    from flapp.model.split import ModelFactory, ModelType, SplitModel, Whole

__all__ = [
    "BUILDERS",
    "COMPONENTS",
    "LAYOUTS",
    "Adapter",
    "Layout",
    "LoRALinear",
    "Metadata",
    "ModelFactory",
    "ModelType",
    "Pretrained",
    "SplitModel",
    "StorageManager",
    "Whole",
    "adapted_layers",
    "add_lora",
    "base_state_dict",
    "build_model",
    "check_adapter",
    "check_points",
    "check_pretrained",
    "draw_lora_A",
    "export_adapter",
    "export_merged",
    "from_torchvision",
    "head_of",
    "import_adapter",
    "lay_out",
    "layout_of",
    "load_lora_state_dict",
    "load_pretrained",
    "load_tensors",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge_lora",
    "merged_state_dict",
    "parse_points",
    "read_tensors",
    "save_tensors",
    "sha256_of_file",
    "tail_norm",
    "to_torchvision",
    "truncate_state",
    "unmerge_lora",
]

# Checking settings needs no torch, whose import takes more than a second: only what uses modules brings it in.
_NEED_TORCH = {
    "adapter_files": ("Adapter", "export_adapter", "export_merged", "import_adapter"),
    "build": ("BUILDERS", "build_model"),
    "pretrained": ("Pretrained", "load_pretrained"),
    "split": ("ModelFactory", "ModelType", "SplitModel", "Whole"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module = next((module for module, names in _NEED_TORCH.items() if name in names), "lora")
    return getattr(import_module(f"{__name__}.{module}"), name)
