"""The artifact: one split of a dataset, written once and memory-mapped by every process that reads it.

docs/formats.md describes its files. Clients attest the digest of an artifact as the content of their data.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from safetensors import SafetensorError

from flapp import __version__
from flapp.files import Stamp, replacing_folder, stamp
from flapp.untrusted import one_line, open_npy, printable, read_json

FORMAT_VERSION = 1
LAYOUTS = ("NHWC", "NCHW")
UINT8 = np.dtype(np.uint8)
DTYPES = ("uint8", "int8", "int16", "int32", "int64", "bool", "float16", "float32", "float64")  # of samples
# Mean and standard deviation per channel of pixels in [0, 1]; `none` only scales to [0, 1].
NORMALIZATIONS: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
FILES = ("meta.json", "images.npy", "labels.npy")
BLOCK_BYTES = 16 << 20
DIGEST_OF_BLOCKS = ([("uint8", 4), ("int64", 1)], [("float32", 2), ("float32", 1)])  # dtypes and axes: see `digest`

ReadRows = Callable[[int, int], np.ndarray]

_compared: set[Stamp] = set()


class DataError(ValueError):
    """Data is missing, damaged or not what was asked for; the message is one line with the fix."""


@contextmanager
def refusing(path: Path, fix: str, missing: str = "") -> Iterator[None]:
    """Turn what readers of a file raise into DataError with the fix; missing: the message if the file is not there."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        if missing and isinstance(error, FileNotFoundError | NotADirectoryError):
            raise DataError(missing) from None
        raise DataError(f"{path} cannot be read ({error.strerror or error}): {fix}") from error
    except (ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise DataError(f"{path} is damaged ({one_line(error)}): {fix}") from error


@dataclass(frozen=True)
class Artifact:
    """An opened split: memory-mapped arrays (copy-on-write: what is written to them never reaches the file)."""

    path: Path
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    digest: str
    source_sha256: str
    layout: str = "NHWC"
    normalization: str | None = None  # what the settings said when it was prepared
    preparation: str = ""  # the same in all splits that were written together

    @property
    def has_images(self) -> bool:
        """Say whether the samples are images; others are read as they are stored."""
        return are_images(self.images.dtype, self.images.shape)

    @property
    def size(self) -> tuple[int, int]:
        """Return the height and width of the images as stored."""
        height, width = self.images.shape[1:3] if self.layout == "NHWC" else self.images.shape[2:]
        return height, width


def are_images(dtype: np.dtype, shape: Sequence[int]) -> bool:
    """Say whether an array of samples holds images: uint8 with four axes."""
    return dtype == UINT8 and len(shape) == 4


def kind_of(dtype: np.dtype | str, shape: Sequence[int]) -> str:
    """Return the dtype and shape of an array of any number of rows, such as `float32 [N, 10]`."""
    return f"{dtype} [{', '.join(['N', *map(str, shape[1:])])}]"


def resized_folder(folder: Path, size: int | None) -> Path:
    """Return the folder that holds the images of the split in `folder` resized to size x size pixels."""
    return folder.with_name(f"{folder.name}@{size}")


@contextmanager
def locked(path: Path) -> Iterator[TextIO]:
    """Hold the exclusive lock file `path` (created if missing), open to append; wait while another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of killed writers of `folder`; call it while nobody else writes there."""
    for path in folder.parent.glob(f".{escape(folder.name)}.*.tmp*"):
        shutil.rmtree(path)


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, which becomes `folder` when the block ends; see replacing_folder.

    Raises DataError when the disk fails. Files that killed writers of `folder` have left behind are removed.
    """
    try:
        remove_leftovers(folder)
        with replacing_folder(folder) as partial:
            yield partial
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror or error}): fix that and try again") from error


def check_space(folder: Path, needed: int) -> None:
    """Raise DataError if the disk of `folder` has fewer than `needed` bytes free."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DataError(f"{folder} needs {needed:,} bytes, its disk has {free:,} free: make room or set another home")


def write_artifact(
    folder: Path,
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    source_sha256: str = "",
    layout: str = "NHWC",
) -> None:
    """Write one split into `folder`, whole or not at all, replacing what was there.

    images: the samples. uint8 (N, H, W, C), or (N, C, H, W) with layout="NCHW", are images. Others, of any shape
    (N, ...) and of DTYPES, are read as they are stored. labels: int64 (N,) below len(classes); without classes,
    float32 or int64 (N, ...). source_sha256: the SHA-256 of the source (the default: of the arrays); for data that a
    user's function makes, sources.MADE_BY and the SHA-256 of the function. Raises DataError for bad arrays.
    """
    check_arrays(str(folder), images.dtype, images.shape, labels, len(classes), layout)
    sha256 = source_sha256 or arrays_sha256(images, labels)
    write_rows(folder, lambda a, b: images[a:b], images.shape, labels, classes, sha256, layout, dtype=images.dtype)


def arrays_sha256(images: np.ndarray, labels: np.ndarray) -> str:
    """Return the SHA-256 that names the source of a split that comes from no file."""
    found = hashlib.sha256(np.ascontiguousarray(images).data)
    found.update(np.ascontiguousarray(labels).data)
    return found.hexdigest()


def write_rows(
    folder: Path,
    read: ReadRows,
    shape: Sequence[int],
    labels: np.ndarray,
    classes: Sequence[str],
    source_sha256: str,
    layout: str = "NHWC",
    progress: Callable[[int], object] = lambda rows: None,
    dtype: np.dtype = UINT8,
    normalization: str | None = None,
    into: Path | None = None,
    preparation: str = "",
) -> None:
    """Write one split as write_artifact does, block by block: read(start, stop) returns these rows; `shape` is of all.

    progress(n) is called for every n samples written. normalization: the one that runs must use. into: the folder
    of a caller's own writing(folder). preparation: marks the splits that are written together. Raises DataError for
    wrong arrays and when the disk is full or fails.
    """
    shape = tuple(shape)
    check_arrays(str(folder), dtype, shape, labels, len(classes), layout)
    check_space(folder, int(np.prod(shape)) * dtype.itemsize + labels.nbytes + 4096)

    def blocks() -> Iterator[np.ndarray]:
        rows = _block_rows(int(np.prod(shape[1:])) * dtype.itemsize)
        for start in range(0, shape[0], rows):
            wanted = (min(rows, shape[0] - start), *shape[1:])
            block = np.ascontiguousarray(read(start, start + wanted[0]))
            if (block.dtype, block.shape) != (dtype, wanted):
                raise DataError(f"{folder} needs images {dtype} {wanted}, got {block.dtype} {block.shape}")
            yield block
            progress(len(block))

    meta: dict[str, Any] = {"format_version": FORMAT_VERSION, "writer": f"flapp {__version__}"}
    more = {"layout": layout, "normalization": normalization, "preparation": preparation}
    meta |= {key: value for key, value in more.items() if value not in ("NHWC", None, "")}
    with nullcontext(into) if into else writing(folder) as partial:
        meta["images"] = _write_npy(partial / "images.npy", shape, dtype, blocks())
        meta["labels"] = _write_npy(partial / "labels.npy", labels.shape, labels.dtype, blocks_of(labels))
        meta |= {"classes": list(classes), "source_sha256": source_sha256, "complete": True}
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))


def _write_npy(path: Path, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[np.ndarray]) -> dict[str, Any]:
    """Write a .npy file block by block and return what meta.json says of it."""
    hashes = []
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)
            hashes.append(_sha256(block))
    return {"shape": list(shape), "dtype": str(dtype), "blocks": hashes}


def open_artifact(folder: Path, verify: bool = False) -> Artifact:
    """Open the split in `folder`; with verify, hash every block too. Raises DataError naming what is wrong."""
    meta = read_meta(folder)
    images, labels = (open_array(folder / f"{name}.npy", meta[name]) for name in ("images", "labels"))
    layout = meta.get("layout", "NHWC")
    check_arrays(str(folder), images.dtype, images.shape, labels, len(meta["classes"]), layout)
    for name, array in (("images", images), ("labels", labels)):
        if verify and (bad := damaged_blocks(array, meta[name]["blocks"])):
            why = f"block {bad[0]} has a different SHA-256 from the one in meta.json"
            raise DataError(f"{folder / name}.npy was changed or damaged ({why}): delete {folder} and prepare it again")
    more = (meta.get("source_sha256", ""), layout, meta.get("normalization"), meta.get("preparation", ""))
    return Artifact(folder, images, labels, tuple(meta["classes"]), digest(meta), *more)


def open_verified(folder: Path) -> Artifact:
    """Open the split in `folder` and make sure that its bytes match meta.json, once for all processes.

    Raises DataError naming what is wrong.
    """
    artifact, found = open_artifact(folder), stamp(folder, FILES)
    if found not in _compared:
        with ExitStack() as stack:
            note = None
            # If the note (NAME.verified.json) cannot be opened or locked, each process compares for itself.
            with suppress(OSError):
                note = stack.enter_context(locked(_note(folder)))
            if not _is_noted(folder, found):
                artifact = open_artifact(folder, verify=True)
                if note:
                    note.truncate(0)
                    note.write(json.dumps(found))
        _compared.add(found)
    return artifact


def is_verified(folder: Path) -> bool:
    """Say whether the bytes of the split in `folder` have been compared since they were last written."""
    found = stamp(folder, FILES)
    return found in _compared or _is_noted(folder, found)


def check_arrays(
    where: str, dtype: np.dtype, shape: Sequence[int], labels: np.ndarray, classes: int, layout: str = "NHWC"
) -> None:
    """Raise DataError, which names `where`, unless samples of this dtype and shape and their labels make a split."""
    found = f"got samples {dtype} {list(shape)} and labels {labels.dtype} {list(labels.shape)}"
    if layout not in LAYOUTS:
        raise DataError(f"{where} has layout {layout!r}: it must be one of {', '.join(LAYOUTS)}")
    if layout != "NHWC" and not are_images(dtype, shape):
        raise DataError(f"{where} has layout {layout}, only for images (uint8 with 4 axes); {found}: leave layout out")
    if str(dtype) not in DTYPES:
        raise DataError(f"{where} needs samples of one of {', '.join(DTYPES)}, {found}: convert them with astype")
    if classes and (str(labels.dtype), labels.ndim) != ("int64", 1):
        raise DataError(f"{where} has {classes} classes, so it needs labels int64 [N], {found}: convert the labels")
    if str(labels.dtype) not in ("float32", "int64"):
        raise DataError(f"{where} needs labels float32 or int64, {found}: convert the labels with astype")
    if not shape or not labels.ndim or shape[0] != len(labels) or 0 in (*shape, *labels.shape):
        raise DataError(f"{where} needs samples [N, ...] and labels [N, ...], equally many and not empty, {found}")
    if classes and not (labels.min() >= 0 and labels.max() < classes):
        found = f"{where} has labels from {labels.min()} to {labels.max()}, but {classes} classes"
        raise DataError(f"{found}: number the labels from 0 to {classes - 1}")


def check_samples(artifact: Artifact, shape: Sequence[int], classes: int, normalization: str) -> None:
    """Raise DataError unless an artifact holds samples of `shape` in `classes` classes, as the settings say.

    An artifact that was prepared for one normalization must be used with it.
    """
    found = (artifact.images.shape[1:], len(artifact.classes), artifact.normalization)
    check_settings(f"dataset {artifact.path.parent.name}", found, (shape, classes, normalization))


def check_settings(
    where: str, found: tuple[Sequence[int], int, str | None], settings: tuple[Sequence[int], int, str]
) -> None:
    """Raise DataError, which names `where`, unless found shape, classes and normalization are those of the settings.

    A normalization of None goes with any.
    """
    if found[2] not in (None, settings[2]):
        fault = f"{where} was prepared with dataset.normalization={found[2]}, the settings say {settings[2]}"
        raise DataError(f"{fault}: leave dataset.normalization out, or prepare it again with overwrite=true")
    if (list(found[0]), found[1]) != (list(settings[0]), settings[1]):
        fault = f"{where} has samples of shape {list(found[0])} in {found[1]} classes"
        fix = f"set dataset.shape={str(list(found[0])).replace(' ', '')} dataset.classes={found[1]}"
        raise DataError(f"{fault}, the settings say {list(settings[0])} in {settings[1]}: {fix}")


def refuse_rows(artifact: Artifact, given: Mapping[str, Any]) -> None:
    """Raise DataError for settings that need images where there are none.

    given: for each fix, such as "augment=False", whether the settings need it.
    """
    if not artifact.has_images and (fixes := [fix for fix, is_given in given.items() if is_given]):
        raise DataError(
            f"{artifact.path} holds no images (uint8 with 4 axes) but {artifact.images.dtype} "
            f"{list(artifact.images.shape)}, which is read as stored: set {' and '.join(fixes)}"
        )


def digest(meta: dict[str, Any]) -> str:
    """Return the SHA-256 that names the content of an artifact: of the block hashes, and of dtypes and shapes.

    For images with class labels, and for regression on vectors, it covers the block hashes only, as in old versions.
    """
    arrays = [meta[name] for name in ("images", "labels")]
    kinds = [(array["dtype"], len(array["shape"])) for array in arrays]
    facts = "" if kinds in DIGEST_OF_BLOCKS else json.dumps([[array["dtype"], array["shape"]] for array in arrays])
    return hashlib.sha256("".join([*arrays[0]["blocks"], *arrays[1]["blocks"], facts]).encode()).hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """Read the meta.json of the split in `folder`; raises DataError when it is missing, damaged or not complete."""
    path, again = folder / "meta.json", f"delete {folder} and prepare it again"
    with refusing(path, again, f"no artifact at {folder} (meta.json is missing): prepare the dataset first"):
        meta = read_json(path)
        arrays = [meta[name] for name in ("images", "labels")]
        lists = [meta["classes"], *(array["blocks"] for array in arrays), [array["dtype"] for array in arrays]]
        sound = all(type(words) is list and all(type(word) is str for word in words) for words in lists)
        sound = sound and all(type(array["shape"]) is list for array in arrays)
        sound = sound and all(type(n) is int and n >= 0 for array in arrays for n in array["shape"])
        sound = sound and all(type(meta.get(key, "")) is str for key in ("source_sha256", "preparation"))
        sound = sound and meta.get("normalization", "half") in NORMALIZATIONS
        found = printable(f"format {meta['format_version']}, complete={meta['complete']}, sound={sound}")
        if not sound or meta["complete"] is not True or meta["format_version"] != FORMAT_VERSION:
            raise DataError(f"{path} is not a complete artifact of format {FORMAT_VERSION} ({found}): {again}")
    return meta


def open_array(path: Path, facts: dict[str, Any]) -> np.ndarray:
    """Map a .npy file that must have the shape and dtype in `facts` and end where its array ends."""
    again = f"delete {path.parent} and prepare it again"
    with refusing(path, again):
        array = open_npy(path)
    found, expected = (list(array.shape), str(array.dtype)), (facts["shape"], facts["dtype"])
    if found != expected:
        fault = f"{path} holds {found[1]} {found[0]}, its meta.json says {expected[1]} {expected[0]}"
        raise DataError(f"{fault}: {again}")
    return array


def blocks_of(array: np.ndarray) -> list[np.ndarray]:
    """Return views of the rows of `array` in blocks of at most BLOCK_BYTES, and of at least one row."""
    rows = _block_rows(array[:1].nbytes)
    return [array[start : start + rows] for start in range(0, len(array), rows)]


def damaged_blocks(array: np.ndarray, hashes: Sequence[str], numbers: Sequence[int] | None = None) -> list[int]:
    """Return the blocks, of `numbers` (None: all), whose SHA-256 is not that in `hashes`, or that are missing."""
    blocks = blocks_of(array)
    wanted = range(max(len(blocks), len(hashes))) if numbers is None else numbers
    return [n for n in wanted if n >= min(len(blocks), len(hashes)) or _sha256(blocks[n]) != hashes[n]]


def _block_rows(row_bytes: int) -> int:
    return max(1, BLOCK_BYTES // max(1, row_bytes))


def _sha256(block: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(block).data).hexdigest()


def _note(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.verified.json")


def _is_noted(folder: Path, found: Stamp) -> bool:
    try:
        return bool(json.loads(_note(folder).read_text()) == [list(file) for file in found])
    except (OSError, ValueError):
        return False
