"""CIFAR-10 and CIFAR-100 from the python files that torchvision downloads.

    cifar-10-batches-py/   data_batch_1 to data_batch_5, test_batch, batches.meta
    cifar-100-python/      train, test, meta

Each file is one pickled dict, written by Python 2: b"data" is uint8 (n, 3072), a row being the red, the green and
the blue plane, row by row; b"labels" or b"fine_labels" are n whole numbers; the meta file has the class names.
"""

import hashlib
import io
import math
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flapp.data.artifact import DataError
from flapp.untrusted import printable, read_bytes

MOST_TUPLES = 1000
MOST_OPCODES = 1_000_000  # the largest of the files has 300,000
MOST_FILE = 256 << 20  # bytes; the largest of them has 155 MB


@dataclass(frozen=True)
class CifarFiles:
    """What the files of one of the two datasets are called, and the keys in them."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: bytes
    names: bytes
    torchvision: str


CIFAR = {
    "cifar10": CifarFiles(
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        b"labels",
        b"label_names",
        "CIFAR10",
    ),
    "cifar100": CifarFiles(
        "cifar-100-python", ("train",), ("test",), "meta", b"fine_labels", b"fine_label_names", "CIFAR100"
    ),
}


def cifar_files(name: str, source: Path, split: str) -> list[Path]:
    """Return the files of a split, data first and class names last, in `source` or in torchvision's folder in it.

    Raises DataError naming the first that is missing.
    """
    facts = CIFAR[name]
    folder = source / facts.folder if (source / facts.folder).is_dir() else source
    paths = [folder / file for file in (*(facts.train if split == "train" else facts.test), facts.meta)]
    if missing := [path for path in paths if not path.is_file()]:
        raise DataError(
            f"{missing[0]} is missing: dataset.source={source} must be the folder with {facts.folder}, "
            "or let dataset.download=true fetch it"
        )
    return paths


def cifar_sha256(paths: list[Path]) -> str:
    """Return the SHA-256 that `sha256sum FILE... | sha256sum` gives in the folder of these files."""
    lines = (f"{hashlib.sha256(_content(path)).hexdigest()}  {path.name}\n" for path in paths)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_cifar(name: str, paths: list[Path]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read and check the files of a split, as listed by cifar_files.

    Returns planes uint8 (n, 3, 32, 32), labels int64 (n,) and the class names; raises DataError naming file and fault.
    """
    facts, meta = CIFAR[name], paths[-1]
    names = _read(meta).get(facts.names)
    if not isinstance(names, list) or not names or not all(isinstance(word, bytes) for word in names):
        raise DataError(f"{meta} has no list {facts.names.decode()!r} of class names: is it a file of {name}?")
    parts = [_read_images(path, facts.labels, len(names)) for path in paths[:-1]]
    planes, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return planes, labels, tuple(word.decode("utf-8", "replace") for word in names)


def download_cifar(name: str, root: Path) -> None:
    """Fetch the files into `root` by torchvision, which checks their MD5s; raises DataError when it fails."""
    from torchvision import datasets

    root.mkdir(parents=True, exist_ok=True)
    try:
        getattr(datasets, CIFAR[name].torchvision)(root, train=False, download=True)
    except (OSError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name} cannot be downloaded into {root} ({reason}): copy {CIFAR[name].folder} from a machine "
            "with a network and set dataset.source to where it is"
        ) from error


def _read_images(path: Path, key: bytes, classes: int) -> tuple[np.ndarray, np.ndarray]:
    content = _read(path)
    data, labels = content.get(b"data"), content.get(key)
    if not isinstance(data, _Array) or not isinstance(labels, list):
        raise DataError(f"{path} has no array 'data' with a list {key.decode()!r}: is it the right dataset?")
    if len(data.shape) != 2 or data.shape[1] != 3 * 32 * 32 or data.shape[0] == 0:
        raise DataError(f"{path} has data of shape {list(data.shape)}: CIFAR images are [n, 3072]")
    if data.shape[0] != len(labels):
        raise DataError(f"{path} has {data.shape[0]} images and {len(labels)} labels: fetch it again")
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        bad = next(label for label in labels if type(label) is not int or not 0 <= label < classes)
        raise DataError(f"{path} has the label {_in_words(bad)}: they are whole numbers from 0 to {classes - 1}")
    return data.to_numpy().reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


class _Array:
    """What a pickled uint8 array becomes: its shape, order and bytes, checked, without any code of numpy's."""

    shape: tuple[int, ...] = ()
    order = "C"
    data = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        sizes = all(type(length) is int and length >= 0 for length in shape)
        if not isinstance(dtype, _Uint8) or type(data) is not bytes or not sizes or len(data) != math.prod(shape):
            raise ValueError("an array does not have as many bytes as its shape says")
        self.shape, self.order, self.data = tuple(shape), "F" if fortran else "C", data

    def to_numpy(self) -> np.ndarray:
        array = np.frombuffer(self.data, np.uint8)
        return array.reshape(self.shape[::-1]).T if self.order == "F" else array.reshape(self.shape)


class _Uint8:
    """What a pickled dtype becomes, if it is uint8."""

    def __init__(self, name: Any, *_: Any) -> None:
        if name not in ("u1", b"u1"):
            raise ValueError(f"an array has the dtype {_in_words(name)}, not u1")

    def __setstate__(self, state: Any) -> None:
        pass


def _in_words(value: object) -> str:
    """Name a value; lists that hold one another many times have a repr of exponential length, so they get none."""
    return printable(repr(value), 40) if isinstance(value, str | bytes | int | float) else type(value).__name__


def _new_array(*_: Any) -> _Array:
    return _Array()


# Unpickling calls what the file names. Here it can name these five things only, and none of them is what it is called:
# each is a stand-in of this module that keeps plain values. So nothing a file holds is ever executed, not even numpy.
_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _Uint8,
}


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self.left = len(content)  # bytes that may still be made of text: the file holds all of it, once

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._to_bytes
        if (module, name) not in _STAND_INS:
            raise _ForbiddenGlobalError(printable(f"{module}.{name}"))
        return _STAND_INS[module, name]

    def _to_bytes(self, text: str, encoding: str) -> bytes:
        self.left -= len(text)
        if self.left < 0:
            raise ValueError("it makes more bytes of its text than it holds")
        return text.encode("latin1")


class _ForbiddenGlobalError(Exception):
    """A pickle that wants something that no CIFAR file needs."""


def _content(path: Path) -> bytes:
    """Return the bytes of a file; raises DataError when it cannot be one of CIFAR's."""
    try:
        return read_bytes(path, MOST_FILE)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({printable(error)}): fetch it again") from error


def _check_opcodes(pickled: bytes) -> None:
    """Raise ValueError for a pickle that would take memory or time out of all proportion to its length.

    That is: lengths beyond the file, memo slots so high that the unpickler's table fills the memory, and tuples that
    are used twice or nested deeply, whose hashes take exponential time or overflow the stack. CIFAR's has none of them.
    """
    slots = tuples = 0
    of_tuples: set[int] = set()
    last = ""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        if count > MOST_OPCODES:
            raise ValueError(f"it has more than {MOST_OPCODES:,} opcodes")
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            slot = slots if argument is None else argument
            slots += 1
            if slot > 2 * slots + 1000:
                raise ValueError(f"it names memo slot {slot:,} after {slots:,} slots")
            if last.startswith("TUPLE"):
                of_tuples.add(slot)
        tuples += name.startswith("TUPLE")
        again = name in ("GET", "BINGET", "LONG_BINGET") and argument in of_tuples
        if again or name == "DUP" or tuples > MOST_TUPLES:
            raise ValueError("it nests or repeats tuples, which no CIFAR file does")
        last = name


def _read(path: Path) -> dict[Any, Any]:
    try:
        pickled = _content(path)
        _check_opcodes(pickled)
        content = _RestrictedUnpickler(pickled).load()
    except _ForbiddenGlobalError as error:
        raise DataError(
            f"{path} wants {error}, which no CIFAR file needs: it was not executed; do not trust it"
        ) from None
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
        OverflowError,
        MemoryError,
        ImportError,
        RecursionError,
    ) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read ({printable(' '.join(str(error).split()))}): fetch it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not the dict of a CIFAR file: fetch it again")
    return content
