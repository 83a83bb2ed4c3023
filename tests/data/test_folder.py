"""Images in folders: classes and order come from names as bytes, splits from a rule, and errors name path and fix."""

import os
import random
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from flapp.data.artifact import DataError
from flapp.data.decode import MOST_BYTES
from flapp.data.folder import open_folder
from tests.support.refusals import refused


def write(root: Path, *paths: str) -> Path:
    """Write files that hold their own path, and return the folder."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(os.fsencode(path))
    return root


def names(root: Path, split: str = "train", fraction: float = 0.2, seed: int = 0) -> list[str]:
    """Return the images of a split, relative to the source."""
    found = open_folder(root, fraction, seed)[0][split]
    return [os.path.relpath(found.name(row), root) for row in range(len(found.labels))]


def test_classes_and_images_are_ordered_by_the_bytes_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = ["Zebra/b.jpg", "Zebra/a.jpg", "ant/10.jpg", "ant/9.jpg", "ant/deep/er/x.jpg", "ant/deep.jpg", "été/é.png"]
    root = write(tmp_path, *(f"train/{path}" for path in train), "test/ant/1.jpg", "test/Zebra/1.jpg")
    raw, classes = open_folder(root, 0.2, 0)
    assert classes == ["Zebra", "ant", "été"]
    order = ["Zebra/a.jpg", "Zebra/b.jpg", "ant/10.jpg", "ant/9.jpg", "ant/deep/er/x.jpg", "ant/deep.jpg", "été/é.png"]
    assert names(root) == [f"train/{path}" for path in order]
    assert raw["train"].labels.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert (raw["test"].labels.tolist(), raw["test"].labels.dtype) == ([0, 1], np.int64)
    assert list(raw["train"].images()) == [f"train/{path}".encode() for path in order]
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: nullcontext(sorted(real(path), key=lambda _: random.random())))
    for _ in range(5):
        assert open_folder(root, 0.2, 0)[0]["train"].sha256 == raw["train"].sha256


def test_what_systems_leave_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    left = (".hidden/x.jpg", "a/.DS_Store", "a/Thumbs.db", "b/desktop.ini", "__MACOSX/a/1.jpg", ".gitignore")
    root = write(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg", *left, "LICENSE.txt", "labels.csv")
    assert sorted(names(root, fraction=0.5) + names(root, "test", 0.5)) == ["a/1.jpg", "a/2.jpg", "b/1.jpg"]


@pytest.mark.parametrize(
    "splits",
    [("train", "test"), ("train", "val"), ("Train", "Validation"), ("training", "testing"), ("TRAIN", "valid")],
)
def test_splits_have_several_names(tmp_path: Path, splits: tuple[str, str]) -> None:
    root = write(tmp_path, *(f"{split}/{name}/1.jpg" for split in splits for name in "ab"))
    assert names(root, "test") == [f"{splits[1]}/a/1.jpg", f"{splits[1]}/b/1.jpg"]


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(10, 0.2, 2), (10, 0.25, 3), (7, 0.2, 1), (8, 0.2, 2), (2, 0.2, 0), (3, 0.2, 1), (1, 0.9, 0), (4, 0.99, 3)],
)
def test_a_share_of_each_class_becomes_the_tests(tmp_path: Path, count: int, fraction: float, expected: int) -> None:
    root = write(tmp_path, *(f"a/{n}.jpg" for n in range(20)), *(f"b/{n:03d}.jpg" for n in range(count)))
    train, test = ([name for name in names(root, split, fraction) if name[0] == "b"] for split in ("train", "test"))
    assert len(test) == expected
    assert sorted(train + test) == [f"b/{n:03d}.jpg" for n in range(count)]
    assert (train, test) == (sorted(train), sorted(test))


def test_the_draw_of_a_class_depends_on_the_seed_and_its_own_images_only(tmp_path: Path) -> None:
    root = write(tmp_path, *(f"{name}/{n:02d}.jpg" for name in "bc" for n in range(50)))
    first = {name for name in names(root, "test") if name[0] == "b"}
    assert first != {name for name in names(root, "test", seed=1) if name[0] == "b"}
    assert {name[1:] for name in names(root, "test") if name[0] == "c"} != {name[1:] for name in first}
    write(root, *(f"a/{n}.jpg" for n in range(9)))
    assert {name for name in names(root, "test") if name[0] == "b"} == first


def test_the_digest_covers_names_contents_and_the_split(tmp_path: Path) -> None:
    root = write(tmp_path, *(f"{name}/{n}.jpg" for name in "ab" for n in range(10)))

    def digests(seed: int = 0) -> tuple[str, str]:
        raw, _ = open_folder(root, 0.2, seed)
        return raw["train"].sha256, raw["test"].sha256

    before = digests()
    os.utime(root / "a/1.jpg", (0, 0))
    assert digests() == before
    assert not set(digests(1)) & set(before)
    content = (root / "a/1.jpg").read_text()
    (root / "a/1.jpg").write_text(content[::-1])
    assert digests() != before
    (root / "a/1.jpg").write_text(content)
    assert digests() == before
    (root / "a/1.jpg").rename(root / "a/10.jpg")
    assert digests() != before
    moved = root.rename(tmp_path.with_name(f"{tmp_path.name} moved"))
    moved.joinpath("a/10.jpg").rename(moved / "a/1.jpg")
    raw, _ = open_folder(moved, 0.2, 0)
    assert (raw["train"].sha256, raw["test"].sha256) == before


def linked(root: Path, path: str, target: Path | str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).symlink_to(target)


def test_a_link_to_an_image_of_the_source_is_followed(tmp_path: Path) -> None:
    root = write(tmp_path / "real", "a/1.jpg", "b/1.jpg", "b/3.jpg", "b/4.jpg")
    linked(root, "a/2.jpg", "../b/1.jpg")
    linked(tmp_path, "source", root)
    raw, _ = open_folder(tmp_path / "source", 0.3, 0)
    assert b"b/1.jpg" in [*raw["train"].images(), *raw["test"].images()]
    assert len(raw["train"].labels) + len(raw["test"].labels) == 5


def test_a_file_that_cannot_be_read_is_reported_where_its_image_would_be(tmp_path: Path) -> None:
    root = write(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg")
    os.mkfifo(root / "train/a/pipe.jpg")
    with (root / "train/b/large.jpg").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    raw, _ = open_folder(root, 0.2, 0)
    assert list(raw["train"].images()) == [
        b"train/a/1.jpg",
        "it is not a regular file",
        b"train/b/1.jpg",
        "it has 268,435,457 bytes, at most 268,435,456 are expected",
    ]


def plant(root: Path, *entries: str) -> None:
    """Make a folder with files, folders ("name/") and links ("name->target")."""
    root.mkdir()
    for entry in entries:
        name, arrow, target = entry.partition("->")
        if arrow:
            linked(root, name, target)
        elif entry.endswith("/"):
            (root / entry).mkdir(parents=True)
        else:
            write(root, entry)


TWO, TRAIN = ("a/1.jpg", "b/1.jpg"), ("train/a/1.jpg", "train/b/1.jpg")
WRONG: list[tuple[tuple[str, ...], str]] = [  # what is in the source {}, beside a folder `other` with x.jpg
    ((), "{} is empty, and dataset.source must be a folder of images, a .parquet file or"),
    (("a/1.jpg",), "{} has one class, a: there must be a folder for each of two or more"),
    ((*TWO, "c/deep/"), "{}/c has no images: add some, or remove the folder"),
    ((*TWO, "x.JPG"), "{}/x.JPG is in no folder of a class: move it"),
    (("train/a/1.jpg", "train/x.png", "test/a/1.jpg"), "{}/train/x.png is in no folder of a class"),
    ((*TRAIN, "test/a/1.jpg", "test/c/1.jpg"), "{}/test/c is a class that {}/train lacks: add training images, or rem"),
    (TRAIN, "{} has train, but no folder test: set dataset.source={}/train to divide it by dataset.test_fraction, or"),
    (("val/a/1.jpg", "val/b/1.jpg"), "{} has val, but no folder train: set dataset.source={}/val to divide it"),
    (("train/a/", "test/a/", "val/a/"), "{}/test and {}/val are both taken for one split: keep one of them in {}"),
    (("train/a/1.jpg", "test/a/1.jpg", "planes/1.jpg"), "{}/planes is beside train, which is taken for a split: move "),
    ((*TRAIN, "test/"), "{}/test has no folders of classes"),
    (TWO, "dataset.test_fraction=0.2 of so few images gives no test image: raise it, or add images"),
    ((*TWO, "a/loop->../a"), "{}/a/loop is a link that does not lead to a file: remove it, or copy the folder there"),
    ((*TWO, "a/2.jpg->2.jpg"), "{}/a/2.jpg is a link that leads to nothing"),
    ((*TWO, "a/2.jpg->3.jpg"), "{}/a/2.jpg is a link that leads to nothing"),
    ((*TWO, "a/2.jpg->../../other/x.jpg"), "{}/a/2.jpg is a link out of {}: replace it by what it leads to"),
    ((*TWO, "c->../other"), "{}/c is a link out of {}: replace it by what it leads to"),
    ((*TWO, "c\nd\x1b[31m/1.jpg"), "{}/c\\nd\\x1b[31m has a name that is not printable text in UTF-8: rename the fold"),
    ((*TWO, os.fsdecode(b"caf\xe9/1.jpg")), "{}/caf\\udce9 has a name that is not printable text in UTF-8: rename the"),
]


@pytest.mark.parametrize(("entries", "said"), WRONG, ids=lambda value: repr(value)[:40])
def test_a_folder_that_is_not_as_it_must_be_is_refused(tmp_path: Path, entries: tuple[str, ...], said: str) -> None:
    source = tmp_path / "source"
    write(tmp_path, "other/x.jpg")
    plant(source, *entries)
    with refused(DataError, re.escape(said.replace("{}", str(source)))):
        open_folder(source, 0.2, 0)


def test_a_source_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with refused(DataError, rf"{tmp_path}/x cannot be read \(No such file or directory\): point dataset.source at"):
        open_folder(tmp_path / "x", 0.2, 0)
    write(tmp_path, "x")
    with refused(DataError, f"{tmp_path}/x is a file, and dataset.source must be a folder of images, a .parquet"):
        open_folder(tmp_path / "x", 0.2, 0)


def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, real = write(tmp_path, *TWO), os.scandir

    def scan(path: Path) -> object:
        if path == root / "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(DataError, match=f"{root}/b cannot be read \\(Permission denied\\): point dataset.source at"):
        open_folder(root, 0.2, 0)


def test_names_of_images_may_be_any_bytes(tmp_path: Path) -> None:
    root = write(tmp_path, "a/1.jpg", "a/2.jpg", os.fsdecode(b"b/\xff\n.jpg"))
    raw, _ = open_folder(root, 0.5, 0)
    assert list(raw["train"].images())[1] == b"b/\xff\n.jpg"
