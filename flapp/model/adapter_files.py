"""Adapters in PEFT's own format, and models with their adapters merged in.

    <folder>/adapter_config.json           what PEFT's LoraConfig takes: r, lora_alpha, target_modules, modules_to_save
             adapter_model.safetensors     base_model.model.<layer>.lora_A.weight   (rank, in)
                                           base_model.model.<layer>.lora_B.weight   (out, rank)
                                           base_model.model.<module>.<parameter>    of every module trained in full

`peft.PeftModel.from_pretrained(model, folder)` over the same base gives the same logits. A merged model is one
safetensors file in torchvision's names. check_adapter runs before a command imports PyTorch, so lora.py is imported
where it is used.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flapp.files import replacing_folder
from flapp.model.files import mismatch, save_tensors
from flapp.model.layout import Layout
from flapp.model.pretrained import read_shapes, read_state, to_torchvision
from flapp.untrusted import printable, read_json

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Settings of a LoraConfig that do not change what its tensors mean; any other must be off.
HARMLESS = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "task_type"} | {
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "auto_mapping", "runtime_config"),
}
OFF: tuple[object, ...] = (None, False, "none", [], {})
PLAIN_STARTS = (True, False, "gaussian", None)  # other values of init_lora_weights change the base as well


def export_adapter(model: "nn.Module", folder: Path, base_name: str) -> None:
    """Write the adapter and whatever is trained beside it to a new `folder`, whole or not at all, for PEFT to load.

    Raises ValueError when the folder is not empty, or when PEFT's format cannot hold the model: layers of several
    ranks or alphas, buffers, parameters that belong to no module.
    """
    from flapp.model.lora import adapted_layers, lora_state_dict

    layers, state = adapted_layers(model), lora_state_dict(model)
    shapes = {(layer.rank, layer.alpha, layer.dropout) for layer in layers.values()}
    in_full = {key.rpartition(".")[0] for key in state if not _is_adapter(key)}
    if len(shapes) > 1 or "" in in_full or any(name in state for name, _ in model.named_buffers()):
        raise ValueError("PEFT's format has one rank, alpha and dropout, no buffers and no parameters outside modules")
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise ValueError(f"{folder} cannot take the adapter (it is not an empty folder): name a new folder")
    rank, alpha, dropout = shapes.pop()
    config = {
        **{"peft_type": "LORA", "base_model_name_or_path": base_name, "task_type": None, "inference_mode": True},
        **{"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "bias": "none", "use_rslora": False},
        **{"target_modules": sorted(layers), "modules_to_save": sorted(in_full) or None},
    }
    with replacing_folder(folder) as partial:
        save_tensors({_to_peft(key): tensor for key, tensor in state.items()}, partial / WEIGHTS)
        (partial / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def import_adapter(model: "nn.Module", folder: Path) -> None:
    """Load an adapter of PEFT's into the adapters that `model` has, with whatever was trained beside it.

    Raises ValueError when rank, alpha, layers or shapes differ from the model's, and naming the setting when the
    files use something of PEFT's that is not plain LoRA, such as DoRA or trained biases.
    """
    from flapp.model.lora import layout_of, load_lora_state_dict

    check_adapter(layout_of(model), folder)
    load_lora_state_dict(model, _from_peft(read_state(folder / WEIGHTS)))


def check_adapter(layout: Layout, folder: Path) -> None:
    """Raise ValueError where import_adapter would."""
    if not layout.adapters:
        raise ValueError(f"{layout.kind} has no adapters to start from {folder}: set lora=default")
    config = _read_config(folder / CONFIG)
    for name, (rank, alpha) in layout.adapters.items():
        if (rank, alpha) != (config["r"], config["lora_alpha"]):
            raise ValueError(
                f"{folder} has r={config['r']} and lora_alpha={config['lora_alpha']}, the model's {name} has rank "
                f"{rank} and alpha {alpha:g}: set lora.rank and lora.alpha to the adapter's"
            )
    found = _from_peft(read_shapes(folder / WEIGHTS))
    if fault := mismatch({key: layout.tensors[key] for key in layout.trained}, found):
        raise ValueError(f"{folder} does not fit this {layout.kind} with its lora.targets: {fault}")


def export_merged(model: "nn.Module", path: Path, /, **facts: Any) -> str:
    """Write `model` with its adapters merged in, under torchvision's names, and return the file's SHA-256.

    torchvision's VisionTransformer of the same size loads a ViT of three channels and gives the same logits.
    """
    from flapp.model.lora import merged_state_dict

    return save_tensors(to_torchvision(merged_state_dict(model)), path, **facts)


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = read_json(path)
        fits = config["peft_type"] == "LORA" and type(config["r"]) is int and config["lora_alpha"] > 0
        fits = fits and isinstance(config.get("base_model_name_or_path") or "", str)
        plain = HARMLESS | ({"init_lora_weights"} if config.get("init_lora_weights") in PLAIN_STARTS else set())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = printable(repr(error))
        raise ValueError(f"{path} is missing or no configuration of a PEFT adapter ({said})") from error
    used = [f"{key}={value!r}" for key, value in config.items() if key not in plain and value not in OFF]
    if not fits or used:
        what = ", ".join(used) or f"peft_type={config['peft_type']}, r={config['r']}, lora_alpha={config['lora_alpha']}"
        raise ValueError(f"{path} is not plain LoRA: it sets {printable(what)}")
    return config


def _from_peft(state: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors of an adapter of PEFT's under our names."""
    return {re.sub(r"\.(lora_[AB])\.weight$", r".\1", key.removeprefix(PREFIX)): t for key, t in state.items()}


def _to_peft(key: str) -> str:
    return f"{PREFIX}{key}.weight" if _is_adapter(key) else PREFIX + key


def _is_adapter(key: str) -> bool:
    return key.endswith((".lora_A", ".lora_B"))
