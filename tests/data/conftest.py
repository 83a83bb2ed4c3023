"""A small artifact of images for the tests of datasets and loaders."""

from pathlib import Path

import pytest

from flapp.data.offline import OfflineDataset
from tests.support.images import photographs, write_split


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_split(tmp_path / "cifar10" / "train", photographs())


@pytest.fixture
def dataset(folder: Path) -> OfflineDataset:
    return OfflineDataset(folder, normalization="imagenet")
