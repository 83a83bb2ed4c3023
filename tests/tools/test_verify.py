"""tools.verify_data finds every damage that a reader of the data would not, and names it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flapp.data import artifact as artifacts
from flapp.data.artifact import open_artifact, write_artifact
from flapp.data.images import materialize
from flapp.data.sources import ensure_artifacts
from tests.support.leaf_files import change_meta
from tools import verify_data

CLASSES = ["a", "b", "c"]
SHA256 = "0123456789abcdef" * 4
Arrays = tuple[np.ndarray, np.ndarray]


def make(seed: int, count: int = 60) -> Arrays:
    """Return images and labels in which every class is there."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), rng.permutation(np.arange(count) % 3)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a dataset with train, test and both at 16 pixels, in blocks of ten native images."""
    folder = tmp_path_factory.mktemp("data") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "BLOCK_BYTES", 1920)
        for seed, split in enumerate(("train", "test")):
            write_artifact(folder / split, *make(seed), CLASSES, SHA256)
            materialize(folder / split, 16)
        yield folder


@pytest.fixture
def dataset(original: Path, tmp_path: Path) -> Path:
    """Return a copy of that dataset, to be damaged."""
    return shutil.copytree(original, tmp_path / "small")


def failures(path: Path) -> dict[str, str]:
    """Return the failed checks as {"split: check": reason}; the exit status must agree with them."""
    checks = list(verify_data.verify(path, None))
    failed = {f"{Path(check.where).name}: {check.name}": check.detail for check in checks if not check.ok}
    assert verify_data.main([str(path), "--full"]) == bool(failed)
    assert all(reason and "\n" not in reason for reason in failed.values())
    return failed


def test_good_data_passes_every_check(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failures(dataset) == {}
    out = capsys.readouterr().out
    assert out.rstrip().endswith("checks ok")
    assert "FAILED" not in out
    for path in dataset.iterdir():
        assert failures(path) == {}


def save(name: str, change: Callable[[np.ndarray], np.ndarray], pickled: bool = False) -> Callable[[Path], None]:
    """Return a function that saves a changed array with a proper header, but without telling meta.json."""

    def damage(split: Path) -> None:
        array = np.load(split / f"{name}.npy")
        (split / f"{name}.npy").unlink()
        np.save(split / f"{name}.npy", change(array), allow_pickle=pickled)

    return damage


def rewrite(
    change: Callable[[np.ndarray, np.ndarray], Arrays], source: str = SHA256, **options: Any
) -> Callable[[Path], None]:
    """Return a function that prepares wrong data properly: every hash is right."""

    def damage(split: Path) -> None:
        images, labels = change(np.load(split / "images.npy"), np.load(split / "labels.npy"))
        write_artifact(split, images, labels, CLASSES, source, **options)

    return damage


def drop_header(split: Path) -> None:
    np.load(split / "images.npy").tofile(split / "images.npy")


def change_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Return a function that changes the bytes of images.npy."""
    return lambda split: (split / "images.npy").write_bytes(change((split / "images.npy").read_bytes()))


truncate = change_bytes(lambda content: content[:-1])
flip_a_bit = change_bytes(lambda content: content[:-1] + bytes([content[-1] ^ 1]))


def with_one(array: np.ndarray, index: int, value: Any) -> np.ndarray:
    changed = array.copy()
    changed[index] = value
    return changed


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "labels are missing": (lambda s: (s / "labels.npy").unlink(), "files", "labels.npy missing"),
    "meta.json is missing": (lambda s: (s / "meta.json").unlink(), "completion marker", "meta.json is missing"),
    "a stray file": (lambda s: (s / "journal").touch(), "files", "journal does not belong here"),
    "a damaged meta.json": (lambda s: (s / "meta.json").write_text("{"), "completion marker", "is damaged"),
    "another format": (lambda s: change_meta(s, format_version=9), "completion marker", "format 9"),
    "no source": (lambda s: change_meta(s, source_sha256=""), "completion marker", "is not a SHA-256"),
    "no hashes": (lambda s: change_meta(s, images={}), "completion marker", "is damaged (KeyError('blocks'))"),
    "a raw memmap": (drop_header, "images header and length", "header is not one of a .npy array"),
    "pickled images": (save("images", lambda a: a.astype(object), True), "images header and length", "Python objects"),
    "a truncated file": (truncate, "images header and length", "too few"),
    "a file of double size": (
        change_bytes(lambda c: c + c[128:]),
        "images header and length",
        "11,520 bytes behind its array",
    ),
    "another shape": (save("images", lambda a: a.reshape(60, 4, 16, 3)), "images header and length", "[60, 4, 16, 3]"),
    "fewer labels": (save("labels", lambda a: a[:-1]), "labels header and length", "[59]"),
    "rolled labels": (save("labels", lambda a: np.roll(a, 1)), "labels hash", "rolled or permuted"),
    "a label too high": (save("labels", lambda a: with_one(a, 0, 3)), "label range", "labels from 0 to 3"),
    "all images zero": (save("images", lambda a: a * 0), "no empty images", "60 images are all zero, the first is 0"),
    "rolled images": (save("images", lambda a: np.roll(a, 1, 0)), "images hash", "block 0 of images.npy was changed"),
    "a flipped bit": (flip_a_bit, "images hash", "block 5 of images.npy was changed"),
    "a class that is gone": (rewrite(lambda x, y: (x, y % 2)), "class balance", "class 'c' has no samples"),
    "an empty image": (rewrite(lambda x, y: (with_one(x, 33, 0), y)), "no empty images", "the first is 33"),
    "one image for all": (rewrite(lambda x, y: (x[:1].repeat(60, 0), y)), "pixel values", "images are the same"),
    "floats cast to bytes": (
        rewrite(lambda x, y: (x // 128, y)),
        "pixel values",
        "were probably cast to uint8: multiply them by 255 first",
    ),
}


def copy_train(dataset: Path) -> None:
    shutil.rmtree(dataset / "test")
    shutil.copytree(dataset / "train", dataset / "test")


def resize_wrongly(change: Callable[[np.ndarray, np.ndarray], Arrays], **options: Any) -> Callable[[Path], None]:
    """Return a function that writes other images of test at 16 pixels properly."""

    def damage(dataset: Path) -> None:
        rewrite(change, source=open_artifact(dataset / "test").digest, **{"layout": "NCHW"} | options)(
            dataset / "test@16"
        )

    return damage


def other_shape(dataset: Path) -> None:
    images, labels = make(1)
    write_artifact(dataset / "test", images.reshape(60, 16, 4, 3), labels, CLASSES, SHA256)


RESIZED = "test@16: resized as PIL does"
BETWEEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no test split": (lambda d: shutil.rmtree(d / "test"), "small: splits", "test missing"),
    "an interrupted preparation": (lambda d: (d / ".train@32.ab.tmp").mkdir(), "small: splits", "interrupted"),
    "test is train": (copy_train, "test: fits train", "test is a copy of train"),
    "other classes": (lambda d: change_meta(d / "test", classes=["a", "b", "d"]), "test: fits train", "other classes"),
    "another shape": (other_shape, "test: fits train", "[16, 4, 3] is another shape than train's"),
    "other labels at 16 pixels": (resize_wrongly(lambda x, y: (x, np.roll(y, 1))), RESIZED, "was not made from"),
    "other pixels at 16": (resize_wrongly(lambda x, y: (x ^ 4, y)), RESIZED, "differs from PIL's resize by 4 levels"),
    "pixels instead of planes": (
        resize_wrongly(lambda x, y: (x.transpose(0, 2, 3, 1), y), layout="NHWC"),
        "test@16: shape and layout",
        "NHWC [60, 16, 16, 3] is not what test@16 must hold",
    ),
    "another native split": (
        lambda d: write_artifact(d / "test", *make(7), CLASSES, SHA256),
        RESIZED,
        "was not made from",
    ),
}
BETWEEN |= {
    name: (lambda d, break_it=break_it: break_it(d / "train"), f"train: {check}", reason)
    for name, (break_it, check, reason) in DAMAGES.items()
}


@pytest.mark.parametrize("damage", BETWEEN)
def test_damage_to_a_split_and_splits_that_do_not_fit_together_are_found_and_named(dataset: Path, damage: str) -> None:
    break_it, check, reason = BETWEEN[damage]
    break_it(dataset)
    assert reason in failures(dataset)[check]


def test_the_whole_of_cifar_must_have_equally_many_images_of_each_class(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10_000, 1, 1, 3), dtype=np.uint8) | 1
    labels = np.arange(10_000) % 10
    folder = tmp_path / "cifar10" / "test"
    write_artifact(folder, images, labels, list("0123456789"), SHA256)
    assert failures(folder) == {}
    write_artifact(folder, images, with_one(labels, 0, 9), list("0123456789"), SHA256)
    assert "999 to 1,001 samples of a class" in failures(folder)["test: class balance"]


def test_a_sample_reads_some_blocks_and_full_reads_all(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_a_bit(dataset / "train")  # in the last of six blocks
    assert verify_data.main([str(dataset / "train"), "--sample", "1"]) == 0
    assert "1 of 6 blocks of images" in capsys.readouterr().out
    assert verify_data.main([str(dataset / "train"), "--sample", "2"]) == 1
    assert verify_data.main([str(dataset / "train"), "--full"]) == 1


def test_json_holds_every_check(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(dataset / "train")
    assert verify_data.main([str(dataset), "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)
    failed = [check for check in checks if not check["ok"]]
    assert failed[0]["name"] == "images header and length"
    assert failed[0]["where"] == str(dataset / "train")
    assert {tuple(check) for check in checks} == {("where", "name", "ok", "detail")}
    assert all(check["detail"] == verify_data.AFTER for check in failed[1:] if check["where"] == failed[0]["where"])


def test_a_folder_that_is_not_there_fails_and_a_dataset_that_runs_have_used_is_sound(tmp_path: Path) -> None:
    assert "there is no such folder" in failures(tmp_path / "nowhere")["nowhere: folder"]
    folder = ensure_artifacts(tmp_path, "regression")
    (folder / "partitions").mkdir()
    assert failures(folder) == {}
