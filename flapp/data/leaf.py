"""The sources of FEMNIST: LEAF's JSON files, or arrays with writer ids, read one writer at a time.

    all_data_*.json, or train/*.json and test/*.json     {"users": [name, ...], "num_samples": [count, ...],
                                                          "user_data": {name: {"x": [[784 pixels], ...], "y": [...]}}}
    images.npy uint8 (N, 28, 28), labels.npy int64 (N,), writers.npy (N,) of whole numbers or fixed-width text

LEAF writes pixels as floats in [0, 1] (1.0 is the white background), others as whole numbers in [0, 255]; which of
the two is found out from the values. Both become uint8, v -> round(255 v) and v -> v, so the same images in either
form give the same samples. JSON is walked in a memory map, one image at a time, so that a file of any size needs
the memory of one writer.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from flapp.data.artifact import DataError
from flapp.data.json_file import JsonFile
from flapp.untrusted import open_npy, parse_json, printable

CLASS_NAMES = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
CLASSES = len(CLASS_NAMES)
SIDE = 28
PIXELS = SIDE * SIDE

_ROW = re.compile(rb"\s*(\[[0-9\s.,eE+\-NaInfity]*\])\s*([,\]])")
_EMPTY = re.compile(rb"\[\s*\]")


@dataclass(frozen=True)
class Writer:
    """What a source holds of one writer: `count` samples, the last `held_out` of them its own test samples."""

    count: int
    held_out: int
    sha256: str


class Source(Protocol):
    """Samples by writer; has_test says that the source itself keeps some for testing."""

    has_test: bool
    writers: dict[str, Writer]

    def read(self, writer: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a writer's images, uint8 (n, 28, 28), and labels, int64 (n,)."""


def open_source(folder: Path, progress: bool = False) -> Source:
    """Open and check every sample of the source in `folder`; raises DataError naming file, writer and value."""
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
    return LeafSource([(path, False) for path in whole + train] + [(path, True) for path in test], progress)


class LeafSource:
    """Read LEAF's JSON; files: (path, whether its samples are test samples) in order."""

    def __init__(self, files: list[tuple[Path, bool]], progress: bool = False) -> None:
        self.has_test = any(of_test for _, of_test in files)
        self._parts: dict[str, list[_Part]] = {}
        for path, of_test in tqdm(files, "indexing", unit="file", disable=None if progress else True):
            self._index(JsonFile(path), of_test)
        if not self._parts:
            raise DataError(f"{files[0][0]} and its neighbours hold no users: point dataset.source at LEAF's output")
        self._top = self._find_top()
        self.writers = {}
        for name in tqdm(sorted(self._parts), "checking", unit="writer", disable=None if progress else True):
            held_out = sum(part.count for part in self._parts[name] if part.of_test)
            self.writers[name] = describe(*self.read(name), held_out)

    def read(self, writer: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a writer's images, uint8 (n, 28, 28), and labels, int64 (n,), test samples last."""
        labels = [part.labels(writer) for part in self._parts[writer]]
        images = [part.images(writer, self._top) for part in self._parts[writer]]
        return np.concatenate(images).reshape(-1, SIDE, SIDE), np.concatenate(labels)

    def _index(self, file: JsonFile, of_test: bool) -> None:
        users: list[Any] = []
        counts: list[Any] = []
        found: dict[str, _Part] = {}
        for key in file.members():
            if key == "users":
                users = file.load_list(*file.skip())
            elif key == "num_samples":
                counts = file.load_list(*file.skip())
            elif key == "user_data":
                for user in file.members():
                    if user in found:
                        raise DataError(f"{file.path}: user {user} appears twice in user_data")
                    fields = {field: file.skip() for field in file.members()}
                    if not {"x", "y"} <= fields.keys():
                        raise DataError(f"{file.path}: user {user} has no x or no y")
                    labels = file.load_list(*fields["y"])
                    found[user] = _Part(file, fields["x"], fields["y"], len(labels), of_test)
                    file.release()
            else:
                file.skip()
        self._check_index(file, users, counts, found)
        for user, part in found.items():
            earlier = self._parts.setdefault(user, [])
            if twins := [other for other in earlier if other.of_test == of_test]:
                raise DataError(f"{file.path}: user {user} is already in {twins[0].file.path}: a writer has one place")
            earlier.append(part)

    def _check_index(self, file: JsonFile, users: list[Any], counts: list[Any], found: dict[str, "_Part"]) -> None:
        file.end()
        if unlike := sorted({*map(str, users)} ^ found.keys()):
            names = printable(", ".join(unlike[:3]))
            raise DataError(f"{file.path}: users and user_data name different writers: {names}")
        if not len(users) == len(counts) == len(found):
            raise DataError(
                f"{file.path} has {len(users)} users, {len(counts)} num_samples and {len(found)} writers in user_data"
            )
        for user, count in zip(users, counts, strict=True):
            if type(count) is not int or count != found[str(user)].count:
                held = found[str(user)].count
                said = printable(repr(count))
                raise DataError(f"{file.path}: user {printable(user)} has {held} labels, num_samples says {said}")

    def _find_top(self) -> int:
        """Return the white of this data, 1 or 255: the first fraction, or the first value over 1, decides."""
        for user, parts in self._parts.items():
            for part in parts:
                for row in part.rows(user):
                    if (row != np.rint(row)).any():
                        return 1
                    if (row > 1).any():
                        return 255
        return 1


class ArraySource:
    """Read images.npy, labels.npy and writers.npy, memory-mapped anew for each writer so that pages do not pile up."""

    has_test = False

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
        self.writers = {}
        for name in tqdm(sorted(self._samples), "checking", unit="writer", disable=None if progress else True):
            self.writers[name] = describe(*self.read(name), 0)

    def read(self, writer: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a writer's images, uint8 (n, 28, 28), and labels, int64 (n,), in the order of the files."""
        samples = self._samples[writer]
        labels = self._open("labels")[samples]
        if not (labels.min() >= 0 and labels.max() < CLASSES):
            value = labels[(labels < 0) | (labels >= CLASSES)][0]
            raise DataError(
                f"{self.folder}/labels.npy: writer {writer} has label {value}, FEMNIST has 0 to {CLASSES - 1}"
            )
        return self._open("images")[samples], labels

    def _open(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            return open_npy(path, "r", "biufUS" if name == "writers" else "biuf")
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path} cannot be read as an array ({reason}): write it with numpy.save") from error


def describe(images: np.ndarray, labels: np.ndarray, held_out: int) -> Writer:
    """Count and hash a writer's samples."""
    digest = hashlib.sha256(np.ascontiguousarray(images).data)
    digest.update(labels.astype("<i8").data)
    return Writer(len(labels), held_out, digest.hexdigest())


@dataclass(frozen=True)
class _Part:
    """Where one file keeps one writer's samples: the byte ranges of x and y."""

    file: JsonFile
    x: tuple[int, int]
    y: tuple[int, int]
    count: int
    of_test: bool

    def labels(self, user: str) -> np.ndarray:
        labels = self.file.load_list(*self.y)
        for label in labels:
            if type(label) is not int or not 0 <= label < CLASSES:
                said = printable(repr(label))
                raise DataError(f"{self.file.path}: user {user} has label {said}, FEMNIST has 0 to {CLASSES - 1}")
        return np.array(labels, dtype=np.int64)

    def images(self, user: str, top: int) -> np.ndarray:
        if self.x[1] - self.x[0] < 2 * PIXELS * self.count:  # a pixel takes two bytes of JSON
            raise DataError(f"{self.file.path}: user {user} has fewer images in x than the {self.count} labels in y")
        images = np.empty((self.count, PIXELS), np.uint8)
        number = -1
        for number, row in enumerate(self.rows(user)):
            bad = ~((row >= 0) & (row <= top))
            if top == 255:
                bad |= row != np.rint(row)
            if bad.any():
                kind = "floats in [0, 1]" if top == 1 else "whole numbers in [0, 255]"
                raise DataError(
                    f"{self.file.path}: user {user} has pixel {row[bad][0]:g} in image {number}, but the pixels of "
                    f"this source are {kind}: correct the value, or keep sources of different scales apart"
                )
            if number % 256 == 0:
                self.file.release()
            if number < self.count:
                images[number] = np.rint(row * (255 // top))
        if number + 1 != self.count:
            raise DataError(f"{self.file.path}: user {user} has {number + 1} images in x and {self.count} labels in y")
        self.file.release()
        return images

    def rows(self, user: str) -> Iterator[np.ndarray]:
        """Yield the images in x as float64 (784,)."""
        at, end = self.x
        if _EMPTY.fullmatch(self.file.buffer, at, end):
            return
        at += 1
        while at < end:
            match = _ROW.match(self.file.buffer, at, end)
            if match is None or (match[2] == b"]") != (match.end() == end):
                raise DataError(
                    f"{self.file.path}: user {user} has something else than rows of pixels in x (byte {at})"
                )
            try:
                if len(match[1]) > 100 * PIXELS:
                    raise ValueError(f"an image of {len(match[1]):,} bytes")
                row = np.array(parse_json(match[1]), dtype=np.float64)
            except (ValueError, OverflowError) as error:
                raise DataError(f"{self.file.path}: user {user} has a pixel that is no number ({error})") from error
            if row.size != PIXELS:
                raise DataError(f"{self.file.path}: user {user} has an image of {row.size} pixels, not {PIXELS}")
            yield row
            at = match.end()
