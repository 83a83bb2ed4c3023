"""Datasets over artifacts give torchvision's samples, without torchvision's copies."""

import pickle
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import functional

from flapp.data.artifact import DataError
from flapp.data.offline import OfflineCIFAR10, OfflineCIFAR100, OfflineDataset
from tests.support.images import COUNT, photographs, torchvision_batch, write_resized, write_split


@pytest.mark.parametrize(("size", "normalization"), [(None, "imagenet"), (64, "half")])
def test_samples_equal_the_bits_of_torchvision(folder: Path, size: int | None, normalization: str) -> None:
    dataset = OfflineDataset(folder, normalization=normalization, image_size=size)
    expected = torchvision_batch(photographs(), size or 32, normalization)
    assert torch.equal(dataset[3][0], expected[3])
    assert torch.equal(dataset[-1][0], expected[-1])
    assert torch.equal(torch.stack([x for x, _ in dataset.__getitems__([5, 0, 5])]), expected[[5, 0, 5]])
    assert [label for _, label in dataset] == dataset.targets
    with pytest.raises(IndexError):
        dataset[COUNT]
    with pytest.raises(DataError, match="normalization=imagnet is unknown"):
        OfflineDataset(folder, normalization="imagnet")


def test_a_transform_gets_a_pil_image_of_the_asked_size_before_the_normalization(folder: Path) -> None:
    mirror = Mock(wraps=functional.hflip)
    changed = OfflineDataset(folder, mirror, "imagenet", image_size=64)[2][0]
    plain = OfflineDataset(folder, None, "imagenet", image_size=64)[2][0]
    assert [call.args[0].size for call in mirror.call_args_list] == [(64, 64)]
    assert torch.equal(changed, plain.flip(-1))
    with pytest.raises(DataError, match="leave out ToTensor"):
        OfflineDataset(folder, transforms.ToTensor())[0]


def test_a_copy_resized_ahead_of_images_that_were_replaced_is_refused_with_the_command(folder: Path) -> None:
    write_resized(folder, 96, photographs())
    assert OfflineDataset(folder, image_size=96).artifact_at(96).path.name == "train@96"
    changed = photographs()
    changed[5] = 255 - changed[5]  # neither the first nor the last image
    write_split(folder, changed)
    with pytest.raises(DataError) as caught:
        OfflineDataset(folder, image_size=96)
    assert f"{folder}@96 does not hold the images of {folder} at 96 pixels: delete it" in str(caught.value)
    assert "dataset=cifar10 dataset.source=DIR dataset.materialize=96 overwrite=true" in str(caught.value)
    write_resized(folder, 96, changed)
    assert OfflineDataset(folder, image_size=96).artifact_at(96).path.name == "train@96"
    write_resized(folder, 64, changed).rename(folder.with_name("train@128"))
    with pytest.raises(DataError, match="train@128 does not hold the images of .* at 128 pixels"):
        OfflineDataset(folder, image_size=128)


def test_offline_cifar_reads_its_splits_or_names_the_folder_and_the_command(tmp_path: Path) -> None:
    write_split(tmp_path / "cifar10" / "train", photographs())
    write_split(tmp_path / "cifar100" / "test", photographs(5))
    train = OfflineCIFAR10(tmp_path)
    test = OfflineCIFAR100(str(tmp_path), False, image_size=32, use_imagenet_norm=False)
    assert (len(train), len(test), len(train.classes)) == (COUNT, 5, 10)
    assert torch.equal(train[1][0], torchvision_batch(photographs()[1:2], 224)[0])
    assert train[1][1] == train.targets[1] == 1
    assert (test[0][0].min(), test[0][0].max()) == (-1, 1)
    with pytest.raises(DataError) as caught:
        OfflineCIFAR100(tmp_path)
    assert str(tmp_path / "cifar100" / "train") in str(caught.value)
    assert "python -m tools.prepare_data dataset=cifar100 dataset.source=DIR" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dataset_pickles_as_its_folder_and_not_as_its_data(folder: Path) -> None:
    pickled = pickle.dumps(OfflineCIFAR10(folder.parents[1], image_size=64))
    assert len(pickled) < 1000
    again = pickle.loads(pickled)  # noqa: S301 - what a DataLoader sends to its workers
    assert isinstance(again, OfflineCIFAR10)
    batches = torch.cat([inputs for inputs, _ in DataLoader(again, batch_size=16)])
    assert torch.equal(batches, torchvision_batch(photographs(), 64))
