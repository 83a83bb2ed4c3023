"""The artifact: one split of a dataset, written once, memory-mapped by every process that reads it.

    <data>/<dataset>/<split>/images.npy   uint8 (N, H, W, C), or float32 (N, features) for regression
                             labels.npy   int64 (N,), or float32 (N,) for regression
                             meta.json    format_version, complete, shapes, dtypes, classes, SHA-256s, writer

    <data>/<dataset>/<split>@<SIZE>/      the same images resized: uint8 (N, C, SIZE, SIZE), and "layout": "NCHW" in
                                          meta.json (where it is absent, the layout is NHWC)

Both arrays have real .npy headers, so that a wrong shape, a truncated or a pickled file is refused. The digest
of an artifact is the SHA-256 of its block hashes, and names its content wherever a client has to vouch for it.

Writing happens in <split>.tmp, which blocks.py goes on with after a crash, and ends with a rename.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flapp import __version__
from flapp.data.blocks import JOURNAL, DataError, ReadRows, block_hashes, damaged_blocks, write_npy
from flapp.untrusted import open_npy, printable, read_json

FORMAT_VERSION = 1
LAYOUTS = ("NHWC", "NCHW")


@dataclass(frozen=True)
class Artifact:
    """An opened split: memory-mapped arrays (copy-on-write, so writing to them never reaches the file)."""

    path: Path
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    digest: str
    source_sha256: str
    layout: str = "NHWC"

    @property
    def size(self) -> tuple[int, int]:
        """Return the height and width of the images as stored."""
        height, width = self.images.shape[1:3] if self.layout == "NHWC" else self.images.shape[2:]
        return height, width


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock file `path` (created if missing), waiting for whoever holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_artifact(
    folder: Path,
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    source_sha256: str = "",
    layout: str = "NHWC",
) -> None:
    """Write one split into `folder` whole or not at all, replacing what was there.

    images: uint8 (N, H, W, C), (N, C, H, W) with layout="NCHW", or float32 (N, features); labels: int64 (N,) below
    len(classes), or float32 (N,) with no classes. source_sha256 names the files they come from, and is that of the
    arrays if left out. Raises DataError for anything else.
    """
    source_sha256 = source_sha256 or arrays_sha256(images, labels)
    _check(folder, images.dtype, images.shape, labels, len(classes), layout)
    write_rows(folder, lambda start, stop: images[start:stop], images.shape, labels, classes, source_sha256, layout)


def arrays_sha256(images: np.ndarray, labels: np.ndarray) -> str:
    """Return the SHA-256 that stands for the source of a split that comes from no file."""
    return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()


def write_rows(
    folder: Path,
    read: ReadRows,
    shape: Sequence[int],
    labels: np.ndarray,
    classes: Sequence[str],
    source_sha256: str,
    layout: str = "NHWC",
    progress: Callable[[int], object] = lambda rows: None,
    inspect: Callable[[np.ndarray], None] = lambda images: None,
) -> None:
    """Write one split block by block, where read(start, stop) returns those images and `shape` is that of them all.

    Goes on behind the last good block of an earlier call with the same arguments that was cut off. progress(n) is
    called for every n images on disk; inspect(images) sees them all before the artifact takes its place, and raises
    to refuse them. Raises DataError for wrong arrays, a disk that is full or fails.
    """
    dtype = np.dtype(np.uint8 if classes else np.float32)
    _check(folder, dtype, tuple(shape), labels, len(classes), layout)
    labels = np.ascontiguousarray(labels)
    meta: dict[str, Any] = {"format_version": FORMAT_VERSION, "writer": f"flapp {__version__}"}
    meta |= {"layout": layout} if layout != "NHWC" else {}
    meta["images"] = {"shape": list(shape), "dtype": str(dtype), "blocks": []}
    meta["labels"] = {"shape": list(labels.shape), "dtype": str(labels.dtype), "blocks": block_hashes(labels)}
    meta |= {"classes": list(classes), "source_sha256": source_sha256, "complete": True}
    partial = folder.with_name(folder.name + ".tmp")
    try:
        meta["images"]["blocks"] = write_npy(partial, read, shape, dtype, json.dumps(meta), progress)
        written = np.lib.format.open_memmap(partial / "images.npy", mode="r")
        try:
            inspect(written)
        except DataError:
            shutil.rmtree(partial)
            raise
        np.save(partial / "labels.npy", labels, allow_pickle=False)
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
        (partial / JOURNAL).unlink()
        _put_in_place(partial, folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror or error}): mend it and try again") from error


def open_artifact(folder: Path, verify: bool = False) -> Artifact:
    """Open the split in `folder`; with verify, hash every block too. Raises DataError naming what is wrong."""
    meta = read_meta(folder)
    images, labels = (open_array(folder / f"{name}.npy", meta[name]) for name in ("images", "labels"))
    layout = meta.get("layout", "NHWC")
    _check(folder, images.dtype, images.shape, labels, len(meta["classes"]), layout)
    for name, array in (("images", images), ("labels", labels)):
        if verify and (bad := damaged_blocks(array, meta[name]["blocks"])):
            raise DataError(
                f"{folder / name}.npy was changed or damaged (block {bad[0]} has another SHA-256 than its meta.json "
                f"says): delete {folder} and prepare it again"
            )
    return Artifact(folder, images, labels, tuple(meta["classes"]), digest(meta), meta.get("source_sha256", ""), layout)


def check_samples(artifact: Artifact, shape: Sequence[int], classes: int) -> None:
    """Raise DataError unless an artifact holds samples of `shape` in `classes` classes, as the settings say."""
    found, wanted = (list(artifact.images.shape[1:]), len(artifact.classes)), (list(shape), classes)
    if found != wanted:
        raise DataError(
            f"dataset {artifact.path.parent.name} has samples of shape {found[0]} in {found[1]} classes, the settings "
            f"say {wanted[0]} in {wanted[1]}: set dataset.shape={str(found[0]).replace(' ', '')} "
            f"dataset.classes={found[1]}"
        )


def digest(meta: dict[str, Any]) -> str:
    """Return the SHA-256 of the block hashes in `meta`, which names the content of an artifact."""
    return hashlib.sha256("".join(meta["images"]["blocks"] + meta["labels"]["blocks"]).encode()).hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """Read the meta.json of the split in `folder`; raises DataError when it is missing, damaged or not complete."""
    path = folder / "meta.json"
    try:
        meta = read_json(path)
        arrays = [meta[name] for name in ("images", "labels")]
        lists = [meta["classes"], *(array["blocks"] for array in arrays), [array["dtype"] for array in arrays]]
        sound = all(type(words) is list and all(type(word) is str for word in words) for words in lists)
        sound = sound and all(type(array["shape"]) is list for array in arrays)
        sound = sound and all(type(n) is int and n >= 0 for array in arrays for n in array["shape"])
        sound = sound and type(meta.get("source_sha256", "")) is str
        found = printable(f"format {meta['format_version']}, complete={meta['complete']}, sound={sound}")
    except FileNotFoundError:
        raise DataError(f"no artifact at {folder} (meta.json is missing): prepare the dataset first") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        said = printable(repr(error))
        raise DataError(f"{path} is damaged ({said}): delete {folder} and prepare it again") from error
    if not sound or meta["complete"] is not True or meta["format_version"] != FORMAT_VERSION:
        raise DataError(f"{path} is not a complete artifact of format {FORMAT_VERSION} ({found}): prepare it again")
    return meta


def open_array(path: Path, facts: dict[str, Any]) -> np.ndarray:
    """Map a .npy file whose shape and dtype must be those of `facts` and which must end where its array ends."""
    try:
        array = open_npy(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): delete {path.parent} and prepare it again") from error
    found, expected = (list(array.shape), str(array.dtype)), (facts["shape"], facts["dtype"])
    if found != expected:
        raise DataError(f"{path} holds {found[1]} {found[0]}, its meta.json says {expected[1]} {expected[0]}")
    return array


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename the finished folder; what it replaces is moved aside first, since a folder cannot be renamed onto one."""
    for path in (*partial.iterdir(), partial):
        _sync(path)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _check(
    folder: Path, dtype: np.dtype, shape: tuple[int, ...], labels: np.ndarray, classes: int, layout: str
) -> None:
    if layout not in LAYOUTS:
        raise DataError(f"{folder} has layout {layout!r}: it must be one of {', '.join(LAYOUTS)}")
    kind = (str(dtype), len(shape), str(labels.dtype), labels.ndim)
    expected = ("uint8", 4, "int64", 1) if classes else ("float32", 2, "float32", 1)
    if kind != expected or shape[0] != len(labels) or len(labels) == 0:
        raise DataError(
            f"{folder} needs images {expected[0]} with {expected[1]} axes and labels {expected[2]} with {expected[3]}, "
            f"equally many, got {kind[0]} {shape} and {kind[2]} {labels.shape}"
        )
    if classes and not (labels.min() >= 0 and labels.max() < classes):
        raise DataError(f"{folder} has labels from {labels.min()} to {labels.max()}, but {classes} classes")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
