"""Adapters in PEFT's own format, and models with their adapters merged in.

    <folder>/adapter_config.json           what PEFT's LoraConfig takes: r, lora_alpha, target_modules, modules_to_save
             adapter_model.safetensors     base_model.model.<layer>.lora_A.weight   (rank, in)
                                           base_model.model.<layer>.lora_B.weight   (out, rank)
                                           base_model.model.<module>.<parameter>    of every module trained in full

`peft.PeftModel.from_pretrained(model, folder)` over the same base gives the same logits. A merged model is one
safetensors file in torchvision's names.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from flapp.model.files import save_tensors
from flapp.model.fitting import CONFIG, PREFIX, WEIGHTS, check_adapter, from_peft, to_torchvision
from flapp.model.lora import adapted_layers, layout_of, load_lora_state_dict, lora_state_dict, merged_state_dict
from flapp.model.pretrained import read_state


@dataclass(frozen=True)
class Adapter:
    """What an adapter's files say of it: the base it was trained over (as they name it), its rank and alpha."""

    base_name: str
    rank: int
    alpha: float


def export_adapter(model: nn.Module, folder: Path, base_name: str) -> None:
    """Write the adapter and whatever is trained beside it to a new `folder`, whole or not at all, for PEFT to load.

    Raises ValueError when the folder has files in it, or when PEFT has no word for what the model has: layers of
    several ranks or alphas, buffers, parameters that belong to no module.
    """
    layers, state = adapted_layers(model), lora_state_dict(model)
    shapes = {(layer.rank, layer.alpha, layer.dropout) for layer in layers.values()}
    in_full = {key.rpartition(".")[0] for key in state if not _is_adapter(key)}
    if len(shapes) > 1 or "" in in_full or any(name in state for name, _ in model.named_buffers()):
        raise ValueError("PEFT's format has one rank, alpha and dropout, no buffers and no parameters outside modules")
    rank, alpha, dropout = shapes.pop()
    config = {
        **{"peft_type": "LORA", "base_model_name_or_path": base_name, "task_type": None, "inference_mode": True},
        **{"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "bias": "none", "use_rslora": False},
        **{"target_modules": sorted(layers), "modules_to_save": sorted(in_full) or None},
    }
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_tensors({_to_peft(key): tensor for key, tensor in state.items()}, partial / WEIGHTS)
    (partial / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    try:
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial)
        raise ValueError(f"{folder} cannot take the adapter ({error.strerror}): name a new folder") from error


def import_adapter(model: nn.Module, folder: Path) -> Adapter:
    """Load an adapter of PEFT's into the adapters that `model` has, with whatever was trained beside it.

    Raises ValueError when rank, alpha, layers or shapes differ from the model's, and naming the setting when the
    files use something of PEFT's that is not plain LoRA, such as DoRA or trained biases.
    """
    config = check_adapter(layout_of(model), folder)
    load_lora_state_dict(model, from_peft(read_state(folder / WEIGHTS)))
    return Adapter(config.get("base_model_name_or_path") or "", config["r"], config["lora_alpha"])


def export_merged(model: nn.Module, path: Path, /, **facts: Any) -> str:
    """Write `model` with its adapters folded in, under torchvision's names, and return the file's SHA-256.

    torchvision's VisionTransformer of the same size loads a ViT of three channels and gives the same logits.
    """
    return save_tensors(to_torchvision(merged_state_dict(model)), path, **facts)


def _is_adapter(key: str) -> bool:
    return key.endswith((".lora_A", ".lora_B"))


def _to_peft(key: str) -> str:
    return f"{PREFIX}{key}.weight" if _is_adapter(key) else PREFIX + key
