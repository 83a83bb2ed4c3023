"""Pretrained weights from a local file: torchvision's checkpoints (.pth) or safetensors, in its names or in ours.

    torchvision                                       flapp
    ...self_attention.in_proj_weight, in_proj_bias    ...self_attention.qkv.weight, qkv.bias
    ...self_attention.out_proj.weight, out_proj.bias  ...self_attention.proj.weight, proj.bias
    ...mlp.linear_1.*, mlp.linear_2.*                 ...mlp.0.*, mlp.3.*   (its files from before 2022; read only)

Nothing is taken in part: a file that does not fit the model is an error, never a random start.
"""

import pickle
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flapp.model.files import mismatch, sha256_of_file
from flapp.model.lora import head_of
from flapp.untrusted import check_regular, check_safetensors, printable

# What zipfile and torch's unpickler are seen to raise for damaged bytes, beside OSError.
DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError, LookupError),
    *(TypeError, AttributeError, AssertionError, MemoryError, OverflowError),
)
MOST_PICKLE = 16 << 20  # bytes of the names and shapes in a .pth
CHECKED_BYTES = 64 << 20  # of a file of weights that is read whole before a run starts
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


@dataclass(frozen=True)
class Pretrained:
    """What load_pretrained did: the file's SHA-256, whether the head came from it, whether positions were resized."""

    sha256: str
    head_loaded: bool
    interpolated: bool


def load_pretrained(model: nn.Module, path: Path) -> Pretrained:
    """Load every weight of `model`, which has no adapters yet, from the file at `path`.

    A head for another number of classes stays as the model has it; position embeddings for another image size are
    interpolated as torchvision does (bicubic). Raises ValueError for a file that is missing, unsafe or does not fit.
    """
    state, head_loaded, interpolated = _fit(model, read_state(path), path)
    model.load_state_dict(state)
    return Pretrained(sha256_of_file(path), head_loaded, interpolated)


def check_pretrained(model: nn.Module, path: Path) -> None:
    """Raise ValueError where load_pretrained would, from names and shapes alone; `model` may be on the meta device.

    Only a file of at most CHECKED_BYTES is also read for damage.
    """
    _fit(model, read_state(path, is_checked=path.stat().st_size <= CHECKED_BYTES), path)


def _fit(model: nn.Module, found: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], bool, bool]:
    """Return the state that `model` takes from `found`, whether its head is among it, and whether positions changed."""
    state, own = from_torchvision(found), model.state_dict()
    interpolated = _interpolate_positions(state, model)
    head = [name for name in own if name.startswith(head_of(model) + ".")]
    head_loaded = not all(name in state and _differs_in_rows(state[name], own[name]) for name in head)
    state |= {} if head_loaded else {name: own[name] for name in head}
    if fault := mismatch(own, state):
        grey = "first conv_proj.weight (" in fault
        hint = "build it with channels=3 to show it grey images" if grey else "give weights of this very model"
        raise ValueError(f"{path} does not fit this {type(model).__name__}: {fault}; {hint}")
    return state, head_loaded, interpolated


def read_state(path: Path, is_checked: bool = True) -> dict[str, Tensor]:
    """Read a state dict, bare or as {"state_dict": ...} or {"model": ...}, running no code that is in the file.

    is_checked: whether the CRCs of a .pth are compared, which reads all of it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            check_safetensors(path)
            found: Any = load_file(path)
        else:
            found = _load_pth(path, is_checked)
    except DAMAGE as error:
        reason = "nothing in it was run" if isinstance(error, pickle.UnpicklingError) else str(error).partition("\n")[0]
        said = printable(reason or repr(error))
        raise ValueError(f"{path} is damaged or holds more than tensors ({said})") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({printable(error)})") from error
    if isinstance(found, Mapping) and len(found) == 1 and isinstance(inner := next(iter(found.values())), Mapping):
        found = inner if set(found) <= {"state_dict", "model"} else found
    if not isinstance(found, Mapping) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{path} holds no state dict, which maps names to tensors and nothing else")
    if odd := [name for name, tensor in found.items() if not isinstance(name, str) or _repeats_memory(tensor)]:
        raise ValueError(
            f"{path}: tensor {printable(odd[0], 80)} is not dense: it claims more bytes than the file holds"
        )
    return dict(found)


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` under our names; names that are ours already stay."""
    return {_renamed(name, OURS): tensor for name, tensor in state.items()}


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state`, in our names and without adapters, under torchvision's."""
    return {_renamed(name, TORCHVISIONS): tensor for name, tensor in state.items()}


def _renamed(name: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def _load_pth(path: Path, is_checked: bool) -> Any:
    """Load a file of torch.save, a zip since torch 1.6, when the CRC of every tensor in it is right."""
    check_regular(path)
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            name = printable(entry.filename, 80)
            if entry.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{name} is compressed, which torch.save never does")
            if name.endswith(".pkl") and entry.file_size > MOST_PICKLE:
                raise zipfile.BadZipFile(f"{name} has {entry.file_size:,} bytes, at most {MOST_PICKLE:,} are expected")
        if is_checked and (damaged := file.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} has another CRC-32")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _repeats_memory(tensor: Tensor) -> bool:
    """Say whether a tensor is not a dense one with bytes of its own, such as one number expanded to any shape."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return True
    return tensor.nbytes > tensor.untyped_storage().nbytes()


def _differs_in_rows(found: Tensor, own: Tensor) -> bool:
    return found.ndim == own.ndim and found.shape[1:] == own.shape[1:] and found.shape[0] != own.shape[0]


def _interpolate_positions(state: dict[str, Tensor], model: nn.Module) -> bool:
    """Resize the positions in `state` to the grid of `model` if they are for another one, and say whether they were."""
    own, found = model.state_dict().get(POSITIONS), state.get(POSITIONS)
    if own is None or found is None or own.shape[2:] != found.shape[2:] or own.shape == found.shape:
        return False
    from torchvision.models.vision_transformer import interpolate_embeddings

    side = round((found.shape[1] - 1) ** 0.5)
    if side < 1 or found.shape[0] != 1 or side * side != found.shape[1] - 1:
        return False  # not a class token and a square of patches; whoever compares shapes says so
    assert isinstance(model.image_size, int)
    assert isinstance(model.patch_size, int)
    positions = OrderedDict({POSITIONS: found})
    state[POSITIONS] = interpolate_embeddings(model.image_size, model.patch_size, positions)[POSITIONS]
    return True
