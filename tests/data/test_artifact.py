"""Artifacts are written whole or not at all, and what was cut off goes on behind its last good block."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flapp.data import blocks
from flapp.data.artifact import DataError, open_artifact, write_artifact, write_rows

CLASSES = ["a", "b", "c"]
BLOCK = 1000  # bytes: five images of 8x8x3


class CutOffError(Exception):
    """Stands for a kill: nothing in the writer handles it."""


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder by its path, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def arrays(monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Return 23 images in blocks of five, and their labels."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK)
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (23, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, 23)


def write_until(folder: Path, images: np.ndarray, labels: np.ndarray, block: int | None = None) -> list[int]:
    """Write an artifact, cut off before `block`; return where each block that was read began."""
    begun: list[int] = []

    def read(start: int, stop: int) -> np.ndarray:
        if block is not None and start == block * 5:
            raise CutOffError
        begun.append(start)
        return images[start:stop]

    write_rows(folder, read, images.shape, labels, CLASSES, "source")
    return begun


def tear_images(partial: Path) -> None:
    with (partial / "images.npy").open("ab") as file:
        file.write(b"half a block")


def flip_in_second_block(partial: Path) -> None:
    content = bytearray((partial / "images.npy").read_bytes())
    content[128 + 5 * 192 + 7] ^= 1
    (partial / "images.npy").write_bytes(content)


def lose_the_last_bytes(partial: Path) -> None:
    os.truncate(partial / "images.npy", (partial / "images.npy").stat().st_size - 100)


def tear_journal(partial: Path) -> None:
    os.truncate(partial / "journal", (partial / "journal").stat().st_size - 30)


def lose_journal(partial: Path) -> None:
    (partial / "journal").unlink()


@pytest.mark.parametrize("block", [0, 1, 3, 4])
def test_a_preparation_cut_off_reads_only_what_is_missing_and_ends_in_the_same_bytes(
    tmp_path: Path, arrays: tuple[np.ndarray, np.ndarray], block: int
) -> None:
    write_artifact(tmp_path / "whole", *arrays, CLASSES, "source")
    with pytest.raises(CutOffError):
        write_until(tmp_path / "cut", *arrays, block)
    assert not (tmp_path / "cut").exists()
    assert write_until(tmp_path / "cut", *arrays) == list(range(block * 5, 23, 5))
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


@pytest.mark.parametrize(
    ("damage", "first"),
    [(tear_images, 3), (flip_in_second_block, 1), (lose_the_last_bytes, 2), (tear_journal, 2), (lose_journal, 0)],
)
def test_blocks_that_a_crash_damaged_are_written_again(
    tmp_path: Path, arrays: tuple[np.ndarray, np.ndarray], damage: Callable[[Path], None], first: int
) -> None:
    write_artifact(tmp_path / "whole", *arrays, CLASSES, "source")
    with pytest.raises(CutOffError):
        write_until(tmp_path / "cut", *arrays, 3)
    damage(tmp_path / "cut.tmp")
    assert write_until(tmp_path / "cut", *arrays)[0] == first * 5
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_what_another_preparation_left_is_not_gone_on_with(
    tmp_path: Path, arrays: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = arrays
    with pytest.raises(CutOffError):
        write_until(tmp_path / "split", images, labels, 3)
    assert write_until(tmp_path / "split", 255 - images, labels[::-1])[0] == 0
    assert np.array_equal(open_artifact(tmp_path / "split", verify=True).images, 255 - images)


def test_what_is_replaced_stays_until_the_new_one_is_whole(
    tmp_path: Path, arrays: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = arrays
    write_until(tmp_path / "split", images, labels)
    with pytest.raises(CutOffError):
        write_until(tmp_path / "split", 255 - images, labels, 4)
    assert np.array_equal(open_artifact(tmp_path / "split", verify=True).images, images)
    write_until(tmp_path / "split", 255 - images, labels)
    assert np.array_equal(open_artifact(tmp_path / "split", verify=True).images, 255 - images)
    assert [path.name for path in tmp_path.iterdir()] == ["split"]


def test_progress_counts_every_image_once_also_those_of_an_earlier_try(
    tmp_path: Path, arrays: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = arrays
    with pytest.raises(CutOffError):
        write_until(tmp_path / "split", images, labels, 2)
    counted: list[int] = []
    write_rows(
        tmp_path / "split",
        lambda a, b: images[a:b],
        images.shape,
        labels,
        CLASSES,
        "source",
        progress=counted.append,
    )
    assert counted == [10, 5, 5, 3]


def test_a_disk_without_room_is_found_out_before_anything_is_written(
    tmp_path: Path, arrays: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=8000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"split needs 8,696 bytes and its disk has 8,000 free: make room") as caught:
        write_until(tmp_path / "split", *arrays)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_is_said_in_one_line(tmp_path: Path, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    def fail(start: int, stop: int) -> np.ndarray:
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"split cannot be written \(No space left on device\)"):
        write_rows(tmp_path / "split", fail, arrays[0].shape, arrays[1], CLASSES, "source")


def test_the_layout_of_materialised_images_is_kept_and_that_of_others_is_nhwc(
    tmp_path: Path, arrays: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = arrays
    write_artifact(tmp_path / "planes", images.transpose(0, 3, 1, 2), labels, CLASSES, "source", layout="NCHW")
    write_artifact(tmp_path / "pixels", images, labels, CLASSES, "source")
    planes, pixels = (open_artifact(tmp_path / name, verify=True) for name in ("planes", "pixels"))
    assert (planes.layout, pixels.layout) == ("NCHW", "NHWC")
    assert np.array_equal(planes.images.transpose(0, 2, 3, 1), pixels.images)
    assert '"layout"' not in (tmp_path / "pixels" / "meta.json").read_text()
    with pytest.raises(DataError, match="has layout 'HWC': it must be one of NHWC, NCHW"):
        write_artifact(tmp_path / "other", images, labels, CLASSES, "source", layout="HWC")


def test_the_arrays_are_the_bytes_that_numpy_itself_saves(
    tmp_path: Path, arrays: tuple[np.ndarray, np.ndarray]
) -> None:
    write_artifact(tmp_path / "split", *arrays, CLASSES, "source")
    for name, array in zip(("images", "labels"), arrays, strict=True):
        np.save(tmp_path / "numpys.npy", array)
        assert (tmp_path / "split" / f"{name}.npy").read_bytes() == (tmp_path / "numpys.npy").read_bytes()


def test_a_file_longer_than_its_array_is_refused(tmp_path: Path, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    write_artifact(tmp_path / "split", *arrays, CLASSES, "source")
    with (tmp_path / "split" / "images.npy").open("ab") as file:
        file.write(bytes(23 * 192))
    with pytest.raises(DataError, match="4,416 bytes behind its array"):
        open_artifact(tmp_path / "split")
