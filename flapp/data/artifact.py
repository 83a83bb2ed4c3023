"""The artifact: one split of a dataset, written once, memory-mapped by every process that reads it.

    <data>/<dataset>/<split>/images.npy   uint8 (N, H, W, C), or float32 (N, features) for regression
                             labels.npy   int64 (N,), or float32 (N,) for regression
                             meta.json    format_version, complete, shapes, dtypes, classes, layout, SHA-256s, writer

<split>@<SIZE> beside it holds the same split resized ahead to SIZE pixels: images uint8 (N, C, SIZE, SIZE), of
layout NCHW where the others are NHWC.

Both arrays have real .npy headers, so that a wrong shape, a truncated or a pickled file is refused. The digest
of an artifact is the SHA-256 of its block hashes, and names its content wherever a client has to vouch for it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flapp import __version__

FORMAT_VERSION = 1
BLOCK_BYTES = 16 << 20
LAYOUTS = ("NHWC", "NCHW")


class DataError(ValueError):
    """Data that is missing, damaged or not what was asked for, said in one line with its remedy."""


@dataclass(frozen=True)
class Artifact:
    """An opened split: memory-mapped arrays (copy-on-write, so writing to them never reaches the file)."""

    path: Path
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    digest: str
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
    source_sha256: str,
    layout: str = "NHWC",
) -> None:
    """Write one split into `folder` whole or not at all, replacing what was there.

    images: uint8 with the axes of `layout` or float32 (N, features); labels: int64 (N,) below len(classes), or
    float32 (N,) with no classes. Raises DataError for anything else.
    """
    _check(folder, images, labels, len(classes))
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    meta: dict[str, Any] = {"format_version": FORMAT_VERSION, "writer": f"flapp {__version__}"}
    for name, array in (("images", images), ("labels", labels)):
        array = np.ascontiguousarray(array)
        meta[name] = {"shape": list(array.shape), "dtype": str(array.dtype), "blocks": _block_hashes(array)}
        with (partial / f"{name}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
            os.fsync(file.fileno())
    meta |= {"classes": list(classes), "layout": layout, "source_sha256": source_sha256, "complete": True}
    with (partial / "meta.json").open("w") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def open_artifact(folder: Path, verify: bool = False) -> Artifact:
    """Open the split in `folder`; with verify, hash every block too. Raises DataError naming what is wrong."""
    meta = _read_meta(folder)
    images, labels = (_open_array(folder / f"{name}.npy", meta[name], verify) for name in ("images", "labels"))
    _check(folder, images, labels, len(meta["classes"]))
    blocks = meta["images"]["blocks"] + meta["labels"]["blocks"]
    digest = hashlib.sha256("".join(blocks).encode()).hexdigest()
    return Artifact(folder, images, labels, tuple(meta["classes"]), digest, meta.get("layout", "NHWC"))


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
        complete = meta["complete"] is True and {"images", "labels", "classes"} <= meta.keys()
    except FileNotFoundError:
        raise DataError(f"no artifact at {folder} (meta.json is missing): prepare the dataset first") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}): delete {folder} and prepare it again") from error
    if not complete or meta.get("format_version") != FORMAT_VERSION:
        found = f"format {meta.get('format_version')}, complete={meta['complete']}"
        raise DataError(f"{path} is not a complete artifact of format {FORMAT_VERSION} ({found}): prepare it again")
    if meta.get("layout", "NHWC") not in LAYOUTS:
        raise DataError(f"{path} says layout {meta['layout']}, which is none of {', '.join(LAYOUTS)}: prepare it again")
    return meta


def _open_array(path: Path, facts: dict[str, Any], verify: bool) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}): delete {path.parent} and prepare it again") from error
    found, expected = (list(array.shape), str(array.dtype)), (facts["shape"], facts["dtype"])
    if found != expected:
        raise DataError(f"{path} holds {found[1]} {found[0]}, its meta.json says {expected[1]} {expected[0]}")
    if verify and (bad := _damaged_block(array, facts["blocks"])) is not None:
        raise DataError(f"{path} is damaged: block {bad} has another SHA-256 than its meta.json says")
    return array


def _check(folder: Path, images: np.ndarray, labels: np.ndarray, classes: int) -> None:
    kind = (str(images.dtype), images.ndim, str(labels.dtype), labels.ndim)
    expected = ("uint8", 4, "int64", 1) if classes else ("float32", 2, "float32", 1)
    if kind != expected or len(images) != len(labels) or len(images) == 0:
        raise DataError(
            f"{folder} needs images {expected[0]} with {expected[1]} axes and labels {expected[2]} with {expected[3]}, "
            f"equally many, got {kind[0]} {images.shape} and {kind[2]} {labels.shape}"
        )
    if classes and not (labels.min() >= 0 and labels.max() < classes):
        raise DataError(f"{folder} has labels from {labels.min()} to {labels.max()}, but {classes} classes")


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, BLOCK_BYTES // max(1, array[:1].nbytes))
    return (array[start : start + rows] for start in range(0, len(array), rows))


def _block_hashes(array: np.ndarray) -> list[str]:
    return [hashlib.sha256(np.ascontiguousarray(block).data).hexdigest() for block in _blocks(array)]


def _damaged_block(array: np.ndarray, hashes: list[str]) -> int | None:
    found = _block_hashes(array)
    if len(found) != len(hashes):
        return min(len(found), len(hashes))
    return next((i for i, (a, b) in enumerate(zip(found, hashes, strict=True)) if a != b), None)
