"""Tables of images: parquet files written by pyarrow, and datasets of the `datasets` library."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flapp.data.shards.source import FEMNIST
from tests.support.leaf_files import Samples
from tests.support.pictures import encode

NAMES = ["cat", "ant", "bee"]
datasets.disable_progress_bars()


def draw_images(count: int, seed: int = 0, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_parquet(path: Path, row_group: int | None = None, **columns: Any) -> Path:
    """Write columns by pyarrow, without anything that only Hugging Face's files have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group)
    return path


def as_dataset(
    images: Sequence[np.ndarray], labels: Sequence[int], names: Sequence[str] = NAMES, **more: Sequence[Any]
) -> datasets.Dataset:
    """Return a dataset as users of `datasets` make one; columns that `more` has are added."""
    made = datasets.Dataset.from_dict(
        {"image": [{"bytes": encode(image), "path": None} for image in images], "label": list(labels), **more}
    )
    return made.cast_column("image", datasets.Image()).cast_column("label", datasets.ClassLabel(names=list(names)))


def write_femnist(path: Path, samples: Samples) -> Path:
    """Write samples with the columns of flwrlabs/femnist; writers are mixed, each one's samples stay in order."""
    left = {name: iter(zip(*pair, strict=True)) for name, pair in samples.items()}
    names = [name for name, (_, labels) in samples.items() for _ in labels]
    mixed = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    rows = [next(left[name]) for name in mixed]
    images, labels = [image.reshape(28, 28) for image, _ in rows], [int(label) for _, label in rows]
    made = as_dataset(images, labels, FEMNIST.classes, writer_id=mixed, hsf_id=[3] * len(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    made.rename_column("label", "character").to_parquet(path)
    return path
