"""Draw how many samples of each class each client has: a heatmap of a saved partition, requested next to actual.

python -m tools.partition_heatmap PARTITION.safetensors DATASET_FOLDER OUT.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flapp.data.artifact import DataError, open_artifact
from flapp.data.partition import label_histogram, load_partition
from tools.cli import errors_in_one_line, new_parser

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ANNOTATED = 400  # in larger tables, numbers in the cells would not be readable


def read_tables(partition: Path, dataset: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the tables to draw by title, each (clients, classes), and the class names; raises DataError."""
    if not partition.is_file():
        raise DataError(f"there is no partition at {partition}: each run saves its partition in home/data")
    saved = load_partition(partition)
    train, test = (open_artifact(dataset / split) for split in ("train", "test"))
    if not train.classes:
        raise DataError(f"{dataset} has no classes to count: choose a dataset for classification")
    for artifact, parts in ((train, (*saved.train, *saved.val)), (test, saved.test)):
        if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(artifact.labels))):
            raise DataError(f"{partition} is no partition of {artifact.path}: give the dataset it was made for")
    tables = {"train, requested": saved.requested}
    for title, artifact, parts in (("train, actual", train, saved.train), ("test, actual", test, saved.test)):
        tables[title] = np.array([label_histogram(artifact.labels[part], len(train.classes)) for part in parts])
    return tables, train.classes


def draw_heatmap(tables: dict[str, np.ndarray], classes: Sequence[str], out: Path) -> None:
    """Draw (clients, classes) tables side by side as a PNG; both tables of a split share one scale."""
    from matplotlib.figure import Figure

    clients = len(next(iter(tables.values())))
    width, height = min(20.0, 3 + 0.35 * len(classes)), min(30.0, 2 + 0.3 * clients)
    figure = Figure(figsize=(width * len(tables), height), layout="constrained")
    for axes, (title, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        split = title.split(",")[0]
        top = max(1.0, *(float(other.max()) for name, other in tables.items() if name.startswith(split)))
        draw_table(axes, table, classes, top)
        axes.set(title=f"{title}: {round(float(table.sum())):,} samples", xlabel="class", ylabel="client")
    figure.savefig(out, format="png", dpi=100)


def draw_table(axes: "Axes", table: np.ndarray, classes: Sequence[str], top: float, fontsize: float | None = 7) -> None:
    """Draw one (clients, classes) table into axes, on a scale from 0 to `top`; fontsize=None leaves out the numbers."""
    image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
    if len(classes) <= 30:
        axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
    if fontsize and table.size <= ANNOTATED:
        for (client, label), count in np.ndenumerate(table):
            shade = "black" if count > 0.6 * top else "white"
            axes.text(label, client, f"{count:.0f}", ha="center", va="center", color=shade, fontsize=fontsize)
    axes.figure.colorbar(image, ax=axes, label="samples")


@errors_in_one_line(DataError)
def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the partition that the command line names."""
    parser = new_parser(__doc__)
    for name in ("partition", "dataset", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args(arguments)
    try:
        draw_heatmap(*read_tables(given.partition, given.dataset), given.out)
    except OSError as error:
        raise DataError(f"{given.out} cannot be written ({error.strerror}): give another OUT.png") from error
    print(given.out)


if __name__ == "__main__":
    sys.exit(main())
