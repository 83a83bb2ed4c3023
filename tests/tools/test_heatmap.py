"""The heatmap shows what a saved partition asked for and what it dealt out."""

from pathlib import Path

import numpy as np
import pytest

from flapp.data.artifact import open_artifact, write_artifact
from flapp.data.partition import hold_out, load_partition, save_partition
from flapp.data.sources import ensure_artifacts
from tests.tools.conftest import Refusal
from tools import partition_heatmap


@pytest.fixture
def partition(tmp_path: Path, data_home: Path) -> tuple[Path, Path]:
    """Return a saved Dirichlet partition of the digits, and their folder."""
    folder, path = ensure_artifacts(data_home / "data", "digits"), tmp_path / "partition.safetensors"
    train, test = (open_artifact(folder / split).labels for split in ("train", "test"))
    load_partition(path, kind="dirichlet", train_labels=train, test_labels=test, clients=7, seed=1, alpha=0.3)
    return path, folder


def test_the_tables_count_each_sample_once_match_the_request_and_leave_out_held_out_samples(
    partition: tuple[Path, Path], tmp_path: Path
) -> None:
    from PIL import Image

    path, folder = partition
    labels = {split: open_artifact(folder / split).labels for split in ("train", "test")}
    tables, classes = partition_heatmap.read_tables(path, folder)
    assert tables["train, requested"].shape == (7, len(classes))
    assert np.abs(tables["train, requested"] - tables["train, actual"]).max() <= 1
    for split, held in labels.items():
        assert tables[f"{split}, actual"].sum(axis=0).tolist() == np.bincount(held).tolist()
    held_out = hold_out(load_partition(path), labels["train"], 0.2, seed=0)
    save_partition(tmp_path / "held.safetensors", held_out)
    tables, _ = partition_heatmap.read_tables(tmp_path / "held.safetensors", folder)
    assert tables["train, actual"].sum() == sum(map(len, held_out.train)) < len(labels["train"])
    assert partition_heatmap.main([str(path), str(folder), str(tmp_path / "out.png")]) == 0
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG"
        assert len(np.unique(np.asarray(image.convert("L")))) > 50


def test_what_cannot_be_drawn_is_refused_in_one_line(
    partition: tuple[Path, Path], data_home: Path, tmp_path: Path, refusal: Refusal
) -> None:
    (path, folder), other, out = partition, tmp_path / "other", tmp_path / "out.png"
    for split, count in (("train", 1437), ("test", 12)):
        images = np.zeros((count, 1, 1, 1), np.uint8)
        write_artifact(other / split, images, np.zeros(count, np.int64), ["a"], "")
    regression = ensure_artifacts(data_home / "data", "regression")
    for arguments, reason in (
        ([tmp_path / "none", folder, out], "there is no partition at"),
        ([path, other, out], f"is no partition of {other / 'test'}"),
        ([path, regression, out], "has no classes to count"),
        ([path, tmp_path, out], "no artifact at"),
        ([path, folder, tmp_path / "no" / "out.png"], "cannot be written"),
    ):
        assert reason in refusal(partition_heatmap.main, *arguments)
    assert not out.exists()
