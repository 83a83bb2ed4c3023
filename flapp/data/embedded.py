"""The datasets that need no download: scikit-learn's handwritten digits, upright and turned, and a toy regression."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from flapp.data.artifact import DataError, locked, write_artifact

Split = tuple[np.ndarray, np.ndarray]


def _digits() -> tuple[dict[str, Split], list[str]]:
    """Return 1,797 digits of 8x8 pixels (0 to 16), as uint8 of 32x32, cut 80 to 20 by a fixed permutation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    raw = load_digits()
    small = np.round(raw.images * 255 / 16).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in small]
    images, labels = np.stack(large)[..., None], raw.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}, list("0123456789")


def _turned_digits() -> tuple[dict[str, Split], list[str]]:
    """Return the digits inverted and turned by a quarter: another task for a model that knows the digits."""
    splits, classes = _digits()
    return {s: (np.rot90(255 - images, axes=(1, 2)), labels) for s, (images, labels) in splits.items()}, classes


def _regression() -> tuple[dict[str, Split], list[str]]:
    """Return y = w x + b + noise over ten features, 300 training and 90 test samples."""
    rng = np.random.default_rng(0)
    weights, features = rng.normal(size=10), rng.normal(size=(390, 10))
    targets = features @ weights + 1.0 + rng.normal(scale=0.1, size=390)
    x, y = features.astype(np.float32), targets.astype(np.float32)
    return {"train": (x[:300], y[:300]), "test": (x[300:], y[300:])}, []


EMBEDDED: dict[str, Callable[[], tuple[dict[str, Split], list[str]]]] = {
    "digits": _digits,
    "digits_turned": _turned_digits,
    "regression": _regression,
}


def ensure_artifacts(data: Path, name: str) -> Path:
    """Return `data/name`, preparing it first if it is embedded and missing; one process does, others wait.

    Raises DataError when it is neither there nor embedded.
    """
    folder = data / name
    if is_prepared(folder):
        return folder
    if name not in EMBEDDED:
        raise DataError(
            f"dataset {name} is not prepared: {folder} has no train and test artifacts; prepare it with "
            f"python -m tools.prepare_data dataset={name} dataset.source=DIR (your own with "
            "flapp.data.write_artifact), or choose dataset=digits, which needs no files"
        )
    with locked(data / f"{name}.lock"):
        if not is_prepared(folder):
            splits, classes = EMBEDDED[name]()
            for split, (images, labels) in splits.items():
                write_artifact(folder / split, images, labels, classes)
    return folder


def is_prepared(folder: Path) -> bool:
    """Say whether a dataset's folder has both its splits, whole."""
    return all((folder / split / "meta.json").exists() for split in ("train", "test"))
