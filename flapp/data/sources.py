"""Where artifacts come from: the embedded datasets, and the files of CIFAR-10 and CIFAR-100 as torchvision has them.

Each file of CIFAR is one dict, pickled by Python 2: b"data" is uint8 (n, 3072), each row the red, the green and the
blue plane; b"labels" or b"fine_labels" are n whole numbers; the meta file has the class names. Nothing in them is run.
"""

import hashlib
import io
import pickle
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, InstanceOf, TypeAdapter, ValidationError

from flapp.data.artifact import DataError, check_arrays, kind_of, locked, open_artifact, refusing, write_artifact
from flapp.untrusted import one_line, printable, read_bytes

Split = tuple[np.ndarray, np.ndarray]
Make = Callable[[], tuple[dict[str, Split], list[str]]]  # returns each split's samples and labels, and the class names

SPLITS = ("train", "test")

MOST_FILE = 256 << 20  # bytes; CIFAR's largest file has 155 MB
MOST_OPCODES = 1_000_000  # CIFAR's largest file has 300,000
MOST_TUPLES = 1000
MADE_BY = "function "  # begins the source of a dataset that a function of the user's own has made
_PICKLE_ERRORS = (  # what the unpickler raises for pickles that are damaged or hostile
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError),
    *(MemoryError, ImportError, RecursionError),
)


def _digits() -> tuple[dict[str, Split], list[str]]:
    """Return 1,797 digits of 8x8 pixels (0 to 16) as uint8 of 32x32, split 80 to 20 by a fixed permutation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    raw = load_digits()
    small = np.round(raw.images * 255 / 16).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in small]
    images, labels = np.stack(large)[..., None], raw.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}, list("0123456789")


def _turned_digits() -> tuple[dict[str, Split], list[str]]:
    """Return the digits inverted and turned by a quarter: a new task for a model that was trained on the digits."""
    splits, classes = _digits()
    return {s: (np.rot90(255 - images, axes=(1, 2)), labels) for s, (images, labels) in splits.items()}, classes


def _regression() -> tuple[dict[str, Split], list[str]]:
    """Return y = w x + b + noise over ten features, 300 training and 90 test samples."""
    rng = np.random.default_rng(0)
    weights, features = rng.normal(size=10), rng.normal(size=(390, 10))
    targets = features @ weights + 1.0 + rng.normal(scale=0.1, size=390)
    x, y = features.astype(np.float32), targets.astype(np.float32)
    return {"train": (x[:300], y[:300]), "test": (x[300:], y[300:])}, []


EMBEDDED: dict[str, Make] = {
    "digits": _digits,
    "digits_turned": _turned_digits,
    "regression": _regression,
}


def is_own(name: str) -> bool:
    """Say whether a name is that of a dataset of flapp's own."""
    return name in EMBEDDED or name in CIFAR or name == "femnist"


def ensure_artifacts(data: Path, name: str, make: Make | None = None, source: str = "") -> Path:
    """Return `data/name`, preparing it first if it is missing; one process prepares, others wait.

    make: a function like those in EMBEDDED, used in place of them. It is called only if the dataset is missing, and
    nothing is written unless all that it returns is sound. Raises DataError when it is not, and when the dataset is
    missing and nothing can make it. source: names the user's function that makes it; what another one made is refused.
    """
    folder = data / name
    if is_prepared(folder):
        if source:
            _check_maker(folder, source)
        return folder
    make = make or EMBEDDED.get(name)
    if make is None and (folder / "shards" / "manifest.json").exists():
        found = f"dataset {name} is prepared as shards only, in {folder / 'shards'}"
        raise DataError(f"{found}: add distributed_data.enabled=true, or prepare it without that")
    if make is None:
        raise DataError(
            f"dataset {name} is not prepared: {folder} has no train and test artifacts; prepare it with "
            f"python -m tools.prepare_data {named(name)} dataset.source=DIR, or choose dataset=digits, which needs no "
            "files"
        )
    with locked(data / f"{name}.lock"):
        if not is_prepared(folder):
            splits, classes = check_made(name, make())
            for split, (samples, labels) in splits.items():
                write_artifact(folder / split, samples, labels, classes, source)
    return folder


def named(name: str) -> str:
    """Return the words of the command line that choose a dataset."""
    return f"dataset={name}" if is_own(name) else f"dataset=custom dataset.name={name}"


def _check_maker(folder: Path, source: str) -> None:
    """Raise DataError when a function other than `source` has made a dataset; what no function made is accepted."""
    made_by = open_artifact(folder / "train").source_sha256
    if made_by.startswith(MADE_BY) and made_by != source:
        found = f"{folder} was made by another function, or before this one was edited"
        raise DataError(f"{found}: remove that folder to make the dataset again, or choose another dataset.name")


def is_prepared(folder: Path) -> bool:
    """Say whether a dataset's folder has both its splits."""
    return all((folder / split / "meta.json").exists() for split in SPLITS)


def check_preparation(folder: Path, train: str, test: str) -> None:
    """Raise DataError unless both splits in `folder` have the same mark of the preparation that wrote them."""
    if train != test:
        found = f"{folder / 'train'} and {folder / 'test'} are of two preparations, so one was interrupted"
        raise DataError(f"{found}: prepare both again with the same prepare_data command and overwrite=true")


_Arrays = tuple[InstanceOf[np.ndarray], InstanceOf[np.ndarray]]
_Splits = Annotated[dict[Literal["train", "test"], _Arrays], Field(min_length=2)]
_MADE = TypeAdapter(tuple[_Splits, Sequence[str]])


def check_made(name: str, made: Any) -> tuple[dict[str, Split], list[str]]:
    """Return what a function has made as dataset `name`; raises DataError unless it is as a Make must return it."""
    try:
        found, classes = _MADE.validate_python(made)
    except ValidationError as error:
        form = "({'train': (samples, labels), 'test': (samples, labels)}, class names)"
        fix = f"the function must return {form}, numpy arrays and a list of texts, [] without classes"
        raise DataError(f"dataset {name} was made with a fault, {one_line(error)}: {fix}") from None
    splits: dict[str, Split] = {"train": found["train"], "test": found["test"]}
    for split, (samples, labels) in splits.items():
        check_arrays(f"dataset {name}: {split}", samples.dtype, samples.shape, labels, len(classes))
    kinds = [[kind_of(array.dtype, array.shape) for array in arrays] for arrays in splits.values()]
    for what, train, test in zip(("samples", "labels"), *kinds, strict=True):
        if train != test:
            raise DataError(f"dataset {name} has {what} {train} in train and {test} in test: make both alike")
    return splits, list(classes)


@dataclass(frozen=True)
class CifarFiles:
    """The files of a dataset, the keys of labels and class names in them, and the class of torchvision."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: bytes
    names: bytes
    torchvision: str


_TEN = ("cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), "batches.meta")
_HUNDRED = ("cifar-100-python", ("train",), ("test",), "meta")
CIFAR = {
    "cifar10": CifarFiles(*_TEN, b"labels", b"label_names", "CIFAR10"),
    "cifar100": CifarFiles(*_HUNDRED, b"fine_labels", b"fine_label_names", "CIFAR100"),
}


def cifar_files(name: str, source: Path, split: str) -> list[Path]:
    """Return the files of a split, class names last, in `source` or in torchvision's folder inside it.

    Raises DataError naming the first file that is missing.
    """
    facts = CIFAR[name]
    folder = source / facts.folder if (source / facts.folder).is_dir() else source
    paths = [folder / file for file in (*(facts.train if split == "train" else facts.test), facts.meta)]
    if missing := [path for path in paths if not path.is_file()]:
        fix = f"dataset.source={source} must be the folder with {facts.folder}, or let dataset.download=true fetch it"
        raise DataError(f"{missing[0]} is missing: {fix}")
    return paths


def cifar_sha256(paths: list[Path]) -> str:
    """Return the SHA-256 that `sha256sum FILE... | sha256sum` prints in the folder of these files."""
    lines = (f"{hashlib.sha256(_content(path)).hexdigest()}  {path.name}\n" for path in paths)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_cifar(name: str, source: Path, split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read and check the files of a split in the folder `source`.

    Returns images uint8 (n, 32, 32, 3), labels int64 (n,) and the class names; raises DataError naming file and fault.
    """
    facts, (*paths, meta) = CIFAR[name], cifar_files(name, source, split)
    names = _read(meta).get(facts.names)
    if not isinstance(names, list) or not names or not all(isinstance(word, bytes) for word in names):
        raise DataError(f"{meta} has no list {facts.names.decode()!r} of class names: is it a file of {name}?")
    parts = [_read_images(path, facts.labels, len(names)) for path in paths]
    planes, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return planes.transpose(0, 2, 3, 1), labels, tuple(word.decode("utf-8", "replace") for word in names)


def download_cifar(name: str, root: Path) -> None:
    """Download the files into `root` by torchvision, which checks their MD5s; raises DataError when it fails."""
    from torchvision import datasets

    root.mkdir(parents=True, exist_ok=True)
    try:
        getattr(datasets, CIFAR[name].torchvision)(root, train=False, download=True)
    except (OSError, RuntimeError, EOFError) as error:
        fix = f"copy {CIFAR[name].folder} from a machine with a network and set dataset.source to its folder"
        raise DataError(f"{name} cannot be downloaded into {root} ({' '.join(str(error).split())}): {fix}") from error


def _read_images(path: Path, key: bytes, classes: int) -> tuple[np.ndarray, np.ndarray]:
    content = _read(path)
    data, labels = content.get(b"data"), content.get(key)
    if not isinstance(data, _Array) or not isinstance(labels, list):
        raise DataError(f"{path} has no array 'data' with a list {key.decode()!r}: is it the right dataset?")
    pixels = data.pixels
    if pixels.ndim != 2 or pixels.shape[1] != 3 * 32 * 32 or len(pixels) == 0:
        raise DataError(f"{path} has data of shape {list(pixels.shape)}: CIFAR images are [n, 3072]")
    if len(pixels) != len(labels):
        raise DataError(f"{path} has {len(pixels)} images and {len(labels)} labels: fetch it again")
    for label in labels:
        if type(label) is not int or not 0 <= label < classes:
            # A list that holds another many times has a repr of exponential length.
            said = printable(repr(label), 40) if isinstance(label, str | bytes | int | float) else type(label).__name__
            raise DataError(f"{path} has the label {said}: labels are whole numbers from 0 to {classes - 1}")
    return pixels.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def _content(path: Path) -> bytes:
    with refusing(path, "fetch it again"):
        return read_bytes(path, MOST_FILE)


def _read(path: Path) -> dict[Any, Any]:
    """Unpickle a file of CIFAR; raises DataError for anything else, before any of it is executed."""
    pickled = _content(path)
    try:
        _check_opcodes(pickled)
        content = _Unpickler(pickled).load()
    except _ForbiddenError as error:
        reason = f"wants {error}, which no CIFAR file needs: it was not executed; do not trust it"
        raise DataError(f"{path} {reason}") from None
    except _PICKLE_ERRORS as error:
        raise DataError(f"{path} cannot be read ({printable(' '.join(str(error).split()))}): fetch it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not the dict of a CIFAR file: fetch it again")
    return content


class _ForbiddenError(Exception):
    """A pickle names something that no CIFAR file needs."""


class _Array:
    """Stand in for a pickled numpy array: numpy's own __setstate__ trusts its input, this one checks it."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if dtype.name not in ("u1", b"u1"):
            raise ValueError(f"an array has the dtype {printable(repr(dtype.name), 40)}, not u1")
        self.pixels = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Dtype:
    """Stand for a pickled numpy dtype."""

    def __init__(self, name: str | bytes, *_: Any) -> None:
        self.name = name if isinstance(name, str | bytes) else type(name).__name__

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Unpickle only what CIFAR's files name, and let stand-ins take the place of numpy's classes."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self.left = len(content)  # bytes that may still be made from text: in all no more than the file has
        self.allowed: dict[str, Any] = {
            "_codecs.encode": self._encode,
            "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
            "numpy._core.multiarray._reconstruct": lambda *_: _Array(),
            "numpy.ndarray": None,
            "numpy.dtype": _Dtype,
        }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise _ForbiddenError(printable(f"{module}.{name}"))
        return self.allowed[f"{module}.{name}"]

    def _encode(self, text: str, encoding: str) -> bytes:
        self.left -= len(text)
        if self.left < 0:
            raise ValueError("its texts expand to more bytes than the file contains")
        return text.encode("latin1")


def _check_opcodes(pickled: bytes) -> None:
    """Raise ValueError for a pickle that would take far more memory or time than its length suggests.

    Such are lengths beyond the file, memo slots so high that the unpickler's table fills the memory, and tuples that
    are used twice or nested deeply, whose hashes take exponential time or overflow the stack.
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
