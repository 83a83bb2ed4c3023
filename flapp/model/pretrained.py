"""Pretrained weights from a local file: torchvision's checkpoints (.pth) or safetensors, in its names or in ours.

A file that does not fit the model is refused whole. check_pretrained finds out from names and shapes alone, and needs
PyTorch only for a .pth; so PyTorch is imported where it is used.
"""

import pickle
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapp.files import sha256_of_file
from flapp.model.files import mismatch, shapes_of
from flapp.model.layout import Layout, Shape
from flapp.model.names import POSITIONS, from_torchvision
from flapp.untrusted import check_regular, check_safetensors, printable

if TYPE_CHECKING:
    from torch import Tensor, nn

CHECKED_BYTES = 64 << 20  # a larger .pth is not read whole before a run starts
MOST_PICKLE = 16 << 20  # bytes of the names and shapes in a .pth
# What zipfile and torch's unpickler raise for damaged bytes, besides OSError.
DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError, LookupError),
    *(TypeError, AttributeError, AssertionError, MemoryError, OverflowError),
)


@dataclass(frozen=True)
class Pretrained:
    """What load_pretrained did: the file's SHA-256, whether the head came from it, whether positions were resized."""

    sha256: str
    head_loaded: bool
    interpolated: bool


def load_pretrained(model: "nn.Module", path: Path) -> Pretrained:
    """Load every weight of `model`, which has no adapters yet, from the file at `path`.

    A head for another number of classes stays as the model has it; position embeddings for another image size are
    interpolated as torchvision does (bicubic). Raises ValueError for a file that is missing, unsafe or does not fit.
    """
    from flapp.model.lora import head_of, layout_of

    own = model.state_dict()
    state = from_torchvision(read_state(path), own)
    head_loaded, interpolated = _fit(layout_of(model), shapes_of(state), path)
    if interpolated:
        from torchvision.models.vision_transformer import interpolate_embeddings

        positions: Any = {POSITIONS: state[POSITIONS]}
        state |= interpolate_embeddings(model.image_size, model.patch_size, positions)
    if not head_loaded:
        head = head_of(model)
        state |= {name: tensor for name, tensor in own.items() if name.rpartition(".")[0] == head}
    model.load_state_dict(state)
    return Pretrained(sha256_of_file(path), head_loaded, interpolated)


def check_pretrained(layout: Layout, path: Path) -> None:
    """Raise ValueError where load_pretrained would, from names and shapes alone.

    A .pth of at most CHECKED_BYTES is also read for damage.
    """
    _fit(layout, from_torchvision(read_shapes(path), layout.tensors), path)


def _fit(layout: Layout, found: Mapping[str, Shape], path: Path) -> tuple[bool, bool]:
    """Say what a model takes from tensors under our names: whether the head, and whether positions to be resized.

    Raises ValueError when they do not fit.
    """
    own, state = layout.tensors, dict(found)
    resized = _can_be_resized(own.get(POSITIONS), state.get(POSITIONS))
    state |= {POSITIONS: own[POSITIONS]} if resized else {}
    head = {name: shape for name, shape in own.items() if name.rpartition(".")[0] == layout.head}
    head_loaded = not head or not all(_differs_in_rows(state.get(name, shape), shape) for name, shape in head.items())
    state |= {} if head_loaded else head
    if fault := mismatch(own, state):
        grey = "first conv_proj.weight (" in fault
        hint = "build it with channels=3 to show it grey images" if grey else "give weights of this very model"
        raise ValueError(f"{path} does not fit this {layout.kind}: {fault}; {hint}")
    return head_loaded, resized


def _differs_in_rows(found: Shape, own: Shape) -> bool:
    return len(found) == len(own) and found[1:] == own[1:] and found[:1] != own[:1]


def _can_be_resized(own: Shape | None, found: Shape | None) -> bool:
    """Say whether position embeddings are for another grid of patches: a class token and a square of patches."""
    if own is None or found is None or own[2:] != found[2:] or own == found:
        return False
    side = round((found[1] - 1) ** 0.5) if found[1] > 1 else 0
    return side >= 1 and found[0] == 1 and side * side == found[1] - 1


def read_shapes(path: Path) -> dict[str, Shape]:
    """Return the shapes of a file's tensors by name; raises ValueError for a file that read_state refuses."""
    if path.suffix != ".safetensors":
        return shapes_of(read_state(path, is_checked=path.stat().st_size <= CHECKED_BYTES))
    from safetensors import safe_open

    with _reading(path):
        check_safetensors(path)
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if not shapes:
        raise ValueError(f"{path} holds no state dict, which maps names to tensors and nothing else")
    return shapes


def read_state(path: Path, is_checked: bool = True) -> dict[str, "Tensor"]:
    """Read a state dict, bare or as {"state_dict": ...} or {"model": ...}, running no code that is in the file.

    is_checked: whether the CRCs of a .pth are compared, which reads all of it.
    """
    from safetensors.torch import load_file
    from torch import Tensor

    with _reading(path):
        if path.suffix == ".safetensors":
            check_safetensors(path)
            found: Any = load_file(path)
        else:
            found = _load_pth(path, is_checked)
    if isinstance(found, Mapping) and len(found) == 1 and isinstance(inner := next(iter(found.values())), Mapping):
        found = inner if set(found) <= {"state_dict", "model"} else found
    if not isinstance(found, Mapping) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{path} holds no state dict, which maps names to tensors and nothing else")
    if odd := [name for name, tensor in found.items() if not isinstance(name, str) or _repeats_memory(tensor)]:
        said = printable(odd[0], 80)
        raise ValueError(f"{path}: tensor {said} is not dense: it claims more bytes than the file holds")
    return dict(found)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what readers of weights raise into ValueError."""
    from safetensors import SafetensorError

    try:
        yield
    except DAMAGE as error:
        reason = "nothing in it was run" if isinstance(error, pickle.UnpicklingError) else str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is damaged or holds more than tensors ({printable(reason or repr(error))})"
        ) from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({printable(error)})") from error


def _load_pth(path: Path, is_checked: bool) -> Any:
    """Load a file of torch.save, a zip since torch 1.6; is_checked: compare the CRC of every tensor in it."""
    import torch

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


def _repeats_memory(tensor: "Tensor") -> bool:
    """Say whether a tensor is not a dense one with bytes of its own, such as one number expanded to any shape."""
    import torch

    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return True
    return tensor.nbytes > tensor.untyped_storage().nbytes()
