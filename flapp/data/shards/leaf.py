"""The sources of FEMNIST: LEAF's JSON files, or arrays with writer ids, read one writer at a time.

    all_data_*.json, or train/*.json and test/*.json     {"users": [name, ...], "num_samples": [count, ...],
                                                          "user_data": {name: {"x": [[784 pixels], ...], "y": [...]}}}
    images.npy uint8 (N, 28, 28), labels.npy int64 (N,), writers.npy (N,) of whole numbers or fixed-width text

LEAF writes pixels as floats in [0, 1] (1.0 is the white background), others as whole numbers in [0, 255]; the values
show which. Both become uint8, v -> round(255 v) and v -> v, so the same images in either form give the same samples.
JSON is parsed once, one writer at a time, into a temporary file of pixels: memory holds one writer.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import numpy as np
from tqdm import tqdm

from flapp.data.artifact import DataError, refusing
from flapp.data.shards.source import ALL, FEMNIST, Rows, Source
from flapp.untrusted import check_regular, open_npy, printable

CLASSES = len(FEMNIST.classes)
SIDE = FEMNIST.shape[0]
PIXELS = FEMNIST.pixels

DEEPEST = 20  # lists and objects inside one another; LEAF has four
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
        return ArraySource(folder, progress)
    if kinds[1] and not (train and test):
        raise DataError(f"{folder} holds no {'test' if train else 'train'}/*.json: LEAF writes both folders")
    files = [(path, False) for path in whole + train] + [(path, True) for path in test]
    return LeafSource(files, progress, scratch)


@dataclass(frozen=True)
class _Part:
    """One writer's samples in one file: their labels, and the first row of their images in the file of pixels."""

    path: Path
    labels: np.ndarray
    first: int
    of_test: bool


class LeafSource(Source):
    """Read LEAF's JSON; files: (path, whether its samples are test samples) in order."""

    def __init__(self, files: list[tuple[Path, bool]], progress: bool = False, scratch: Path | None = None) -> None:
        self.has_test = any(of_test for _, of_test in files)
        self._parts: dict[str, list[_Part]] = {}
        # It has no name, so that nothing is left of it however this process ends.
        self._pixels = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - it is read as long as this source lives
        self._rows = 0  # images in the file of pixels
        self._top = 0  # the white of this data: 1 or 255; 0 until a fraction or a value over 1 shows which
        self._undecided = 0  # images that were stored before the scale was known, as 0 and 1
        for path, of_test in tqdm(files, "reading", unit="file", disable=None if progress else True):
            self._read_file(path, of_test)
        if not self._parts:
            raise DataError(f"{files[0][0]} and its neighbours hold no users: point dataset.source at LEAF's output")
        tests = {name: [p for p in parts if p.of_test] for name, parts in self._parts.items()}
        self.describe_writers({name: sum(len(p.labels) for p in parts) for name, parts in tests.items()}, progress)

    def labels(self, writer: str) -> np.ndarray:
        return np.concatenate([part.labels for part in self._parts[writer]])

    def images(self, writer: str, rows: Rows = ALL) -> np.ndarray:
        return np.concatenate([self._images(part) for part in self._parts[writer]])[rows]

    def _images(self, part: _Part) -> np.ndarray:
        self._pixels.seek(part.first * PIXELS)
        content = self._pixels.read(len(part.labels) * PIXELS)
        images = np.frombuffer(content, np.uint8).reshape(-1, SIDE, SIDE)
        return images * np.uint8(255) if part.first < self._undecided and self._top != 255 else images

    def _read_file(self, path: Path, of_test: bool) -> None:
        found: dict[str, _Part] = {}
        with refusing(path, "copy it again"):
            check_regular(path)
            try:
                with path.open("rb") as file:
                    for user, data in ijson.kvitems(_Shallow(file), "user_data", use_float=True):
                        if user in found:
                            raise DataError(f"{path}: user {user} appears twice in user_data")
                        found[user] = self._store(path, user, data, of_test)
                users, counts = (_read_list(path, key) for key in ("users", "num_samples"))
            except ijson.JSONError as error:
                after = f"after user {list(found)[-1]}: " if found else ""
                raise ValueError(after + str(error).partition("\n")[0]) from error
        _check_index(path, users, counts, found)
        for user, part in found.items():
            earlier = self._parts.setdefault(user, [])
            if twins := [other for other in earlier if other.of_test == of_test]:
                raise DataError(f"{path}: user {user} is already in {twins[0].path}: a writer must be in one file")
            earlier.append(part)

    def _store(self, path: Path, user: str, data: Any, of_test: bool) -> _Part:
        """Check one writer's samples and append the images to the file of pixels."""
        if not user.isprintable():
            raise DataError(f"{path} has control characters in the name {printable(repr(user), 80)}: rename it")
        who = f"{path}: user {user}"
        if not isinstance(data, dict) or not {"x", "y"} <= data.keys():
            raise DataError(f"{who} has no x or no y")
        rows, labels = data["x"], data["y"]
        if not isinstance(rows, list) or not isinstance(labels, list):
            raise DataError(f"{who} has something else instead of a list in x or y: it is not LEAF JSON")
        for label in labels:
            if type(label) is not int or not 0 <= label < CLASSES:
                raise DataError(f"{who} has label {printable(repr(label))}, FEMNIST has 0 to {CLASSES - 1}")
        if len(rows) != len(labels):
            raise DataError(f"{who} has {len(rows)} images in x and {len(labels)} labels in y")
        for number, row in enumerate(rows):
            if not isinstance(row, list) or not set(map(type, row)) <= {int, float}:
                raise DataError(f"{who} has something else than a row of pixels in x (image {number})")
            if len(row) != PIXELS:
                raise DataError(f"{who} has an image of {len(row)} pixels, not {PIXELS} (image {number})")
        images = self._to_grey(who, np.array(rows, dtype=np.float64).reshape(-1, PIXELS))
        part = _Part(path, np.array(labels, dtype=np.int64), self._rows, of_test)
        self._pixels.seek(self._rows * PIXELS)
        self._pixels.write(images.tobytes())
        self._rows += len(images)
        return part

    def _to_grey(self, who: str, pixels: np.ndarray) -> np.ndarray:
        """Turn pixels, float64 (n, 784), into uint8, finding out their scale first; refuse those out of range."""
        fractions = pixels != np.rint(pixels)
        if not self._top:
            self._undecided = self._rows
            deciding = np.flatnonzero((fractions | (pixels > 1)).any(axis=1))
            if len(deciding):
                self._top = 1 if fractions[deciding[0]].any() else 255
            else:
                self._undecided += len(pixels)
        top = self._top or 1
        bad = ~((pixels >= 0) & (pixels <= top))
        if top == 255:
            bad |= fractions
        if bad.any():
            image, at = np.argwhere(bad)[0]
            kind = "floats in [0, 1]" if top == 1 else "whole numbers in [0, 255]"
            raise DataError(
                f"{who} has pixel {pixels[image, at]:g} in image {image}, but the pixels of this source are {kind}: "
                "correct the value, or keep sources of different scales apart"
            )
        return np.rint(pixels * (255 // self._top) if self._top else pixels).astype(np.uint8)


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


def _check_index(path: Path, users: list[Any], counts: list[Any], found: dict[str, _Part]) -> None:
    if unlike := sorted({*map(str, users)} ^ found.keys()):
        raise DataError(f"{path}: users and user_data name different writers: {printable(', '.join(unlike[:3]))}")
    if not len(users) == len(counts) == len(found):
        numbers = f"{len(users)} users, {len(counts)} num_samples and {len(found)} writers in user_data"
        raise DataError(f"{path} has {numbers}")
    for user, count in zip(users, counts, strict=True):
        held = len(found[str(user)].labels)
        if type(count) is not int or count != held:
            said = printable(repr(count))
            raise DataError(f"{path}: user {printable(user)} has {held} labels, num_samples says {said}")


class ArraySource(Source):
    """Read images.npy, labels.npy and writers.npy, memory-mapped anew for each writer so that pages do not pile up."""

    def __init__(self, folder: Path, progress: bool = False) -> None:
        self.folder = folder
        images, labels, writers = (self._open(name) for name in ("images", "labels", "writers"))
        expected = ("uint8", (len(writers), SIDE, SIDE), "int64", (len(writers),), 1)
        if (str(images.dtype), images.shape, str(labels.dtype), labels.shape, writers.ndim) != expected:
            raise DataError(
                f"{folder} needs images.npy uint8 (N, 28, 28), labels.npy int64 (N,) and writers.npy (N,), got "
                f"{images.dtype} {images.shape}, {labels.dtype} {labels.shape} and {writers.shape}"
            )
        if writers.dtype.kind not in "iuU" or len(writers) == 0:
            raise DataError(f"{folder}/writers.npy must hold whole numbers or text, got {len(writers)} {writers.dtype}")
        order = np.argsort(writers, kind="stable")
        names, starts = np.unique(writers[order], return_index=True)
        self._samples = dict(zip(map(str, names), np.split(order, starts[1:]), strict=True))
        self.describe_writers(dict.fromkeys(self._samples, 0), progress)

    def labels(self, writer: str) -> np.ndarray:
        labels = self._open("labels")[self._samples[writer]]
        if not (labels.min() >= 0 and labels.max() < CLASSES):
            value = labels[(labels < 0) | (labels >= CLASSES)][0]
            raise DataError(
                f"{self.folder}/labels.npy: writer {writer} has label {value}, FEMNIST has 0 to {CLASSES - 1}"
            )
        return labels

    def images(self, writer: str, rows: Rows = ALL) -> np.ndarray:
        return self._open("images")[self._samples[writer][rows]]

    def _open(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        with refusing(path, "write it with numpy.save"):
            return open_npy(path, "r", "biufUS" if name == "writers" else "biuf")
