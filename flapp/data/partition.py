"""Assign samples to clients: seeded partitions of an artifact, saved so that every client reads the same one.

docs/formats.md describes the file. Only a partition by writer has the split val saved; `hold_out` adds it to others.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from flapp.data.artifact import DataError, locked, refusing
from flapp.files import replacing
from flapp.untrusted import check_safetensors

MAX_DRAWS = 1000
SPLITS = ("train", "test")
MOST_HEADER = 64 << 10  # bytes; ours has about 300


@dataclass(frozen=True)
class Partition:
    """Sorted sample indices of each client.

    train and val index the train artifact, test the test artifact; val is empty when nothing is held out. requested
    (clients, classes): how many training samples of each class the draw meant for each client.
    """

    train: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    requested: np.ndarray
    val: tuple[np.ndarray, ...] = ()


def make_partition(
    kind: str,
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    clients: int,
    seed: int,
    alpha: float = 0.5,
    min_size: int = 1,
    classes_per_client: int = 2,
    has_classes: bool = True,
) -> Partition:
    """Give every sample of both splits to exactly one of `clients`, with the same label mix in train and test.

    kind: `iid`; `dirichlet`, each class divided by Dir(alpha) (Hsu et al. 2019, arXiv:1909.06335);
    `pathological`, classes_per_client classes each (McMahan et al. 2017, arXiv:1602.05629). Raises DataError, with
    the numbers, when not everyone gets min_size training samples. has_classes: whether integer labels are classes.
    """
    check_enough(kind, len(train_labels), clients, min_size)
    rng = np.random.default_rng(seed)
    has_classes = has_classes and train_labels.dtype.kind == "i"
    if kind != "iid" and not has_classes:
        raise DataError(f"partition={kind} needs class labels, got {train_labels.dtype}: set partition=iid")
    if kind == "iid":
        return _iid(train_labels, test_labels, clients, rng, has_classes)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    counts = np.bincount(train_labels, minlength=classes)
    if kind == "pathological":
        shares = _pathological_shares(clients, classes, classes_per_client, rng)
        best = _sizes(shares, counts).min()
    else:
        shares, best = _dirichlet_shares(clients, counts, alpha, min_size, rng)
    if best < min_size:
        if kind == "pathological":
            found = f"gives the smallest client {best} training sample{'s' * (best != 1)}"
            fix = "lower partition.min_size or clients, or change partition.classes_per_client"
            raise DataError(f"partition={kind} {found}, partition.min_size={min_size} are needed: {fix}")
        raise DataError(
            f"partition={kind} (alpha={alpha}) gave the smallest of {clients} clients at best {best} of "
            f"{len(train_labels)} training samples in {MAX_DRAWS} draws, partition.min_size={min_size}: "
            "raise partition.alpha, lower partition.min_size or take fewer clients"
        )
    train = _deal(train_labels, shares, rng)
    return Partition(train, _deal(test_labels, shares, rng), shares * counts)


def check_enough(kind: str, samples: int, clients: int, min_size: int) -> None:
    """Raise DataError when there are fewer training samples than min_size for each client."""
    if clients * min_size > samples:
        most = samples // min_size
        lower = f"clients to at most {most}, or partition.min_size" if most else "partition.min_size"
        raise DataError(
            f"partition={kind} cannot give each of clients={clients} partition.min_size={min_size} of {samples} "
            f"training samples: lower {lower}"
        )


def load_partition(path: Path, **settings: Any) -> Partition:
    """Read the partition saved at `path`; if it is missing, make it by make_partition(**settings) first."""
    if not path.exists():
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                save_partition(path, make_partition(**settings))
    with refusing(path, "delete it to draw it again"):
        return _read_partition(path, {s: len(settings[f"{s}_labels"]) for s in SPLITS if f"{s}_labels" in settings})


def _read_partition(path: Path, known: dict[str, int]) -> Partition:
    """Read a saved partition; raises ValueError unless every array fits the others and the known numbers of samples."""
    check_safetensors(path, MOST_HEADER)
    saved = load_file(path)
    splits = (*SPLITS, "val") if "val_indices" in saved else SPLITS
    names = [f"{split}_{what}" for split in splits for what in ("indices", "offsets")]
    kinds = {name: (str(array.dtype), array.ndim) for name, array in saved.items()}
    if kinds != dict.fromkeys(names, ("int64", 1)) | {"requested": ("float64", 2)}:
        raise ValueError(f"it holds {kinds or 'nothing'}")
    lengths = {name: len(array) for name, array in saved.items()}
    for split, count in known.items():
        if (held := lengths[f"{split}_indices"]) != count:
            raise ValueError(f"{split}_indices has {held:,} entries, the dataset has {count:,} samples")
    parts, clients = {}, lengths["requested"]
    for split in splits:
        indices, offsets = saved[f"{split}_indices"], saved[f"{split}_offsets"]
        samples = len(indices) if split == "test" else sum(lengths[f"{s}_indices"] for s in splits if s != "test")
        cuts = len(offsets) == clients + 1 and offsets[0] == 0 and offsets[-1] == len(indices)
        if not (cuts and (np.diff(offsets) >= 0).all() and ((indices >= 0) & (indices < samples)).all()):
            wanted = f"the parts of {samples:,} samples for {clients:,} clients"
            raise ValueError(f"{split}_indices and {split}_offsets are not {wanted}")
        parts[split] = tuple(np.split(indices, offsets[1:-1]))
    return Partition(requested=saved["requested"], **parts)


def hold_out(partition: Partition, train_labels: np.ndarray, fraction: float, seed: int) -> Partition:
    """Move a fraction of each client's training samples to its validation samples.

    They are drawn from (seed, client) and spread evenly over the client's labels, unless a label has axes of its own. A
    client with two samples or more holds out at least one and keeps at least one.
    """
    train, val = [], []
    for client, rows in enumerate(partition.train):
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        rng = np.random.default_rng((seed, client))
        order = rng.permutation(rows)
        by_label = order[np.argsort(train_labels[order], kind="stable")] if train_labels.ndim == 1 else order
        places = (np.arange(count) + rng.random()) * len(rows) / max(1, count)
        val.append(np.sort(by_label[places.astype(np.int64)]))
        train.append(np.setdiff1d(rows, val[-1], assume_unique=True))
    return replace(partition, train=tuple(train), val=tuple(val))


def label_histogram(labels: np.ndarray, classes: int) -> list[int]:
    """Count the samples of each class; [] without classes."""
    return np.bincount(labels, minlength=classes).tolist() if classes else []


def save_partition(path: Path, partition: Partition) -> None:
    """Write a partition, whole or not at all, so that load_partition(path) returns it."""
    # safetensors writes memory as it is, so a transposed table must be in C order first.
    arrays = {"requested": np.ascontiguousarray(partition.requested, dtype=np.float64)}
    saved = {"train": partition.train, "test": partition.test} | ({"val": partition.val} if partition.val else {})
    for split, parts in saved.items():
        arrays[f"{split}_indices"] = np.concatenate(parts)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, parts)])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save_file(arrays, partial)


def _iid(
    train_labels: np.ndarray, test_labels: np.ndarray, clients: int, rng: np.random.Generator, has_classes: bool
) -> Partition:
    train, test = (
        tuple(np.sort(part) for part in np.array_split(rng.permutation(len(labels)), clients))
        for labels in (train_labels, test_labels)
    )
    counts = np.bincount(train_labels) if has_classes else np.zeros(0)
    return Partition(train, test, np.tile(counts / clients, (clients, 1)))


def _dirichlet_shares(
    clients: int, counts: np.ndarray, alpha: float, min_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Draw (clients, classes) shares until everyone has min_size samples; return the best and its smallest size."""
    best, best_size = np.zeros((clients, len(counts))), -1
    for _ in range(MAX_DRAWS):
        shares = rng.dirichlet([alpha] * clients, size=len(counts)).T
        smallest = int(_sizes(shares, counts).min())
        if smallest > best_size:
            best, best_size = shares, smallest
        if best_size >= min_size:
            break
    return best, best_size


def _pathological_shares(clients: int, classes: int, per_client: int, rng: np.random.Generator) -> np.ndarray:
    """Deal the classes in turn, per_client to each client, in random order; the owners of a class share it."""
    if per_client > classes or clients * per_client < classes:
        found = f"partition=pathological cannot deal {classes} classes to {clients} clients with {per_client} each"
        raise DataError(f"{found}: set partition.classes_per_client between {-(-classes // clients)} and {classes}")
    owned = np.zeros((clients, classes))
    slots = np.resize(rng.permutation(classes), clients * per_client).reshape(clients, per_client)
    owned[rng.permutation(clients)[:, None], slots] = 1
    return owned / owned.sum(axis=0)


def _cuts(shares: np.ndarray, count: int) -> np.ndarray:
    """Return where to cut `count` samples so that client k gets its share; the ends are always 0 and count."""
    cuts = np.round(np.cumsum(shares) / shares.sum() * count).astype(np.int64)
    return np.concatenate([[0], cuts])


def _sizes(shares: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.sum([np.diff(_cuts(shares[:, c], n)) for c, n in enumerate(counts)], axis=0)


def _deal(labels: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    parts = []
    for c in range(shares.shape[1]):
        samples = rng.permutation(np.flatnonzero(labels == c))
        parts.append(np.split(samples, _cuts(shares[:, c], len(samples))[1:-1]))
    return tuple(np.sort(np.concatenate(part)) for part in zip(*parts, strict=True))
