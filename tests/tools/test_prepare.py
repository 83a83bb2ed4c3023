"""tools.prepare_data: raw files to artifacts; after kill -9 the same command ends in the same bytes."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from flapp.config.load import ConfigError, compose
from flapp.data import artifact as artifacts
from flapp.data import images as pixels
from flapp.data.artifact import open_artifact, write_artifact
from flapp.data.sources import cifar_files, cifar_sha256, ensure_artifacts, read_cifar
from tests.support.cifar_files import write_cifar
from tests.support.faults import die, killed
from tests.support.images import pil_resize
from tests.support.leaf_files import content_of
from tests.tools.conftest import Refusal
from tools import prepare_data


def cifar(tmp_path: Path, *more: str) -> list[str]:
    """Return the command line that prepares 100 + 20 small CIFAR images."""
    if not (tmp_path / "raw").exists():
        write_cifar(tmp_path / "raw")
    return ["dataset=cifar10", f"dataset.source={tmp_path / 'raw'}", f"home={tmp_path / 'home'}", *more]


def test_cifar_is_prepared_at_native_resolution_and_resized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_data.main(cifar(tmp_path, "dataset.materialize=48")) == 0
    out, folder = capsys.readouterr().out, tmp_path / "home" / "data" / "cifar10"
    assert f"{folder / 'train'}: 100 samples of 32x32x3" in out
    assert "done in " in out
    for split, count in (("train", 100), ("test", 20)):
        native, large = (open_artifact(folder / name, verify=True) for name in (split, f"{split}@48"))
        paths = cifar_files("cifar10", tmp_path / "raw", split)
        images, labels, _ = read_cifar("cifar10", tmp_path / "raw", split)
        assert native.images.shape == (count, 32, 32, 3)
        assert np.array_equal(native.images, images)
        assert native.labels.tolist() == large.labels.tolist() == labels.tolist()
        assert native.source_sha256 == cifar_sha256(paths)
        assert (large.layout, large.images.shape, large.images.dtype) == ("NCHW", (count, 3, 48, 48), np.uint8)
        assert large.source_sha256 == native.digest
        for small, resized in zip(native.images, large.images, strict=True):
            assert np.array_equal(pil_resize(small, 48), resized.transpose(1, 2, 0))


@pytest.mark.parametrize("split", ["train", "test@48"])
def test_kill_9_and_the_same_command_again_end_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    command, home = cifar(tmp_path, "dataset.materialize=48"), tmp_path / "home"
    monkeypatch.setattr(artifacts, "BLOCK_BYTES", 20_000)  # six images of 32x32x3
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "bar", lambda name, total: nullcontext(die if name == split else int))
        killed(lambda: prepare_data.main(command))
    assert list((home / "data" / "cifar10").glob(f".{split}.*.tmp/images.npy"))
    assert prepare_data.main(command) == 0
    disturbed = content_of(home)
    shutil.rmtree(home)
    assert prepare_data.main(command) == 0
    assert content_of(home) == disturbed


def test_prepared_data_is_left_alone_until_its_source_changes_and_overwrite_replaces_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: Refusal
) -> None:
    command, folder = cifar(tmp_path, "dataset.materialize=16"), tmp_path / "home" / "data" / "cifar10"

    def digests() -> set[str]:
        return {open_artifact(folder / split, verify=True).digest for split in ("train", "train@16")}

    assert prepare_data.main(command) == 0
    files, before = {path: path.stat().st_ino for path in folder.rglob("*")}, digests()
    capsys.readouterr()
    assert prepare_data.main(command) == 0
    assert capsys.readouterr().out.count("already prepared, nothing to do") == 4
    assert {path: path.stat().st_ino for path in folder.rglob("*")} == files
    assert prepare_data.main(cifar(tmp_path, "overwrite=true")) == 0  # the same files again: nothing is stale
    assert prepare_data.main(command) == 0
    shutil.rmtree(tmp_path / "raw")
    write_cifar(tmp_path / "raw", seed=1)
    assert refusal(prepare_data.main, *command).endswith(
        "train was made from other files: add overwrite=true to replace it"
    )
    assert prepare_data.main(cifar(tmp_path, "overwrite=true")) == 0
    assert "train@16 was made from other files" in refusal(prepare_data.main, *command, has_begun=True)
    assert prepare_data.main([*command, "overwrite=true"]) == 0
    assert not before & digests()


@pytest.mark.parametrize(("size", "off_by", "allowed"), [(48, 1, False), (299, 2, True), (299, 5, False)])
def test_images_that_differ_from_pils_are_refused_and_leave_nothing(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, size: int, off_by: int, allowed: bool
) -> None:
    def resize_by_pil_and_a_bit(images: torch.Tensor, size: int) -> torch.Tensor:
        resized = np.stack([pil_resize(image, size) for image in images.permute(0, 2, 3, 1).numpy()])
        shifted = resized.transpose(0, 3, 1, 2).astype(np.int16)
        shifted[:, 1, 3, 5] += np.where(shifted[:, 1, 3, 5] < 128, off_by, -off_by)
        return torch.from_numpy(shifted.astype(np.uint8))

    monkeypatch.setattr(pixels, "resize", resize_by_pil_and_a_bit)
    command, folder = cifar(tmp_path, f"dataset.materialize={size}"), tmp_path / "home" / "data" / "cifar10"
    if allowed:
        assert prepare_data.main(command) == 0
        return
    error = refusal(prepare_data.main, *command, has_begun=True)
    assert f"at {size} pixels differs from PIL's resize by {off_by} levels" in error
    assert [path.name for path in folder.iterdir()] == ["train"]


@pytest.mark.parametrize(("side", "size"), [*((32, size) for size in (16, 32, 224, 299, 336)), (64, 224), (250, 96)])
def test_the_real_resize_passes_the_comparison_with_pil(tmp_path: Path, side: int, size: int) -> None:
    images = np.random.default_rng(size).integers(0, 256, (8, side, side, 3), dtype=np.uint8)
    write_artifact(tmp_path / "test", images, np.arange(8), list("01234567"), "source")
    folder = pixels.materialize(tmp_path / "test", size)
    assert folder == tmp_path / f"test@{size}"
    assert open_artifact(folder, verify=True).images.shape == (8, 3, size, size)


def test_grey_and_embedded_images_are_materialised_too(tmp_path: Path) -> None:
    command = ["dataset=digits", f"home={tmp_path}", "dataset.materialize=24"]
    assert prepare_data.main(command) == 0
    native, large = (open_artifact(tmp_path / "data" / "digits" / name) for name in ("test", "test@24"))
    assert (native.images.shape, large.images.shape) == ((360, 32, 32, 1), (360, 1, 24, 24))
    assert native.images.max() == 255
    # What the tool writes is what a run prepares by itself on first use.
    ensure_artifacts(tmp_path / "by itself", "digits")
    assert content_of(tmp_path / "by itself" / "digits" / "test") == content_of(tmp_path / "data" / "digits" / "test")


def test_a_failed_download_is_an_error_and_nothing_is_made_up(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    from urllib.error import URLError

    import torchvision

    asked = Mock(side_effect=URLError("no network\nhere"))
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", asked)
    error = refusal(prepare_data.main, "dataset=cifar100", "dataset.download=true", f"home={tmp_path}")
    assert "cifar100 cannot be downloaded into" in error
    assert "no network here" in error
    asked.assert_called_once_with(tmp_path / "raw", train=False, download=True)
    assert not (tmp_path / "data" / "cifar100").exists()


def test_what_is_downloaded_is_read_from_where_it_was_put_and_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torchvision

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, train, download: write_cifar(root))
    command = ["dataset=cifar10", "dataset.download=true", f"home={tmp_path}"]
    assert prepare_data.main(command) == 0
    assert len(open_artifact(tmp_path / "data" / "cifar10" / "train").labels) == 100
    shutil.rmtree(tmp_path / "raw")
    monkeypatch.delattr(torchvision.datasets, "CIFAR10")
    assert prepare_data.main(command) == 0
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert prepare_data.main([*command, "dataset.materialize=16"]) == 0


REFUSED = {
    "dataset=cifar10": "dataset=cifar10 needs its files: add dataset.source=DIR",
    "dataset=cifar10 dataset.source=/nowhere": "/nowhere/data_batch_1 is missing",
    "dataset=digits dataset.download=true": "digits is embedded: leave out dataset.source",
    "dataset=digits dataset.client_column=who": "dataset.client_column does not apply to dataset=digits: leave",
    "dataset=digits dataset.shape=[8,8,1]": "shape [32, 32, 1] in 10 classes, not dataset.shape=[8, 8, 1]",
    "dataset=digits dataset.materialize=0": "dataset.materialize=0 is out of range",
    "experiment=toy_regression dataset.materialize=24": "dataset.materialize=24 resizes images, dataset=regression has",
    "dataset=digits overwrite=yes": "overwrite=yes must be true or false",
    "dataset=digits home=/dev/null/home": "Not a directory",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_cannot_be_prepared_is_refused_in_one_line(tmp_path: Path, refusal: Refusal, command: str) -> None:
    assert REFUSED[command] in refusal(prepare_data.main, f"home={tmp_path}", *command.split())
    assert not list(tmp_path.rglob("meta.json"))


def test_a_relative_source_is_taken_from_the_working_folder_and_refused_where_there_is_none(tmp_path: Path) -> None:
    settings = compose(["dataset=cifar10", "dataset.source=raw", "home=h"], tmp_path)
    assert (settings.dataset.source, settings.home) == (str(tmp_path / "raw"), str(tmp_path / "h"))
    with pytest.raises(ConfigError, match=r"^dataset\.source=raw is relative.*absolute path$"):
        compose(["dataset=cifar10", "dataset.source=raw"])
