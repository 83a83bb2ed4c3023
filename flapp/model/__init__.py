"""Models, their adapters and safetensors files of both; knows neither Flower, Hydra nor data."""

from flapp.model.adapter_files import Adapter, check_adapter, export_adapter, export_merged, import_adapter
from flapp.model.build import BUILDERS, build_model
from flapp.model.files import load_tensors, read_tensors, save_tensors, sha256_of_file
from flapp.model.lora import (
    LoRALinear,
    adapted_layers,
    add_lora,
    base_state_dict,
    draw_lora_A,
    head_of,
    load_lora_state_dict,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    merged_state_dict,
    tail_norm,
    truncate_state,
    unmerge_lora,
)
from flapp.model.pretrained import Pretrained, check_pretrained, from_torchvision, load_pretrained, to_torchvision
from flapp.model.split import ModelFactory, ModelType, SplitModel, Whole, check_points, parse_points
from flapp.model.split_files import COMPONENTS, Metadata, StorageManager

__all__ = [
    "BUILDERS",
    "COMPONENTS",
    "Adapter",
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
