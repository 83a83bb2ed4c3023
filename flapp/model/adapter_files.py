"""Adapters in PEFT's own format, and models with their adapters merged in.

    <folder>/adapter_config.json           what PEFT's LoraConfig takes: r, lora_alpha, target_modules, modules_to_save
             adapter_model.safetensors     base_model.model.<layer>.lora_A.weight   (rank, in)
                                           base_model.model.<layer>.lora_B.weight   (out, rank)
                                           base_model.model.<module>.<tensor>       of every module trained in full

For a Conv2d, PEFT has A as a kernel (rank, channels, height, width) and B as (out, rank, 1, 1). A module with buffers,
such as BatchNorm, counts as trained in full for PEFT, so the file has its buffers and its parameters, though flapp does
not train the latter.

`peft.PeftModel.from_pretrained(model, folder)` over the same base gives the same logits. A merged model is one
safetensors file in torchvision's names. check_adapter runs before a command imports PyTorch, so lora.py is imported
where it is used.
"""

import json
import re
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flapp.files import replacing_folder
from flapp.model.files import mismatch, save_tensors
from flapp.model.layout import PLAIN, Layout, Shape
from flapp.model.names import to_torchvision
from flapp.model.weight_files import read_shapes, read_state
from flapp.untrusted import printable, read_json

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Settings of a LoraConfig that are checked one by one, or do not change what its tensors mean. Any other must be off,
# except init_lora_weights (see PLAIN_STARTS).
HARMLESS = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "task_type"} | {
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "exclude_modules", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "auto_mapping", "runtime_config"),
}
OFF: tuple[object, ...] = (None, False, "none", [], {})
PLAIN_STARTS = (True, False, "gaussian", None)  # other values of init_lora_weights may change the base as well


def find_export_fault(model: "nn.Module") -> str | None:
    """Return why PEFT's format cannot hold the adapters of a model and what is trained beside them, or None."""
    from flapp.model.lora import adapted_layers, layout_of

    layers, layout = adapted_layers(model), layout_of(model)
    if len({(layer.rank, layer.alpha, layer.dropout) for layer in layers.values()}) > 1:
        return "the format has one rank, alpha and dropout for all layers"
    for name, module in layers.items():
        if getattr(module, "padding_mode", "zeros") != "zeros" or set(getattr(module, "dilation", ())) - {1}:
            return f"the format has neither dilation nor padding other than zeros, and {name} has one of these"
    for name in _trained_modules(layout):
        if not name:
            return "the format has no place for parameters or buffers of the model itself"
        if any(other.startswith(f"{name}.") for other in layout.modules):
            return f"the format has no place for parameters or buffers of a module that holds modules, such as {name}"
        for layer in layers:  # PEFT also looks at the names of the modules that contain a layer
            if any(part.endswith(name) for part in accumulate(layer.split("."), "{}.{}".format)):
                return f"PEFT takes {layer} for {name}, because it compares the ends of names"
    return None


def export_adapter(model: "nn.Module", folder: Path, base_name: str) -> None:
    """Write the adapter and whatever is trained beside it to a new `folder`, whole or not at all, for PEFT to load.

    Raises ValueError when the folder is not empty, and for a fault of find_export_fault.
    """
    from flapp.model.lora import adapted_layers, layout_of

    if fault := find_export_fault(model):
        raise ValueError(f"PEFT's format cannot hold this {type(model).__name__}: {fault}")
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise ValueError(f"{folder} cannot take the adapter (it is not an empty folder): name a new folder")
    layers, layout, state = adapted_layers(model), layout_of(model), model.state_dict()
    first, shapes = next(iter(layers.values())), _peft_shapes(layout)
    config = {
        **{"peft_type": "LORA", "base_model_name_or_path": base_name, "task_type": None, "inference_mode": True},
        **{"r": first.rank, "lora_alpha": first.alpha, "lora_dropout": first.dropout, "bias": "none"},
        **{"use_rslora": False, "target_modules": _targets(layers, layout.modules)},
        "modules_to_save": _modules_in_full(layout) or None,
    }
    if any(layer.is_transposed for layer in layers.values()):
        config["fan_in_fan_out"] = True
    with replacing_folder(folder) as partial:
        tensors = {_to_peft(key): state[key].reshape(shape) for key, shape in shapes.items()}
        save_tensors(tensors, partial / WEIGHTS)
        (partial / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def _targets(layers: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """Return target_modules: the names of the layers or, where PEFT would find them at the end of others, a pattern."""
    names = sorted(layers)
    ends = {f".{name}" for name in names}
    if not any(f".{other}".endswith(tuple(ends - {f".{other}"})) for other in modules):
        return names
    return "|".join(re.escape(name) for name in names)


def _modules_in_full(layout: Layout) -> list[str]:
    """Return the modules that PEFT keeps whole beside the adapters, sorted.

    PEFT compares the ends of names: with `classifier` it also keeps `pre_classifier`, whose weights stay as they are.
    """
    trained = _trained_modules(layout)
    holding = {key.rpartition(".")[0] for key in layout.tensors} - layout.adapters.keys()
    return sorted({*trained} | {name for name in holding if any(each and name.endswith(each) for each in trained)})


def _trained_modules(layout: Layout) -> list[str]:
    """Return the modules that are trained beside the adapters, sorted: the head, and all that have buffers."""
    return sorted({key.rpartition(".")[0] for key in layout.trained if not _is_adapter(key)})


def _peft_shapes(layout: Layout) -> dict[str, Shape]:
    """Return what an adapter of PEFT's for this model holds, under our names and in PEFT's shapes."""
    in_full, shapes = _modules_in_full(layout), dict[str, Shape]()
    for key, shape in layout.tensors.items():
        layer = key.rpartition(".")[0]
        if key in layout.trained or layer in in_full:
            shapes[key] = shape
        if _is_adapter(key) and layout.modules.get(layer) == "LoRAConv2d":
            kernel = layout.tensors[f"{layer}.weight"][1:]
            shapes[key] = (shape[0], *kernel) if key.endswith("A") else (*shape, 1, 1)
    return shapes


def import_adapter(model: "nn.Module", folder: Path) -> None:
    """Load an adapter of PEFT's into the adapters that `model` has, with whatever was trained beside it.

    A module with buffers that the files do not have stays as it is. Raises ValueError when rank, alpha, layers or
    shapes differ from the model's, and for a setting of PEFT's, which it names, that is not plain LoRA, such as DoRA.
    """
    from flapp.model.lora import layout_of

    layout = layout_of(model)
    check_adapter(layout, folder)
    found = _from_peft(read_state(folder / WEIGHTS))
    model.load_state_dict({key: tensor.reshape(layout.tensors[key]) for key, tensor in found.items()}, strict=False)


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
    held = {key.rpartition(".")[0] for key in found}
    left = {name for name in (key.rpartition(".")[0] for key in layout.buffers) if name not in held}
    expected = {key: shape for key, shape in _peft_shapes(layout).items() if key.rpartition(".")[0] not in left}
    if fault := mismatch(expected, found):
        raise ValueError(f"{folder} does not fit this {layout.kind} with its lora.targets: {fault}")


def export_merged(model: "nn.Module", path: Path, /, **facts: Any) -> str:
    """Write `model` with its adapters merged in, under torchvision's names, and return the file's SHA-256.

    torchvision's VisionTransformer of the same size, and with the same epsilon, loads a ViT of three channels and gives
    the same logits. Raises ValueError for an activation or a pooling that torchvision's class does not have.
    """
    from flapp.model.lora import layout_of, merged_state_dict

    variant = layout_of(model).variant
    for key, value in variant.given().items():
        if key != "layer_norm_eps" and value != vars(PLAIN)[key]:
            raise ValueError(f"torchvision's ViT has no {key}={value}: export the model for timm or transformers")
    return save_tensors(to_torchvision(merged_state_dict(model)), path, **facts, **variant.given())


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
