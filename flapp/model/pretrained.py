"""Pretrained weights from a local file: torchvision's checkpoints (.pth) or safetensors, in its names or in ours.

Nothing is taken in part: a file that does not fit the model is an error, never a random start.
"""

import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flapp.files import sha256_of_file
from flapp.model.files import shapes_of
from flapp.model.fitting import POSITIONS, fit_pretrained, from_torchvision
from flapp.model.lora import head_of, layout_of
from flapp.untrusted import check_regular, check_safetensors, printable

# What zipfile and torch's unpickler are seen to raise for damaged bytes, beside OSError.
DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError, LookupError),
    *(TypeError, AttributeError, AssertionError, MemoryError, OverflowError),
)
MOST_PICKLE = 16 << 20  # bytes of the names and shapes in a .pth


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
    state, own = from_torchvision(read_state(path)), model.state_dict()
    head_loaded, interpolated = fit_pretrained(layout_of(model), shapes_of(state), path)
    if interpolated:
        state[POSITIONS] = _interpolated(state[POSITIONS], model)
    if not head_loaded:
        head = head_of(model) + "."
        state |= {name: tensor for name, tensor in own.items() if name.startswith(head)}
    model.load_state_dict(state)
    return Pretrained(sha256_of_file(path), head_loaded, interpolated)


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


def _interpolated(positions: Tensor, model: nn.Module) -> Tensor:
    """Return positions (1, tokens, width) of another grid of patches, resized to the grid of `model`."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    assert isinstance(model.image_size, int)
    assert isinstance(model.patch_size, int)
    return interpolate_embeddings(model.image_size, model.patch_size, OrderedDict({POSITIONS: positions}))[POSITIONS]
