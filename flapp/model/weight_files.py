"""Read files of weights, which others may have made: safetensors and those of torch.save. No code in them is run.

PyTorch is imported where it is used: names and shapes of safetensors are read without it.
"""

import pickle
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapp.model.files import shapes_of
from flapp.model.layout import Shape
from flapp.untrusted import check_regular, check_safetensors, parse_json, printable

if TYPE_CHECKING:
    from torch import Tensor

CHECKED_BYTES = 64 << 20  # a larger .pth is not read whole before a run starts
MOST_PICKLE = 16 << 20  # bytes of the names and shapes in a .pth
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a folder; the first is preferred
LFS_POINTER = b"version https://git-lfs"
OLD_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began its files before version 1.6
# What zipfile and torch's unpickler raise for damaged bytes, besides OSError.
DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError, LookupError),
    *(TypeError, AttributeError, AssertionError, MemoryError, OverflowError),
)


def find_weights(path: Path) -> Path:
    """Return the file of weights that `path` is, or that the folder `path` has; raises ValueError for none."""
    if not path.is_dir():
        return path
    for name in WEIGHTS:
        if (path / name).exists():
            return path / name
        if (path / f"{name}.index.json").exists():
            found = f"{path} has its weights in several files ({name}.index.json)"
            raise ValueError(f"{found}: write them as one, with save_pretrained(DIR, max_shard_size='100GB')")
    raise ValueError(f"{path} has neither {' nor '.join(WEIGHTS)}: give a file of weights, or a folder that has one")


def read_header(path: Path) -> Mapping[str, Any]:
    """Return the facts that flapp has written into a safetensors file; none if it has not written the file."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return {}
    with _reading(path):
        check_safetensors(path)
        with safe_open(path, framework="numpy") as file:
            facts = parse_json((file.metadata() or {}).get("flapp", "{}"))
    return facts if isinstance(facts, dict) else {}


def read_shapes(path: Path) -> dict[str, Shape]:
    """Return the shapes of a file's tensors by name; raises ValueError as read_state does.

    The checksums of a .pth of more than CHECKED_BYTES are not compared.
    """
    if path.suffix != ".safetensors":
        with _reading(path):
            size = check_regular(path)
        return shapes_of(read_state(path, is_checked=size <= CHECKED_BYTES))
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

    with _reading(path):
        if path.suffix == ".safetensors":
            check_safetensors(path)
            found: Any = load_file(path)
        else:
            found = _load_pth(path, is_checked)
    if isinstance(found, Mapping) and len(found) == 1 and isinstance(inner := next(iter(found.values())), Mapping):
        found = inner if set(found) <= {"state_dict", "model"} else found
    if not _is_state(found):
        raise ValueError(f"{path} holds no state dict, which maps names to tensors and nothing else{_inner(found)}")
    if odd := [name for name in found if not isinstance(name, str)]:
        raise ValueError(f"{path} has {printable(repr(odd[0]), 80)} as a tensor's name: name all tensors by strings")
    if odd := [name for name, tensor in found.items() if _repeats_memory(tensor)]:
        fault = f"{path}: tensor {printable(odd[0], 80)} is not a dense tensor with bytes of its own"
        raise ValueError(f"{fault}: save it with .contiguous()")
    return dict(found)


def _is_state(found: Any) -> bool:
    """Say whether something maps names to tensors and to nothing else."""
    from torch import Tensor

    return isinstance(found, Mapping) and bool(found) and all(isinstance(each, Tensor) for each in found.values())


def _inner(found: Any) -> str:
    """Say which entry of a checkpoint is a state dict, as the end of a sentence; nothing if none is."""
    keys = [key for key, inner in found.items() if _is_state(inner)] if isinstance(found, Mapping) else []
    if not keys:
        return ""
    names, first = printable(", ".join(map(str, found)), 200), printable(repr(keys[0]), 80)
    return f", but the entries {names}: save only file[{first}]"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what readers of weights raise into ValueError."""
    from safetensors import SafetensorError

    try:
        yield
    except DAMAGE as error:
        if fault := _fault_of(path):
            raise ValueError(f"{path} {fault}") from error
        said = "nothing in it was run" if isinstance(error, pickle.UnpicklingError) else str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged or holds more than tensors ({printable(said or repr(error))})") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({printable(error)})") from error


def _fault_of(path: Path) -> str | None:
    """Say what a file that cannot be read is, where its first bytes tell."""
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return "is a pointer of git-lfs, not the weights: get them with git lfs pull"
    if start.startswith(OLD_PICKLE):
        return "was saved by an old PyTorch, or in its form: load and save it again with torch.save"
    return None


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
