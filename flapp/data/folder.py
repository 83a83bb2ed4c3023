"""Images in folders by class: find them, name their classes, and divide them into a training and a test split.

    train/<class>/**, test/<class>/**     two splits; training, testing, val, valid and validation are understood too
    <class>/**                            one, which is divided class by class

Names are compared and sorted as bytes, so that the result does not depend on the file system. Hidden entries and those
that Windows and macOS leave are passed over.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from flapp.data.artifact import DataError
from flapp.data.decode import RawSplit, count_cores, read_image
from flapp.files import sha256_of_file
from flapp.untrusted import check_regular, printable

TRAIN = ("train", "training")
TEST = ("test", "testing")
VALIDATION = ("val", "valid", "validation")  # the test split of a folder
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LEFT_BY_SYSTEMS = ("thumbs.db", "desktop.ini", "__macosx")
HASHED = 512  # files at a time
EXPECTED = "and dataset.source must be a folder of images, a .parquet file or a folder of those: point it at one"

Class = list[Path]  # the images of one class, in their order
T = TypeVar("T")


def open_folder(
    folder: Path, test_fraction: float, seed: int, progress: Callable[[int], object] = lambda images: None
) -> tuple[dict[str, RawSplit], list[str]]:
    """Return the splits train and test of a folder of images, and the names of the classes.

    test_fraction and seed: see `divide`; they have no meaning for a folder that has both splits. All files are hashed,
    and progress(n) is called for every n of them. Raises DataError naming the path that is wrong, and the fix.
    """
    root = folder.resolve()
    if folder.is_file():
        raise DataError(f"{_shown(folder)} is a file, {EXPECTED}")
    if not _scan(folder, root):
        raise DataError(f"{_shown(folder)} is empty, {EXPECTED}")
    train, test = _find_splits(folder, root)
    found = {split: _read_classes(path, root) for split, path in (("train", train), ("test", test)) if path}
    classes = sorted(found["train"], key=os.fsencode)
    if len(classes) < 2:
        raise DataError(f"{train} has one class, {classes[0]}: there must be a folder for each of two or more classes")
    if test is None:
        found = divide(found["train"], test_fraction, seed)
    elif more := sorted(found["test"].keys() - found["train"].keys(), key=os.fsencode):
        odd = _shown(test / more[0])
        raise DataError(f"{odd} is a class that {train} lacks: add training images, or remove the folder")
    return {split: _open_split(folder, of, classes, progress) for split, of in found.items()}, classes


def divide(found: dict[str, list[T]], test_fraction: float, seed: int) -> dict[str, dict[str, list[T]]]:
    """Divide the images of each class into training and test images, drawn from the seed and the class's name.

    Of n images, floor(n test_fraction + 1/2) but at most n - 1 are test images. Both parts keep their order. Raises
    DataError if there are no test images.
    """
    splits: dict[str, dict[str, list[T]]] = {"train": {}, "test": {}}
    for name, paths in found.items():
        count = min(int(len(paths) * test_fraction + 0.5), len(paths) - 1)
        drawn = set(np.random.default_rng([seed, *os.fsencode(name)]).permutation(len(paths))[:count].tolist())
        splits["train"][name] = [path for row, path in enumerate(paths) if row not in drawn]
        splits["test"][name] = [path for row, path in enumerate(paths) if row in drawn]
    if not any(splits["test"].values()):
        given = f"dataset.test_fraction={test_fraction}"
        raise DataError(f"{given} of so few images gives no test image: raise it, or add images")
    return splits


def _find_splits(folder: Path, root: Path) -> tuple[Path, Path | None]:
    """Return the folders of the training and the test split; None for the second if `folder` itself has the classes."""
    folders = [folder / entry.name for entry in _scan(folder, root) if _is_folder(entry)]
    train, test = ([path for path in folders if path.name.lower() in names] for names in (TRAIN, TEST + VALIDATION))
    others = [path for path in folders if path not in train + test]
    if not train and not test:
        return folder, None
    for split in (train, test):
        if len(split) > 1:
            found = f"{_shown(split[0])} and {_shown(split[1])} are both taken for one split"
            raise DataError(f"{found}: keep one of them in {folder}")
    if others:
        fix = "move it away, or if these are classes, rename the one with the name of a split"
        raise DataError(f"{_shown(others[0])} is beside {(train + test)[0].name}, which is taken for a split: {fix}")
    for split, other, missing in ((train, test, "test"), (test, train, "train")):
        if not other:
            fix = f"set dataset.source={split[0]} to divide it by dataset.test_fraction, or add {missing}"
            raise DataError(f"{folder} has {split[0].name}, but no folder {missing}: {fix}")
    return train[0], test[0]


def _read_classes(split: Path, root: Path) -> dict[str, Class]:
    """Return the images in each folder of a split, by its name."""
    found: dict[str, Class] = {}
    for entry in _scan(split, root):
        path = split / entry.name
        if _is_folder(entry):
            if not entry.name.isprintable():
                raise DataError(f"{_shown(path)} has a name that is not printable text in UTF-8: rename the folder")
            found[entry.name] = _find_images(path, root)
        elif path.suffix.lower() in SUFFIXES:
            raise DataError(f"{_shown(path)} is in no folder of a class: move it into one, or away")
    if not found:
        raise DataError(f"{split} has no folders of classes: put the images of each class into a folder of its own")
    return found


def _find_images(folder: Path, root: Path) -> Class:
    """Return the files below the folder of a class, in the order of the bytes of their names."""
    files, folders = list[Path](), [folder]
    while folders:
        at = folders.pop()
        for entry in _scan(at, root):
            (folders if _is_folder(entry) else files).append(at / entry.name)
    if not files:
        raise DataError(f"{_shown(folder)} has no images: add some, or remove the folder")
    return sorted(files, key=lambda path: [os.fsencode(part) for part in path.parts])


def _scan(folder: Path, root: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted, without those that are passed over; raises DataError for bad links."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: os.fsencode(entry.name))
        entries = [e for e in entries if not e.name.startswith(".") and e.name.lower() not in LEFT_BY_SYSTEMS]
        for entry in entries:
            if entry.is_symlink():
                _check_link(folder / entry.name, root)
    except OSError as error:
        found = f"{_shown(Path(error.filename or folder))} cannot be read ({error.strerror})"
        raise DataError(f"{found}: point dataset.source at a folder of images that you may read") from error
    return entries


def _check_link(path: Path, root: Path) -> None:
    """Raise DataError for a link to nothing, to a place outside the source, or to a folder (it could form a loop)."""
    target = Path(os.path.realpath(path))
    if not os.path.exists(path):
        raise DataError(f"{_shown(path)} is a link that leads to nothing: remove it, or put the file in its place")
    if not target.is_relative_to(root):
        raise DataError(f"{_shown(path)} is a link out of {_shown(root)}: replace it by what it leads to")
    if not target.is_file():
        raise DataError(f"{_shown(path)} is a link that does not lead to a file: remove it, or copy the folder there")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _open_split(
    folder: Path, found: dict[str, Class], classes: Sequence[str], progress: Callable[[int], object]
) -> RawSplit:
    """Return the images of a split, class after class, with the SHA-256 of their names and contents."""
    paths = [path for name in classes for path in found.get(name, ())]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(found.get(name, ())) for name in classes])
    digest = hashlib.sha256()
    with ThreadPoolExecutor(count_cores()) as pool:
        for start in range(0, len(paths), HASHED):
            some = paths[start : start + HASHED]
            for path, sha256 in zip(some, pool.map(_sha256, some), strict=True):
                digest.update(f"{sha256}  ".encode() + os.fsencode(path.relative_to(folder)) + b"\n")
            progress(len(some))

    return RawSplit(lambda row: str(paths[row]), labels, lambda: map(read_image, paths), digest.hexdigest())


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file, or why it cannot be read."""
    try:
        check_regular(path)
        return sha256_of_file(path)
    except OSError as error:
        return str(error.strerror)


def _shown(path: Path) -> str:
    return printable(path, 1000)
