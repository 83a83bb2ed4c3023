"""Check prepared data without trusting how it was made; print a list of checks, each ok or FAILED with the reason.

    python -m tools.verify_data PATH             PATH: one split, a dataset (all its splits), or a folder of shards
    python -m tools.verify_data PATH --full      everything, instead of some blocks of 16 MiB or some shards
    python -m tools.verify_data PATH --sample N --json

Exits 0 when every check is ok, 1 otherwise.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flapp.data.artifact import (
    FILES,
    DataError,
    are_images,
    blocks_of,
    damaged_blocks,
    digest,
    kind_of,
    open_array,
    open_artifact,
    read_meta,
)
from flapp.data.shards.build import open_shard
from flapp.data.shards.client import DistributedShardLoader, read_blocks
from flapp.data.shards.client import read_meta as read_shard_meta
from flapp.data.shards.manifest import Manifest, load_manifest
from flapp.data.sources import check_preparation
from flapp.untrusted import printable
from tools.cli import new_parser

MOST_TEXT = 1000  # characters in the answer of a check
COMPLETE = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000)}  # sizes of splits whose classes must be balanced
AFTER = "cannot be checked after the failure above"
AGAIN = "prepare the dataset again"
CAST = "floats from 0 to 1 were probably cast to uint8: multiply them by 255 first"


@dataclass(frozen=True)
class Check:
    """One question about one folder, and its answer."""

    where: str
    name: str
    ok: bool
    detail: str


def ask(folder: Path, name: str, question: Callable[[], str]) -> Check:
    """Run one check function, which returns what it found or raises DataError."""
    try:
        return Check(str(folder), name, True, printable(question(), MOST_TEXT))
    except DataError as error:
        return Check(str(folder), name, False, printable(" ".join(str(error).split()), MOST_TEXT))


def verify(path: Path, blocks: int | None = 8) -> Iterator[Check]:
    """Yield the checks of a split, a dataset or a folder of shards; blocks=None looks at every byte."""
    if not path.is_dir():
        yield Check(str(path), "folder", False, "there is no such folder: give a split, a dataset or a shards folder")
    elif (path / "manifest.json").exists() or (path / "train.safetensors").exists():
        yield from verify_shards(path, blocks)
    elif any((path / name).exists() for name in FILES):
        yield from verify_split(path, blocks)
    else:
        yield from verify_dataset(path, blocks)


def verify_dataset(folder: Path, blocks: int | None) -> Iterator[Check]:
    """Yield the checks of every split in a dataset's folder, and those between them."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "partitions")
    shards = [path for path in folders if (path / "manifest.json").exists() and not path.name.startswith(".")]
    for path in shards:
        yield from verify(path, blocks)
    left = [path for path in folders if path.suffix in (".tmp", ".old")]
    splits = [path for path in folders if path not in left + shards]
    missing = [name for name in ("train", "test") if not (folder / name).is_dir()] if splits or not shards else []
    if missing:
        reason = f"{', '.join(missing)} missing: prepare the dataset"
    elif left:
        names = ", ".join(path.name for path in left)
        reason = f"{names} was left by an interrupted preparation: run the same command again"
    else:
        reason = ""
    yield Check(str(folder), "splits", not reason, reason or ", ".join(path.name for path in folders))
    for path in splits:
        yield from verify_split(path, blocks)
    for path in splits:
        if path.name != "train" and not missing:
            yield ask(path, "fits train", partial(fits_train, path, folder / "train"))
        if "@" in path.name:
            yield ask(path, "resized as PIL does", partial(resized, path))


def verify_split(folder: Path, blocks: int | None) -> Iterator[Check]:
    """Yield the checks of one split; those that an earlier failure makes impossible say so."""
    split, reasons = Split(folder, blocks), set()
    for name, question in QUESTIONS.items():
        check = ask(folder, name, partial(question, split))
        yield Check(check.where, name, False, AFTER) if check.detail in reasons else check
        reasons |= set() if check.ok else {check.detail}


class Split:
    """One split and the questions about it: each returns what it found or raises DataError."""

    def __init__(self, folder: Path, blocks: int | None) -> None:
        self.folder, self.blocks = folder, blocks

    @cached_property
    def meta(self) -> dict[str, Any]:
        return read_meta(self.folder)

    @cached_property
    def images(self) -> np.ndarray:
        return open_array(self.folder / "images.npy", self.meta["images"])

    @property
    def samples(self) -> str:
        """Say what the split holds: images or samples."""
        return "images" if are_images(self.images.dtype, self.images.shape) else "samples"

    @cached_property
    def labels(self) -> np.ndarray:
        return open_array(self.folder / "labels.npy", self.meta["labels"])

    @cached_property
    def seen(self) -> "Pixels":
        return Pixels(self)

    def files(self) -> str:
        found = sorted(path.name for path in self.folder.iterdir())
        if missing := [name for name in FILES if name not in found]:
            raise DataError(f"{', '.join(missing)} missing: {AGAIN}")
        if strange := [name for name in found if name not in FILES]:
            ends = "do not belong here: delete them" if len(strange) > 1 else "does not belong here: delete it"
            raise DataError(f"{', '.join(strange)} {ends}")
        return ", ".join(found)

    def marker(self) -> str:
        source = str(self.meta.get("source_sha256", ""))
        if len(source) != 64 or set(source) - set("0123456789abcdef"):
            raise DataError(f"source_sha256={source!r} is not a SHA-256: {AGAIN}")
        return f"complete, format {self.meta['format_version']}, by {self.meta.get('writer')}"

    def pairs(self) -> str:
        images, labels = len(self.images), len(self.labels)
        if images != labels or images == 0:
            raise DataError(f"{images:,} {self.samples} and {labels:,} labels: {AGAIN}")
        return f"{images:,} of each"

    def layout(self) -> str:
        open_artifact(self.folder)
        name, shape, size = self.meta.get("layout", "NHWC"), self.images.shape, self.folder.name.partition("@")[2]
        if size and (name, [str(side) for side in shape[2:]]) != ("NCHW", [size, size]):
            wanted = f"NCHW at {size} pixels"
            raise DataError(f"{name} {list(shape)} is not what {self.folder.name} must hold, {wanted}: {AGAIN}")
        return f"{name if self.samples == 'images' else 'samples'} {list(shape[1:])}"

    def label_range(self) -> str:
        labels, classes = self.labels, len(self.meta["classes"])
        if not len(labels):
            raise DataError(f"there are no labels: {AGAIN}")
        if not classes and not np.isfinite(labels).all():
            raise DataError(f"label {np.argwhere(~np.isfinite(labels))[0][0]} is NaN or infinite: {AGAIN}")
        if classes and not (labels.min() >= 0 and labels.max() < classes):
            raise DataError(f"labels from {labels.min()} to {labels.max()}, but {classes} classes: {AGAIN}")
        return f"{labels.min():g} to {labels.max():g}"

    def balance(self) -> str:
        labels, classes = self.labels, self.meta["classes"]
        if not classes:
            return "no classes"
        counts = np.bincount(labels[(labels >= 0) & (labels < len(classes))], minlength=len(classes))
        if self.folder.name.startswith("train") and not counts.all():
            raise DataError(f"class {classes[int(counts.argmin())]!r} has no samples: {AGAIN}")
        if len(labels) in COMPLETE.get(self.folder.parent.name, ()) and counts.min() != counts.max():
            found = f"{counts.min():,} to {counts.max():,} samples of a class"
            raise DataError(f"{found}, and all must have equally many: {AGAIN}")
        return f"{len(classes)} classes with {counts.min():,} to {counts.max():,} samples"

    def labels_hash(self) -> str:
        return found_intact("labels.npy", damaged_blocks(self.labels, self.meta["labels"]["blocks"]), "all")

    def images_hash(self) -> str:
        return found_intact("images.npy", self.seen.damaged, f"{self.seen.where} of {self.samples}")

    def pixel_values(self) -> str:
        if self.seen.not_finite:
            first = self.seen.not_finite[0]
            raise DataError(f"{len(self.seen.not_finite)} samples hold NaN or infinity, the first is {first}: {AGAIN}")
        if self.seen.alike and len(self.images) > 1:
            raise DataError(f"all {self.samples} are the same: {AGAIN}")
        if self.samples == "images" and self.seen.highest <= 1:
            raise DataError(f"the highest pixel is {self.seen.highest:g} and should be 255: {CAST}")
        return f"the highest is {self.seen.highest:g}"

    def no_empty_images(self) -> str:
        if self.images.ndim == 1 or (self.images.dtype.kind != "f" and self.samples != "images"):
            return "samples may be zero"  # numbers, flags and token ids
        if self.seen.zeros:
            found = f"{len(self.seen.zeros):,} {self.samples} are all zero, the first is {self.seen.zeros[0]}"
            raise DataError(f"{found}: {AGAIN}")
        return f"in {self.seen.where}"


QUESTIONS: dict[str, Callable[[Split], str]] = {
    "files": Split.files,
    "completion marker": Split.marker,
    "images header and length": lambda split: f"{split.images.dtype} {list(split.images.shape)}",
    "labels header and length": lambda split: f"{split.labels.dtype} {list(split.labels.shape)}",
    "images and labels pair up": Split.pairs,
    "shape and layout": Split.layout,
    "label range": Split.label_range,
    "class balance": Split.balance,
    "labels hash": Split.labels_hash,
    "images hash": Split.images_hash,
    "pixel values": Split.pixel_values,
    "no empty images": Split.no_empty_images,
}


def found_intact(name: str, damaged: list[int], what: str) -> str:
    if damaged:
        raise DataError(f"block {damaged[0]} of {name} was changed (damaged, rolled or permuted): prepare it again")
    return f"{what} unchanged since written"


def spread(number: int, some: int | None) -> list[int]:
    """Return `some` (None: all) of the first `number` whole numbers, evenly spread."""
    return np.unique(np.linspace(0, number - 1, min(number, some or number)).astype(int)).tolist()


class Pixels:
    """What some blocks of a split's images hold; zeros, not_finite: the samples that are all zero, or not finite."""

    def __init__(self, split: Split) -> None:
        images, expected, blocks = split.images, split.meta["images"]["blocks"], blocks_of(split.images)
        total, numbers = len(blocks), spread(len(blocks), split.blocks)
        self.where = f"{len(numbers)} of {total} blocks"
        # Blocks that are hashed but missing, or present but not hashed, count as damage, whichever blocks are checked.
        self.damaged = list(range(min(total, len(expected)), max(total, len(expected))))
        self.zeros, self.not_finite = list[int](), list[int]()
        self.alike, self.highest = True, -np.inf
        for number in tqdm(numbers, unit="block", desc=split.folder.name, disable=None, leave=False, file=sys.stderr):
            first, block = number * len(blocks[0]), blocks[number].reshape(len(blocks[number]), -1)
            self.damaged += damaged_blocks(images, expected, [number])
            self.zeros += (first + np.flatnonzero(~block.any(axis=1))).tolist()
            if block.dtype.kind == "f":
                self.not_finite += (first + np.flatnonzero(~np.isfinite(block).all(axis=1))).tolist()
            self.alike = self.alike and bool((block == images[0].reshape(-1)).all())
            self.highest = max(self.highest, float(block.max()))


def fits_train(path: Path, train: Path) -> str:
    """Compare a split with the training split: classes, content, the shape unless resized, the preparation of test."""
    this, other = read_meta(path), read_meta(train)
    if path.name == "test":
        check_preparation(path.parent, other.get("preparation", ""), this.get("preparation", ""))
    if this["classes"] != other["classes"]:
        raise DataError(f"{path.name} has other classes than train: prepare both together")
    if "@" not in path.name and this["images"]["shape"][1:] != other["images"]["shape"][1:]:
        raise DataError(f"{this['images']['shape'][1:]} is another shape than train's: prepare both together")
    dtypes = [
        (meta["images"]["dtype"], kind_of(meta["labels"]["dtype"], meta["labels"]["shape"])) for meta in (this, other)
    ]
    if dtypes[0] != dtypes[1]:
        found = ", train's are ".join(f"{samples} with labels {labels}" for samples, labels in dtypes)
        raise DataError(f"its samples are {found}: prepare both together")
    if digest(this) == digest(other):
        raise DataError(f"{path.name} is a copy of train: prepare it again")
    return "same classes" if "@" in path.name else "same classes and shape"


def resized(path: Path) -> str:
    """Compare a materialized split with the split that it was made from, and some of its images with PIL's resize."""
    from flapp.data.images import compare_with_pil  # imports PyTorch

    native = path.with_name(path.name.partition("@")[0])
    small, large = open_artifact(native), open_artifact(path)
    if large.source_sha256 != small.digest or not np.array_equal(small.labels, large.labels):
        raise DataError(f"it was not made from {native} as it is now: prepare it again with overwrite=true")
    count = compare_with_pil(small.images, large.images, large.images.shape[2])
    return f"{count} images, and made from {native.name}"


def verify_shards(folder: Path, sample: int | None) -> Iterator[Check]:
    """Yield the checks of one shard, or of a manifest and `sample` (None: all) of its shards."""
    if not (folder / "manifest.json").exists():
        yield ask(folder, "shard", lambda: shard_pixels(DistributedShardLoader(folder)))
        return
    yield (loaded := ask(folder, "manifest", lambda: f"{load_manifest(folder).facts['totals']}"))
    if loaded.ok:
        manifest = load_manifest(folder)
        yield ask(folder, "folders", partial(shard_folders, manifest))
        clients, writers = list(manifest), dict[str, str]()
        for client in (clients[i] for i in spread(len(clients), sample)):
            yield ask(folder, f"client {client}", partial(shard_of_client, manifest, client, writers))


def shard_folders(manifest: Manifest) -> str:
    expected = {record.shard for record in manifest.values()}
    found = {path.name for path in manifest.folder.iterdir() if path.is_dir()}
    if missing := sorted(expected - found):
        raise DataError(f"{first_of(missing)} missing: make the shards again")
    if strange := sorted(found - expected):
        raise DataError(f"{first_of(strange)} not in the manifest: delete {'them' if len(strange) > 1 else 'it'}")
    return f"{len(found):,}"


def first_of(names: list[str]) -> str:
    """Return the first name, the number of the others and the verb."""
    return f"{names[0]} and {len(names) - 1} more are" if len(names) > 1 else f"{names[0]} is"


def shard_of_client(manifest: Manifest, client_id: str, writers: dict[str, str]) -> str:
    """Check a client's shard, that it is the one in the manifest, and that no client checked before has its writers."""
    shard = open_shard(manifest, client_id)
    if tuple(shard.label_hist) != manifest[client_id].label_hist:
        raise DataError(f"{shard.path} is not the shard that the manifest lists: make the shards again")
    for writer in read_shard_meta(shard.path)["writers"]:
        if (other := writers.setdefault(writer, client_id)) != client_id:
            raise DataError(f"writer {writer} is also in client {other}'s shard: make the shards again")
    return shard_pixels(shard)


def shard_pixels(shard: DistributedShardLoader) -> str:
    """Check the images of a shard for faults that hashes cannot show."""
    for split, count in shard.num_samples.items():
        highest = 0
        for images, _ in read_blocks(shard.path / f"{split}.safetensors", count, shard.kind):
            if not images.reshape(len(images), -1).any(axis=1).all():
                raise DataError(f"{split} of {shard.path} has an image that is all zero: check the source")
            highest = max(highest, int(images.max(initial=0)))
        if count and highest <= 1:
            raise DataError(f"the highest pixel in {split} of {shard.path} is {highest} and should be 255: {CAST}")
    return ", ".join(f"{count:,} {split}" for split, count in shard.num_samples.items())


def main(arguments: list[str] | None = None) -> int:
    """Print the checks of the path on the command line; returns the exit status."""
    parser = new_parser(__doc__)
    parser.add_argument("path", type=Path)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--sample", type=int, default=8, metavar="N", help="blocks or shards to read (default: 8)")
    amount.add_argument("--full", action="store_true", help="read everything")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    given = parser.parse_args(arguments)
    if given.sample < 1:
        parser.error("--sample must be at least 1")
    checks = list(verify(given.path, None if given.full else given.sample))
    failed = sum(not check.ok for check in checks)
    if given.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
        return int(failed > 0)
    for folder, found in groupby(checks, key=lambda check: check.where):
        print(folder)
        for check in found:
            print(f"  {'ok    ' if check.ok else 'FAILED'} {check.name}: {check.detail}")
    print(f"{failed} of {len(checks)} checks FAILED" if failed else f"all {len(checks)} checks ok")
    return int(failed > 0)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    sys.exit(main())
