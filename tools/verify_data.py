"""Check prepared data as if nobody had prepared it well: a list of checks, each ok or FAILED with the reason.

    python -m tools.verify_data PATH             PATH: one split, a dataset (all its splits), or a folder of shards
    python -m tools.verify_data PATH --full      every byte, instead of some blocks of 16 MiB
    python -m tools.verify_data PATH --sample N --json

Exits 0 when every check is ok, 1 otherwise.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flapp.data.artifact import DataError, digest, open_array, open_artifact, read_meta
from flapp.data.blocks import block_rows, damaged_blocks
from flapp.data.materialized import compare_with_pil
from flapp.untrusted import printable
from tools.running.called import new_parser
from tools.verify_shards import verify_shards

FILES = ("images.npy", "labels.npy", "meta.json")
MOST_TEXT = 1000  # characters of what a check says
COMPLETE = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000)}  # of which every class has equally many


@dataclass(frozen=True)
class Check:
    """One question asked of one folder, and its answer."""

    where: str
    name: str
    ok: bool
    detail: str


@dataclass
class Split:
    """What is known of a split so far; a check adds to it for those that follow."""

    folder: Path
    meta: dict[str, Any] = field(default_factory=dict)
    images: np.ndarray | None = None
    labels: np.ndarray | None = None


@dataclass
class Pixels:
    """What was seen in some blocks of the images."""

    blocks: list[int]
    total: int
    damaged: list[int] = field(default_factory=list)
    zeros: list[int] = field(default_factory=list)
    not_finite: list[int] = field(default_factory=list)
    alike: bool = True
    highest: float = -np.inf


def verify(path: Path, blocks: int | None = 8) -> Iterator[Check]:
    """Yield the checks of a split, a dataset or a folder of shards; blocks=None looks at every byte."""
    if not path.is_dir():
        yield Check(str(path), "folder", False, "there is no such folder: give a split, a dataset or a shards folder")
    elif (path / "manifest.json").exists() or (path / "train.safetensors").exists():
        yield from (Check(*facts) for facts in verify_shards(path, blocks))
    elif any((path / name).exists() for name in FILES):
        yield from verify_split(path, blocks)
    else:
        yield from verify_dataset(path, blocks)


def verify_dataset(folder: Path, blocks: int | None) -> Iterator[Check]:
    """Yield the checks of every split in a dataset's folder, and those between them."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "partitions")
    shards = [path for path in folders if (path / "manifest.json").exists()]
    for path in shards:
        yield from verify(path, blocks)
    left = [path.name for path in folders if path.suffix in (".tmp", ".old")]
    splits = [path for path in folders if path.name not in left and path not in shards]
    missing = [name for name in ("train", "test") if not (folder / name).is_dir()] if splits or not shards else []
    reason = f"{', '.join(left)} is what an interrupted preparation left: give its command again" if left else ""
    reason = f"{', '.join(missing)} missing: prepare the dataset" if missing else reason
    yield Check(str(folder), "splits", not reason, reason or ", ".join(path.name for path in folders))
    for path in splits:
        yield from verify_split(path, blocks)
    for path in splits:
        if path.name != "train" and not missing:
            yield answer(path, "fits train", partial(fits_train, path, folder / "train"))
        if "@" in path.name:
            yield answer(path, "resized as PIL does", partial(resized, path))


def verify_split(folder: Path, blocks: int | None) -> Iterator[Check]:
    """Yield the checks of one split; those that cannot be asked after an earlier failure say so."""
    split, seen = Split(folder), Pixels([], 0)

    def look() -> str:
        nonlocal seen
        seen = look_at(split, blocks)
        return damage(seen.damaged, f"{len(seen.blocks)} of {seen.total} blocks of images", "images.npy")

    questions: list[tuple[str, Callable[[], str]]] = [
        ("files", lambda: files(split)),
        ("completion marker", lambda: marker(split)),
        ("images header and length", lambda: array(split, "images")),
        ("labels header and length", lambda: array(split, "labels")),
        ("images and labels pair up", lambda: pairs(split)),
        ("shape and layout", lambda: layout(split)),
        ("label range", lambda: label_range(split)),
        ("class balance", lambda: balance(split)),
        ("labels hash", lambda: damage(damaged_blocks(known(split.labels), hashes(split, "labels")), "all", "labels")),
        ("images hash", look),
        ("pixel values", lambda: values(split, seen)),
        ("no empty images", lambda: empty(seen)),
    ]
    for name, question in questions:
        yield answer(folder, name, question)


def answer(folder: Path, name: str, question: Callable[[], str]) -> Check:
    """Ask a question, which returns what it found or raises DataError."""
    try:
        return Check(str(folder), name, True, printable(question(), MOST_TEXT))
    except DataError as error:
        return Check(str(folder), name, False, printable(" ".join(str(error).split()), MOST_TEXT))


def known(thing: Any) -> Any:
    """Return what an earlier check found; raises DataError when that check failed."""
    if thing is None or (isinstance(thing, dict) and not thing):
        raise DataError("cannot be told after the failures above")
    return thing


def files(split: Split) -> str:
    found = sorted(path.name for path in split.folder.iterdir())
    if missing := [name for name in FILES if name not in found]:
        raise DataError(f"{', '.join(missing)} missing: prepare the dataset again")
    if strange := [name for name in found if name not in FILES]:
        raise DataError(f"{', '.join(strange)} does not belong here: delete it")
    return ", ".join(found)


def marker(split: Split) -> str:
    split.meta = read_meta(split.folder)
    source = str(split.meta.get("source_sha256", ""))
    if len(source) != 64 or set(source) - set("0123456789abcdef"):
        raise DataError(f"source_sha256={source!r} is not a SHA-256: prepare the dataset again")
    return f"complete, format {split.meta['format_version']}, by {split.meta.get('writer')}"


def array(split: Split, name: str) -> str:
    path = split.folder / f"{name}.npy"
    if path.is_file():
        with path.open("rb") as file:
            if file.read(6) != b"\x93NUMPY":
                raise DataError(f"{path.name} has no .npy header (a raw memmap or a pickle?): prepare it again")
    found = open_array(path, known(split.meta)[name])
    setattr(split, name, found)
    return f"{found.dtype} {list(found.shape)}"


def pairs(split: Split) -> str:
    images, labels = len(known(split.images)), len(known(split.labels))
    if images != labels or images == 0:
        raise DataError(f"{images:,} images and {labels:,} labels: prepare the dataset again")
    return f"{images:,} of each"


def layout(split: Split) -> str:
    open_artifact(split.folder)
    name, size = known(split.meta).get("layout", "NHWC"), split.folder.name.partition("@")[2]
    shape = known(split.images).shape
    if size and (name, [str(side) for side in shape[2:]]) != ("NCHW", [size, size]):
        raise DataError(f"{name} {list(shape)} is not what {split.folder.name} must hold: NCHW at {size} pixels")
    return f"{name} {list(shape[1:])}" if len(shape) == 4 else f"features {list(shape[1:])}"


def label_range(split: Split) -> str:
    labels, classes = known(split.labels), len(known(split.meta)["classes"])
    if not classes and not np.isfinite(labels).all():
        raise DataError(f"label {np.flatnonzero(~np.isfinite(labels))[0]} is NaN or infinite")
    if classes and not (labels.min() >= 0 and labels.max() < classes):
        raise DataError(f"labels from {labels.min()} to {labels.max()}, but {classes} classes")
    return f"{labels.min():g} to {labels.max():g}"


def balance(split: Split) -> str:
    labels, classes = known(split.labels), known(split.meta)["classes"]
    if not classes:
        return "no classes"
    counts = np.bincount(labels[(labels >= 0) & (labels < len(classes))], minlength=len(classes))
    if split.folder.name.startswith("train") and not counts.all():
        raise DataError(f"class {classes[int(counts.argmin())]!r} has no samples")
    if len(labels) in COMPLETE.get(split.folder.parent.name, ()) and counts.min() != counts.max():
        raise DataError(f"{counts.min():,} to {counts.max():,} samples of a class, which must have equally many")
    return f"{len(classes)} classes with {counts.min():,} to {counts.max():,} samples"


def hashes(split: Split, name: str) -> list[str]:
    return list(known(split.meta)[name]["blocks"])


def damage(bad: list[int], what: str, name: str) -> str:
    if bad:
        raise DataError(f"block {bad[0]} of {name} was changed (damaged, rolled or permuted): prepare it again")
    return f"{what} as they were written"


def look_at(split: Split, blocks: int | None) -> Pixels:
    """Read some blocks of the images once, evenly spread, and hash and judge what is in them."""
    images, expected = known(split.images), hashes(split, "images")
    rows = block_rows(images[:1].nbytes)
    total = -(-len(images) // rows)
    chosen = range(total) if blocks is None else np.unique(np.linspace(0, total - 1, min(blocks, total)).astype(int))
    seen = Pixels([int(block) for block in chosen], total)
    # What is hashed but not there, or there but not hashed, is damage in any sample.
    seen.damaged += list(range(min(total, len(expected)), max(total, len(expected))))
    for number in tqdm(seen.blocks, unit="block", desc=split.folder.name, disable=None, leave=False, file=sys.stderr):
        block = images[number * rows : (number + 1) * rows].reshape(-1, int(np.prod(images.shape[1:])))
        seen.damaged += damaged_blocks(images, expected, [number])
        seen.zeros += (number * rows + np.flatnonzero(~block.any(axis=1))).tolist()
        if block.dtype.kind == "f":
            seen.not_finite += (number * rows + np.flatnonzero(~np.isfinite(block).all(axis=1))).tolist()
        seen.alike = seen.alike and bool((block == images[0].reshape(-1)).all())
        seen.highest = max(seen.highest, float(block.max()))
    return seen


def values(split: Split, seen: Pixels) -> str:
    known(seen.blocks or None)
    if seen.not_finite:
        raise DataError(f"{len(seen.not_finite)} samples hold NaN or infinity, the first is {seen.not_finite[0]}")
    if seen.alike and len(known(split.images)) > 1:
        raise DataError("all images are the same")
    if known(split.images).dtype == np.uint8 and seen.highest <= 1:
        raise DataError("no pixel is above 1 of 255: floats from 0 to 1 were cast to uint8")
    return f"the highest is {seen.highest:g}"


def empty(seen: Pixels) -> str:
    known(seen.blocks or None)
    if seen.zeros:
        raise DataError(f"{len(seen.zeros):,} images are all zero, the first is {seen.zeros[0]}")
    return f"in {len(seen.blocks)} of {seen.total} blocks"


def fits_train(path: Path, train: Path) -> str:
    """Compare the classes, shape and content of a split with those of the training split."""
    this, other = read_meta(path), read_meta(train)
    if this["classes"] != other["classes"]:
        raise DataError(f"{path.name} has other classes than train: prepare both together")
    if "@" not in path.name and this["images"]["shape"][1:] != other["images"]["shape"][1:]:
        raise DataError(f"{this['images']['shape'][1:]} is another shape than train's: prepare both together")
    if digest(this) == digest(other):
        raise DataError(f"{path.name} is a copy of train: prepare it again")
    return "same classes and shape"


def resized(path: Path) -> str:
    """Compare a materialised split with the split it was made from, and 64 of its images with PIL's resize."""
    native = path.with_name(path.name.partition("@")[0])
    small, large = open_artifact(native), open_artifact(path)
    if large.source_sha256 != small.digest or not np.array_equal(small.labels, large.labels):
        raise DataError(f"it was not made from {native} as it is now: prepare it again with overwrite=true")
    compare_with_pil(small.images, large.images, large.images.shape[2])
    return f"64 images, and made from {native.name}"


def main(arguments: list[str] | None = None) -> int:
    """Print the checks of what the command line names; returns the exit status."""
    parser = new_parser(__doc__)
    parser.add_argument("path", type=Path)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--sample", type=int, default=8, metavar="N", help="blocks of 16 MiB to read (default: 8)")
    amount.add_argument("--full", action="store_true", help="read everything")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    given = parser.parse_args(arguments)
    if given.sample < 1:
        parser.error("--sample must be at least 1")
    checks = list(verify(given.path, None if given.full else given.sample))
    if given.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        for number, check in enumerate(checks):
            if number == 0 or check.where != checks[number - 1].where:
                print(check.where)
            print(f"  {'ok    ' if check.ok else 'FAILED'} {check.name}: {check.detail}")
        failed = sum(not check.ok for check in checks)
        print(f"{failed} of {len(checks)} checks FAILED" if failed else f"all {len(checks)} checks ok")
    return int(not all(check.ok for check in checks))


if __name__ == "__main__":
    sys.exit(main())
