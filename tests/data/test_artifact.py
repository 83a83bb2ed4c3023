"""Artifacts: written whole or not at all, compared with their hashes once, and never trusted further than these go."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from flapp.data import artifact as artifacts
from flapp.data.artifact import DataError, open_artifact, open_verified, write_artifact, write_rows
from flapp.data.offline import OfflineDataset
from tests.support.faults import die, killed
from tests.support.refusals import refused

CLASSES = ["a", "b", "c"]
Arrays = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def arrays(monkeypatch: pytest.MonkeyPatch) -> Arrays:
    """Return 23 images in blocks of five, and their labels."""
    monkeypatch.setattr(artifacts, "BLOCK_BYTES", 1000)
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (23, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, 23)


@pytest.fixture
def folder(tmp_path: Path, arrays: Arrays) -> Path:
    """Return an artifact of these arrays."""
    write_artifact(tmp_path / "train", *arrays, CLASSES, "source")
    return tmp_path / "train"


def test_an_artifact_is_the_bytes_that_numpy_saves_and_reads_back(folder: Path, arrays: Arrays) -> None:
    for name, array in zip(("images", "labels"), arrays, strict=True):
        np.save(folder.parent / "numpys.npy", array)
        assert (folder / f"{name}.npy").read_bytes() == (folder.parent / "numpys.npy").read_bytes()
    artifact = open_artifact(folder, verify=True)
    assert np.array_equal(artifact.images, arrays[0])
    assert (artifact.labels.tolist(), artifact.classes) == (arrays[1].tolist(), tuple(CLASSES))
    artifact.images[:] = 0  # never reaches the file
    assert open_artifact(folder, verify=True).images.any()


def test_the_digest_is_of_the_content_and_resized_images_have_their_own_layout(folder: Path, arrays: Arrays) -> None:
    images, labels = arrays
    write_artifact(folder.with_name("copy"), images, labels, CLASSES, "elsewhere")
    write_artifact(folder.with_name("rolled"), images, np.roll(labels, 1), CLASSES, "source")
    digests = [open_artifact(folder.with_name(name)).digest for name in ("train", "copy", "rolled")]
    assert digests[0] == digests[1] != digests[2]
    write_artifact(folder.with_name("planes"), images.transpose(0, 3, 1, 2), labels, CLASSES, "source", layout="NCHW")
    planes, pixels = open_artifact(folder.with_name("planes"), verify=True), open_artifact(folder)
    assert (planes.layout, pixels.layout) == ("NCHW", "NHWC")
    assert np.array_equal(planes.images.transpose(0, 2, 3, 1), pixels.images)
    assert '"layout"' not in (folder / "meta.json").read_text()


@pytest.mark.parametrize(
    ("error", "raised", "reason"),
    [
        (KeyboardInterrupt("ctrl-c"), KeyboardInterrupt, "ctrl-c"),
        (OSError(28, "No space left on device"), DataError, r"train cannot be written \(No space left on device\)"),
    ],
)
def test_what_is_replaced_stays_until_the_new_one_is_whole(
    folder: Path, arrays: Arrays, error: Exception, raised: type[BaseException], reason: str
) -> None:
    images, labels = arrays
    counted: list[int] = []

    def read(start: int, stop: int) -> np.ndarray:
        if start == 15:
            raise error
        return 255 - images[start:stop]

    with pytest.raises(raised, match=reason):
        write_rows(folder, read, images.shape, labels, CLASSES, "source", progress=counted.append)
    assert counted == [5, 5, 5]
    assert np.array_equal(open_artifact(folder, verify=True).images, images)
    write_artifact(folder, 255 - images, labels, CLASSES)
    assert np.array_equal(open_artifact(folder, verify=True).images, 255 - images)
    assert [path.name for path in folder.parent.iterdir()] == ["train"]


def test_a_killed_writer_leaves_nothing_that_its_successor_does_not_remove(folder: Path, arrays: Arrays) -> None:
    killed(lambda: write_rows(folder, die, arrays[0].shape, arrays[1], CLASSES, "source"))  # type: ignore[arg-type]
    assert len(list(folder.parent.iterdir())) == 2
    assert np.array_equal(open_artifact(folder, verify=True).images, arrays[0])
    write_artifact(folder, *arrays, CLASSES)
    assert [path.name for path in folder.parent.iterdir()] == ["train"]


def test_a_disk_without_room_is_noticed_first(tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=8000))
    with pytest.raises(DataError, match=r"split needs 8,696 bytes, .* 8,000 free: make room"):
        write_artifact(tmp_path / "split", *arrays, CLASSES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": np.zeros((3, 4, 4, 1), np.complex64)}, r"needs samples of one of .*, got samples complex64 \[3, 4"),
        ({"images": np.zeros((3, 4), ">i4")}, "got samples >i4 .* convert them with astype"),
        ({"images": np.zeros((3, 0), np.float32)}, r"not empty, got samples float32 \[3, 0\]"),
        ({"images": np.zeros(3, np.float32), "layout": "NCHW"}, "layout NCHW, only for images"),
        ({"images": np.float32(1)}, "needs samples .N, ....* equally many"),
        ({"labels": np.zeros((3, 2), np.int64)}, r"1 classes, so it needs labels int64 \[N\], got .* int64 \[3, 2\]"),
        ({"labels": np.zeros((3, 2)), "classes": []}, "needs labels float32 or int64, got .* float64"),
        ({"labels": np.zeros((3, 0), np.int64), "classes": []}, "not empty"),
        ({"labels": np.zeros(2, np.int64)}, "equally many"),
        ({"labels": np.array([0, 1, 2])}, "labels from 0 to 2, but 1 classes"),
        ({"labels": np.zeros(3, np.float32)}, "labels int64"),
        ({"layout": "HWC"}, "layout 'HWC': it must be one of NHWC, NCHW"),
    ],
)
def test_an_artifact_of_the_wrong_kind_is_not_written(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    right = {"images": np.zeros((3, 4, 4, 1), np.uint8), "labels": np.zeros(3, np.int64), "classes": ["a"]}
    with pytest.raises(DataError, match=reason):
        write_artifact(tmp_path / "x", **right | change)
    assert list(tmp_path.iterdir()) == []


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("images.npy", lambda content: content[:-100], r"images\.npy is damaged .*100 bytes too few"),
        ("images.npy", lambda content: content + bytes(4416), "4,416 bytes behind its array"),
        ("images.npy", flip, "block 4 has a different SHA-256"),
        ("labels.npy", lambda c: c[:128] + c[136:] + c[128:136], r"labels\.npy was changed or damaged .*block 0"),
        ("meta.json", lambda content: content.replace(b"true", b"false"), "is not a complete artifact"),
        ("meta.json", lambda content: b"[1", r"meta\.json is damaged"),
        ("meta.json", lambda content: content.replace(b"23", b"24"), r"holds uint8 \[23, 8, 8, 3\], its meta"),
    ],
)
def test_damage_is_named(folder: Path, name: str, change: Callable[[bytes], bytes], reason: str) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with refused(DataError, reason):
        open_artifact(folder, verify=True)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Return what is called whenever an artifact's array is hashed."""
    found = Mock(wraps=artifacts.damaged_blocks)
    monkeypatch.setattr(artifacts, "damaged_blocks", found)
    return found


@pytest.mark.parametrize("writable", [True, False])
def test_the_bytes_of_an_artifact_are_hashed_once_if_the_result_can_be_saved(
    folder: Path, hashed: Mock, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    if not writable:
        folder.with_name("train.verified.json").mkdir()  # stands for a folder in which no file can be made
    for process in range(3):
        monkeypatch.setattr(artifacts, "_compared", set())  # as a new process has it
        for _ in range(2):
            open_verified(folder)
        assert hashed.call_count == (2 if writable else 2 * (process + 1))


def test_an_artifact_whose_files_were_touched_is_compared_again(folder: Path, hashed: Mock) -> None:
    open_verified(folder)
    hashed.reset_mock()
    path = folder / "images.npy"
    facts, whole = path.stat(), path.read_bytes()
    path.write_bytes(flip(whole))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # same inode, size and time of writing
    for use in (open_verified, OfflineDataset):
        with pytest.raises(DataError, match=rf"{path} was changed or damaged .*: delete {folder} and prepare it again"):
            use(folder)
    path.write_bytes(whole)
    open_verified(folder)
    assert hashed.called


def test_a_note_cut_off_or_of_other_files_is_ignored(
    folder: Path, hashed: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_verified(folder)
    note = folder.with_name("train.verified.json")
    for text in ("", note.read_text()[:40], "[[1]]", note.read_text().replace("1", "2")):
        note.write_text(text)
        monkeypatch.setattr(artifacts, "_compared", set())
        hashed.reset_mock()
        open_verified(folder)
        assert hashed.called, text
