"""Whether files of weights and adapters fit a model, judged by names and shapes; PyTorch reads only a .pth.

torchvision                                       flapp
...self_attention.in_proj_weight, in_proj_bias    ...self_attention.qkv.weight, qkv.bias
...self_attention.out_proj.weight, out_proj.bias  ...self_attention.proj.weight, proj.bias
...mlp.linear_1.*, mlp.linear_2.*                 ...mlp.0.*, mlp.3.*   (its files from before 2022; read only)
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from flapp.model.files import mismatch, shapes_of
from flapp.model.layout import Layout, Shape
from flapp.untrusted import check_safetensors, printable, read_json

T = TypeVar("T")
CHECKED_BYTES = 64 << 20  # of a .pth that is read whole before a run starts
POSITIONS = "encoder.pos_embedding"
OURS = (
    (re.compile(r"\bself_attention\.in_proj_(weight|bias)$"), r"self_attention.qkv.\1"),
    (re.compile(r"\bself_attention\.out_proj\.(weight|bias)$"), r"self_attention.proj.\1"),
    (re.compile(r"\bmlp\.linear_1\.(weight|bias)$"), r"mlp.0.\1"),
    (re.compile(r"\bmlp\.linear_2\.(weight|bias)$"), r"mlp.3.\1"),
)
TORCHVISIONS = (
    (re.compile(r"\bself_attention\.qkv\.(weight|bias)$"), r"self_attention.in_proj_\1"),
    (re.compile(r"\bself_attention\.proj\.(weight|bias)$"), r"self_attention.out_proj.\1"),
)
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Settings of a LoraConfig that do not change what its tensors mean; any other must be off.
HARMLESS = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "task_type"} | {
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "auto_mapping", "runtime_config"),
}
OFF: tuple[object, ...] = (None, False, "none", [], {})
PLAIN_STARTS = (True, False, "gaussian", None)  # other values of init_lora_weights change the base as well


def check_pretrained(layout: Layout, path: Path) -> None:
    """Raise ValueError where load_pretrained would, from names and shapes alone.

    A .pth of at most CHECKED_BYTES is also read for damage.
    """
    fit_pretrained(layout, from_torchvision(read_shapes(path)), path)


def fit_pretrained(layout: Layout, found: Mapping[str, Shape], path: Path) -> tuple[bool, bool]:
    """Say what a model takes from tensors under our names: whether the head, and whether positions to be resized.

    Raises ValueError when they do not fit.
    """
    own, state = layout.tensors, dict(found)
    resized = _can_be_resized(own.get(POSITIONS), state.get(POSITIONS))
    state |= {POSITIONS: own[POSITIONS]} if resized else {}
    head = [name for name in own if name.rpartition(".")[0] == layout.head]
    head_loaded = not all(name in state and _differs_in_rows(state[name], own[name]) for name in head)
    state |= {} if head_loaded else {name: own[name] for name in head}
    if fault := mismatch(own, state):
        grey = "first conv_proj.weight (" in fault
        hint = "build it with channels=3 to show it grey images" if grey else "give weights of this very model"
        raise ValueError(f"{path} does not fit this {layout.kind}: {fault}; {hint}")
    return head_loaded, resized


def check_adapter(layout: Layout, folder: Path) -> Mapping[str, Any]:
    """Return the configuration of an adapter of PEFT's; raise ValueError where import_adapter would."""
    if not layout.adapters:
        raise ValueError(f"{layout.kind} has no adapters to start from {folder}: set lora=default")
    config = _read_config(folder / CONFIG)
    for name, (rank, alpha) in layout.adapters.items():
        if (rank, alpha) != (config["r"], config["lora_alpha"]):
            raise ValueError(
                f"{folder} has r={config['r']} and lora_alpha={config['lora_alpha']}, the model's {name} has rank "
                f"{rank} and alpha {alpha:g}: set lora.rank and lora.alpha to the adapter's"
            )
    found = from_peft(read_shapes(folder / WEIGHTS))
    if fault := mismatch({key: layout.tensors[key] for key in layout.trained}, found):
        raise ValueError(f"{folder} does not fit this {layout.kind} with its lora.targets: {fault}")
    return config


def read_shapes(path: Path) -> dict[str, Shape]:
    """Return the shapes of a file's tensors by name; raises ValueError for a file that read_state refuses."""
    if path.suffix != ".safetensors":
        from flapp.model.pretrained import read_state  # imports PyTorch, which reads such files

        return shapes_of(read_state(path, is_checked=path.stat().st_size <= CHECKED_BYTES))
    from safetensors import SafetensorError, safe_open

    try:
        check_safetensors(path)
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except ValueError as error:
        raise ValueError(f"{path} is damaged or holds more than tensors ({printable(error)})") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({printable(error)})") from error
    if not shapes:
        raise ValueError(f"{path} holds no state dict, which maps names to tensors and nothing else")
    return shapes


def from_torchvision(state: Mapping[str, T]) -> dict[str, T]:
    """Return `state` under our names; names that are ours already stay."""
    return {_renamed(name, OURS): tensor for name, tensor in state.items()}


def to_torchvision(state: Mapping[str, T]) -> dict[str, T]:
    """Return `state`, in our names and without adapters, under torchvision's."""
    return {_renamed(name, TORCHVISIONS): tensor for name, tensor in state.items()}


def from_peft(state: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors of an adapter of PEFT's under our names."""
    return {re.sub(r"\.(lora_[AB])\.weight$", r".\1", key.removeprefix(PREFIX)): t for key, t in state.items()}


def _renamed(name: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def _differs_in_rows(found: Shape, own: Shape) -> bool:
    return len(found) == len(own) and found[1:] == own[1:] and found[:1] != own[:1]


def _can_be_resized(own: Shape | None, found: Shape | None) -> bool:
    """Say whether position embeddings are for another grid of patches: a class token and a square of patches."""
    if own is None or found is None or own[2:] != found[2:] or own == found:
        return False
    side = round((found[1] - 1) ** 0.5) if found[1] > 1 else 0
    return side >= 1 and found[0] == 1 and side * side == found[1] - 1


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
