"""Your own images: prepared by one command, whole or not at all, and known by name to every later command."""

import errno
import json
import os
import shutil
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from flapp.config.load import compose
from flapp.config.schema import ConfigError
from flapp.data.artifact import DataError, open_artifact, read_meta
from flapp.data.folder import open_folder
from flapp.partitions import check_splits
from tests.support.faults import die, killed
from tests.support.leaf_files import content_of
from tests.support.own_runs import run
from tests.support.pictures import draw, encode, write_pictures
from tests.tools.conftest import Refusal
from tools import partition_heatmap, prepare_data, verify_data

CLASSES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures", CLASSES, 10)


def words(tmp_path: Path, *more: str) -> list[str]:
    """Return the command line that prepares those pictures."""
    home = [f"home={tmp_path / 'home'}", f"dataset.source={tmp_path / 'pictures'}"]
    return ["dataset=custom", "dataset.name=mine", *home, "dataset.shape=[16,16,3]", *more]


def prepared(tmp_path: Path, *more: str) -> dict[str, bytes]:
    """Prepare the pictures and return the files of both artifacts."""
    assert prepare_data.main(words(tmp_path, *more)) == 0
    return content_of(tmp_path / "home" / "data" / "mine")


@pytest.mark.slow
def test_a_folder_of_images_is_prepared_and_trained_on_by_name_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, home = write_pictures(tmp_path / "pictures", CLASSES, 40), tmp_path / "home"
    given, folder = [f"home={home}", "dataset=custom", "dataset.name=mine"], home / "data/mine"
    shape = ["dataset.shape=[32,32,3]", "dataset.materialize=16"]
    assert prepare_data.main([*given, f"dataset.source={source}", *shape]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{folder}/train: 160 samples of 32x32x3, 0.5 MB",
        f"{folder}/train@16: 160 samples of 3x16x16, 0.1 MB",
    ]
    usual = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])
    for split, found in open_folder(source, 0.2, 0)[0].items():
        artifact = open_artifact(folder / split, verify=True)
        assert artifact.classes == tuple(CLASSES)
        assert np.array_equal(artifact.labels, found.labels)
        assert np.bincount(artifact.labels).tolist() == [32 if split == "train" else 8] * 5
        for row, pixels in enumerate(artifact.images):
            assert np.array_equal(pixels, np.asarray(usual(Image.open(found.name(row)))))
    few = ["clients=2", "num_rounds=2", "model=linear", "evaluate.personal_epochs=0", "run_name=own"]
    assert run(compose([*given, *few]))[0]["accuracy"] > 0.5
    assert "shape:\n  - 32\n  - 32\n  - 3\n" in (home / "runs/own/config.yaml").read_text()
    (partition,) = (folder / "partitions").glob("*.safetensors")
    assert verify_data.main([str(folder), "--full"]) == 0
    assert partition_heatmap.main([str(partition), str(folder), str(tmp_path / "out.png")]) == 0


def test_splits_of_the_source_are_kept(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures" / "train", CLASSES, 3)
    write_pictures(tmp_path / "pictures" / "val", CLASSES[:2], 2)
    prepared(tmp_path)
    train, test = (open_artifact(tmp_path / "home/data/mine" / split) for split in ("train", "test"))
    assert (len(train.labels), test.labels.tolist(), test.classes) == (15, [0, 0, 1, 1], tuple(CLASSES))


@pytest.mark.slow
def test_the_same_command_again_does_nothing_and_other_files_or_settings_are_refused(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], refusal: Refusal
) -> None:
    prepared(tmp_path)
    folder = tmp_path / "home/data/mine"
    by_writer = folder / "partitions/natural.safetensors"
    by_writer.parent.mkdir()
    by_writer.write_bytes(b"of these samples")
    inodes = {path: path.stat().st_ino for path in folder.rglob("*")}
    capsys.readouterr()
    before = prepared(tmp_path)
    assert capsys.readouterr().out.count("already prepared, nothing to do") == 2
    assert {path: path.stat().st_ino for path in folder.rglob("*")} == inodes
    other = ("dataset.shape=[16,16,1]", "dataset.test_fraction=0.3", "seed=1", "dataset.skip_unreadable=true")
    said = f"{folder / 'train'} was made from other files or settings: add overwrite=true"
    for word in (*other, "dataset.normalization=none"):
        assert said in refusal(prepare_data.main, *words(tmp_path, word))
    (source / "ant" / "000.jpg").write_bytes(encode(draw(20, 20), "JPEG"))
    assert "was made from other files or settings" in refusal(prepare_data.main, *words(tmp_path))
    assert content_of(folder) == before
    assert prepared(tmp_path, "overwrite=true") != before
    assert not by_writer.exists()
    shutil.rmtree(folder / "test")
    assert prepared(tmp_path) == prepared(tmp_path, "overwrite=true")


def test_unreadable_images_end_the_command_or_are_left_out(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = prepared(tmp_path)
    for number in range(30):
        (source / "bee" / f"{number:03d}.png").write_text("no image")
    assert prepare_data.main(words(tmp_path, "overwrite=true")) == 1
    *lines, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: 30 of 80 images cannot be read")
    assert len(lines) == 21
    assert all(line.startswith("  ") for line in lines)
    assert all("it is not an image of a known format" in line for line in lines[:20])
    assert lines[20] == "  and 10 more"
    assert content_of(tmp_path / "home/data/mine") == before
    prepared(tmp_path, "overwrite=true", "dataset.skip_unreadable=true")
    assert "30 images cannot be read and are left out" in capsys.readouterr().out
    labels = [open_artifact(tmp_path / "home/data/mine" / split).labels for split in ("train", "test")]
    assert sum(map(len, labels)) == 50
    for number in range(1, 30):
        (source / "bee" / f"{number:03d}.png").unlink()
    capsys.readouterr()
    prepared(tmp_path, "overwrite=true", "dataset.skip_unreadable=true")
    assert "\n1 image cannot be read and is left out" in capsys.readouterr().out


def test_nothing_is_written_unless_both_splits_are(
    tmp_path: Path, source: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, fault = prepared(tmp_path), OSError(errno.ENOSPC, "No space left on device")
    write = Mock(wraps=prepare_data.write_rows, side_effect=[DEFAULT, fault] * 2)
    monkeypatch.setattr(prepare_data, "write_rows", write)
    full = "mine/test cannot be written (No space left on device): fix that"
    assert full in refusal(prepare_data.main, *words(tmp_path, "overwrite=true", "seed=1"))
    assert content_of(tmp_path / "home/data/mine") == before
    shutil.rmtree(tmp_path / "home/data/mine")
    assert full in refusal(prepare_data.main, *words(tmp_path))
    assert not (tmp_path / "home/data/mine").exists()
    assert [path.name for path in (tmp_path / "home/data").iterdir() if path.is_file()] == ["mine.lock"]


REFUSED = {
    "dataset.name=other dataset.source=null": "dataset=other needs its files: add dataset.source=DIR",
    "dataset.classes=4": "has 5 classes, not 4: leave dataset.classes out",
    "dataset.shape=null": "add the shape that all shall have, such as dataset.shape=[224,224,3]",
    "dataset.shape=[16,16,1] dataset.normalization=imagenet": "imagenet needs 3 channels, the images have 1: leave it",
    "dataset.source=nowhere": "nowhere cannot be read (No such file or directory)",
    "dataset.name=../mine": "dataset.name='../mine' must be the name of a folder in",
    "dataset.name=''": "dataset.name='' must be the name of a folder in",
    "dataset.name=digits": "dataset.name=digits is a dataset of flapp's own: choose",
    "dataset.name=cifar10": "dataset.name=cifar10 is a dataset of flapp's own: choose",
    "dataset.name=..": "dataset.name='..' must be the name of a folder in",
    "dataset.test_fraction=1": "dataset.test_fraction=1 is out of range: it must be less than 1",
    "dataset.target=task:make": "dataset.target=task:make makes dataset=mine on first use: start a run",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_cannot_be_prepared_is_refused_in_one_line(
    tmp_path: Path, source: Path, refusal: Refusal, given: str
) -> None:
    assert REFUSED[given] in refusal(prepare_data.main, *words(tmp_path, *given.split()))
    assert not list(tmp_path.rglob("meta.json"))


def test_a_class_of_which_no_training_image_can_be_read_is_an_error(tmp_path: Path, refusal: Refusal) -> None:
    write_pictures(tmp_path / "pictures/train", CLASSES, 1)
    write_pictures(tmp_path / "pictures/test", CLASSES, 1)
    (tmp_path / "pictures/train/cat/000.jpg").write_bytes(b"")
    said = refusal(prepare_data.main, *words(tmp_path, "dataset.skip_unreadable=true"), has_begun=True)
    assert "class cat has no training image that can be read" in said


def test_normalization_is_kept_with_the_data_and_a_run_must_use_it(tmp_path: Path, source: Path) -> None:
    prepared(tmp_path, "dataset.normalization=imagenet")
    train = tmp_path / "home/data/mine/train"
    assert (read_meta(train)["normalization"], open_artifact(train).normalization) == ("imagenet", "imagenet")
    config = compose(["dataset=custom", "dataset.name=mine", f"home={tmp_path / 'home'}"])
    assert config.dataset.normalization == "imagenet"
    meta = json.loads((train / "meta.json").read_text())
    digest = open_artifact(train).digest
    (train / "meta.json").write_text(json.dumps({key: meta[key] for key in meta if key != "normalization"}))
    assert (open_artifact(train).digest, open_artifact(train).normalization) == (digest, None)
    (train / "meta.json").write_text(json.dumps(meta | {"normalization": "other"}))
    with pytest.raises(DataError, match="is not a complete artifact"):
        open_artifact(train)


@pytest.mark.parametrize("changed", ["seed", "file"])
def test_splits_of_two_preparations_are_refused_by_whoever_opens_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: Refusal, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    pictures, folder, again = tmp_path / "pictures", tmp_path / "home/data/mine", f"seed={int(changed == 'seed')}"
    for root in (pictures,) if changed == "seed" else (pictures / "train", pictures / "test"):
        write_pictures(root, CLASSES, 4)
    prepared(tmp_path)
    if changed == "file":
        (pictures / "test/ant/000.jpg").write_bytes(encode(draw(20, 20), "JPEG"))
    replace = os.replace

    def replace_one_split(source: Path, target: Path) -> None:
        replace(source, target)
        if target.name in ("train", "test"):
            die()

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_one_split)
        killed(lambda: prepare_data.main(words(tmp_path, "overwrite=true", again)))
    marks = {split: open_artifact(folder / split).preparation for split in ("train", "test")}
    assert len(set(marks.values())) == 2
    said = f"{folder / 'train'} and {folder / 'test'} are of two preparations, so one was interrupted: prepare both"
    config = compose(["dataset=custom", "dataset.name=mine", f"home={tmp_path / 'home'}", "model=cnn"])
    with pytest.raises(DataError, match=said):
        check_splits(config, *(open_artifact(folder / split) for split in ("train", "test")))
    capsys.readouterr()
    assert verify_data.main([str(folder)]) == 1
    assert said in capsys.readouterr().out
    for given in ((again,), ("seed=0",)):
        assert "overwrite=true" in refusal(prepare_data.main, *words(tmp_path, *given))
    prepared(tmp_path, again, "overwrite=true")
    assert verify_data.main([str(folder)]) == 0
    prepared(tmp_path, again)


def test_splits_without_a_mark_are_accepted_and_the_mark_is_not_in_the_digest(tmp_path: Path, source: Path) -> None:
    prepared(tmp_path)
    for split in ("train", "test"):
        path = tmp_path / f"home/data/mine/{split}"
        meta, digest = json.loads((path / "meta.json").read_text()), open_artifact(path).digest
        del meta["preparation"]
        (path / "meta.json").write_text(json.dumps(meta))
        assert open_artifact(path).digest == digest
    assert verify_data.main([str(tmp_path / "home/data/mine")]) == 0
    prepared(tmp_path)


def test_a_run_with_own_data_named_as_a_dataset_of_flapps_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset.name=femnist is a dataset of flapp's own: choose another"):
        compose(["dataset=custom", "dataset.name=femnist", f"home={tmp_path}"])


def test_a_source_that_may_not_be_read_is_named(
    tmp_path: Path, source: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.exists

    def exists(path: Path) -> bool:
        if path.parent == source:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "exists", exists)
    said = refusal(prepare_data.main, *words(tmp_path))
    assert said.startswith(f"error: {source} may not be read (Permission denied): allow it")
    assert "dataset_dict.json" not in said
