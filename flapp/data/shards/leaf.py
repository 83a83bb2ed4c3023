"""The sources of FEMNIST: LEAF's JSON files, or arrays with writer ids.

    all_data_*.json, or train/*.json and test/*.json     {"users": [name, ...], "num_samples": [count, ...],
                                                          "user_data": {name: {"x": [[784 pixels], ...], "y": [...]}}}
    images.npy uint8 (N, 28, 28), labels.npy int64 (N,), writers.npy (N,) of whole numbers or fixed-width text

LEAF writes pixels as floats in [0, 1] (1.0 is the white background), others as whole numbers in [0, 255]; the values
show which. Both become uint8, v -> round(255 v) and v -> v, so the same images in either form give the same samples.
JSON is parsed once, one writer at a time, into a temporary file of pixels: memory holds the pixels of one writer.
"""

import re
import tempfile
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import ijson
import numpy as np
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from flapp.data.artifact import DataError, refusing
from flapp.data.decode import Decoded
from flapp.data.shards.source import FEMNIST, Source
from flapp.untrusted import check_regular, one_line, open_npy, printable

CLASSES = len(FEMNIST.classes)
SIDE = FEMNIST.shape[0]
PIXELS = FEMNIST.pixels

AGAIN = "make the file again with LEAF"
DEEPEST = 20  # lists and objects inside one another; LEAF has five
_MARK = re.compile(rb'\\.?|["\[\]{}]', re.DOTALL)
_UNMARKED = bytes(set(range(256)) - set(b'"[]{}'))


def open_source(folder: Path, progress: bool = False, scratch: Path | None = None) -> Source:
    """Open and check every sample of the source in `folder`; raises DataError naming file, writer and value.

    scratch: the folder of the temporary file of pixels, 784 bytes a sample; by default the system's.
    """
    arrays = [folder / f"{name}.npy" for name in ("images", "labels", "writers")]
    whole = sorted(folder.glob("all_data_*.json"))
    train, test = (sorted((folder / split).glob("*.json")) for split in ("train", "test"))
    kinds = [bool(whole), bool(train or test), any(path.exists() for path in arrays)]
    if sum(kinds) != 1:
        found = "none of them" if not any(kinds) else "more than one"
        raise DataError(
            f"{folder} must hold LEAF's all_data_*.json, or its train/ and test/ folders of .json files, or "
            f"images.npy, labels.npy and writers.npy; it holds {found}: point dataset.source at such a folder"
        )
    if kinds[2]:
        return _open_arrays(folder, progress)
    if kinds[1] and not (train and test):
        raise DataError(f"{folder} holds no {'test' if train else 'train'}/*.json: LEAF writes both folders")
    reader = _LeafReader(scratch)
    files = [*whole, *train, *test]
    for path in tqdm(files, "reading", unit="file", disable=None if progress else True):
        reader.read(path, path in test)
    if not reader.files:
        raise DataError(f"{files[0]} and its neighbours hold no users: point dataset.source at LEAF's output")
    return reader.source(bool(test), progress)


@dataclass(config=ConfigDict(strict=True))
class _Samples:
    """One user's images, as rows of pixels, and labels."""

    x: list[Annotated[list[float], Field(min_length=PIXELS, max_length=PIXELS)]]
    y: list[Annotated[int, Field(ge=0, lt=CLASSES)]]


class _LeafReader:
    """Read LEAF's JSON file by file: pixels go to a temporary file, labels and users stay in memory."""

    def __init__(self, scratch: Path | None) -> None:
        # It has no name, so that nothing is left of it however this process ends.
        self.pixels = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - it is open as long as its pixels are mapped
        self.labels = [np.empty(0, np.int64)]
        self.users = list[str]()  # of each image in the file of pixels
        self.files: dict[tuple[str, bool], Path] = {}  # the file of each (user, whether its samples are test samples)
        self.tests = 0  # how many of the images, the last ones, are test samples
        self.top = 0  # the white of this data: 1 or 255; 0 until a fraction or a value over 1 shows which
        self.undecided = 0  # images that were stored before the scale was known, as 0 and 1

    def read(self, path: Path, of_test: bool) -> None:
        """Read and check a file, whose samples may be test samples; raises DataError."""
        found: dict[str, int] = {}  # samples
        with refusing(path, "copy it again"):
            check_regular(path)
            try:
                with path.open("rb") as file:
                    for user, data in ijson.kvitems(_Shallow(file), "user_data", use_float=True):
                        if user in found:
                            raise DataError(f"{path}: user {user} appears twice in user_data: keep one of the two")
                        found[user] = self._store(path, user, data)
                self.pixels.flush()
                users, counts = (_read_list(path, key) for key in ("users", "num_samples"))
            except ijson.JSONError as error:
                after = f"after user {list(found)[-1]}: " if found else ""
                raise ValueError(after + str(error).partition("\n")[0]) from error
        _check_index(path, users, counts, found)
        for user in found:
            if (user, of_test) in self.files:
                other = self.files[user, of_test]
                raise DataError(f"{path}: user {user} is already in {other}: a writer must be in one file")
            self.files[user, of_test] = path
        self.tests += sum(found.values()) if of_test else 0

    def source(self, has_test: bool, progress: bool) -> Source:
        """Return all samples that were read, of which the test samples came last."""
        labels, images = np.concatenate(self.labels), np.empty((0, *FEMNIST.shape), np.uint8)
        if len(labels):
            images = np.memmap(self.pixels, np.uint8, "r+", shape=(len(labels), *FEMNIST.shape))
        if self.top != 255:
            images[: self.undecided] *= 255
        own = len(labels) - self.tests
        parts = {"train": slice(own)} | ({"test": slice(own, None)} if has_test else {})
        splits = {name: Decoded(images[part], labels[part], self.users[part]) for name, part in parts.items()}
        return Source(FEMNIST, splits, progress, {user for user, _ in self.files})

    def _store(self, path: Path, user: str, data: Any) -> int:
        """Check one user's samples, keep them, and return their number."""
        if not user.isprintable():
            raise DataError(f"{path} has control characters in the name {printable(repr(user), 80)}: rename it")
        who = f"{path}: user {user}"
        try:
            held = _Samples(**data)
        except (ValidationError, TypeError) as error:
            raise DataError(f"{who} is not as LEAF writes it, {one_line(error)}: correct it, or {AGAIN}") from None
        if len(held.x) != len(held.y):
            raise DataError(f"{who} has {len(held.x)} images in x and {len(held.y)} labels in y: {AGAIN}")
        self.pixels.write(self._to_grey(who, np.array(held.x, dtype=np.float64).reshape(-1, PIXELS)).data)
        self.labels.append(np.array(held.y, dtype=np.int64))
        self.users += [user] * len(held.y)
        return len(held.y)

    def _to_grey(self, who: str, pixels: np.ndarray) -> np.ndarray:
        """Turn pixels, float64 (n, 784), into uint8, finding out their scale first; refuse those out of range."""
        fractions = pixels != np.rint(pixels)
        if not self.top:
            self.undecided = len(self.users)
            deciding = np.flatnonzero((fractions | (pixels > 1)).any(axis=1))
            if len(deciding):
                self.top = 1 if fractions[deciding[0]].any() else 255
            else:
                self.undecided += len(pixels)
        top = self.top or 1
        bad = ~((pixels >= 0) & (pixels <= top))
        if top == 255:
            bad |= fractions
        if bad.any():
            image, at = np.argwhere(bad)[0]
            kind = "floats in [0, 1]" if top == 1 else "whole numbers in [0, 255]"
            found = f"{who} has pixel {pixels[image, at]:g} in image {image}, but the pixels of this source are {kind}"
            raise DataError(f"{found}: correct the value, or keep sources of different scales apart")
        return np.rint(pixels * (255 // self.top) if self.top else pixels).astype(np.uint8)


class _Shallow:
    """Read a file for ijson; raises ijson.JSONError where lists and objects are nested more than DEEPEST deep.

    ijson keeps the path of each level, and would fill the memory.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.depth = 0
        self.in_text = False
        self.escaped = False  # the last byte was a backslash

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        marks = data[self.escaped :]
        self.escaped = False
        for mark in _MARK.findall(marks if b"\\" in marks else marks.translate(None, _UNMARKED)):
            if mark[:1] == b"\\":
                self.escaped = len(mark) == 1
            elif mark == b'"':
                self.in_text = not self.in_text
            elif not self.in_text:
                self.depth += 1 if mark in b"[{" else -1
            if self.depth > DEEPEST:
                raise ijson.JSONError(f"its lists and objects are more than {DEEPEST} deep")
        return data


def _read_list(path: Path, key: str) -> list[Any]:
    """Return a list at the top of a file; LEAF writes it before user_data, so little is read."""
    with path.open("rb") as file:
        value: Any = next(ijson.items(_Shallow(file), key), [])
    if not isinstance(value, list):
        raise DataError(f"{path} holds {printable(repr(value))} instead of a list in {key}: it is not LEAF JSON")
    return value


def _check_index(path: Path, users: list[Any], counts: list[Any], found: dict[str, int]) -> None:
    if unlike := sorted({*map(str, users)} ^ found.keys()):
        some = printable(", ".join(unlike[:3]))
        raise DataError(f"{path}: users and user_data name different writers ({some}): {AGAIN}")
    if not len(users) == len(counts) == len(found):
        numbers = f"{len(users)} users, {len(counts)} num_samples and {len(found)} writers in user_data"
        raise DataError(f"{path} has {numbers}: {AGAIN}")
    for user, count in zip(users, counts, strict=True):
        if type(count) is not int or count != (held := found[str(user)]):
            said = f"user {printable(user)} has {held} labels, num_samples says {printable(repr(count))}"
            raise DataError(f"{path}: {said}: {AGAIN}")


def _open_arrays(folder: Path, progress: bool) -> Source:
    """Open images.npy, labels.npy and writers.npy."""
    opened = []
    for name in ("images", "labels", "writers"):
        path = folder / f"{name}.npy"
        with refusing(path, "write it with numpy.save"):
            opened.append(open_npy(path, "r", "biufUS" if name == "writers" else "biuf"))
    images, labels, writers = opened
    expected = ("uint8", (len(writers), SIDE, SIDE), "int64", (len(writers),), 1)
    if (str(images.dtype), images.shape, str(labels.dtype), labels.shape, writers.ndim) != expected:
        raise DataError(
            f"{folder} needs images.npy uint8 (N, 28, 28), labels.npy int64 (N,) and writers.npy (N,), got "
            f"{images.dtype} {images.shape}, {labels.dtype} {labels.shape} and {writers.shape}"
        )
    if writers.dtype.kind not in "iuU" or len(writers) == 0:
        raise DataError(f"{folder}/writers.npy must hold whole numbers or text, got {len(writers)} {writers.dtype}")
    if len(bad := np.flatnonzero((labels < 0) | (labels >= CLASSES))):
        found = f"{folder}/labels.npy: writer {writers[bad[0]]} has label {labels[bad[0]]}"
        raise DataError(f"{found}, FEMNIST has 0 to {CLASSES - 1}: correct the label")
    clients = [str(writer) for writer in writers.tolist()]
    return Source(FEMNIST, {"train": Decoded(images[..., None], labels, clients)}, progress)
