"""Decoding: torchvision's pixels, whatever the file; what cannot be read is reported; the order and bytes are fixed."""

import errno
import io
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageSequence
from torchvision import transforms

from flapp.data import decode as decoding
from flapp.data.artifact import DataError
from flapp.data.decode import Decoded, Encoded, RawSplit, UnreadableError, decode, decode_splits
from tests.support.pictures import draw, encode


def split_of(*encoded: Encoded, clients: tuple[str, ...] = ()) -> RawSplit:
    return RawSplit("image {}".format, np.arange(len(encoded)), lambda: iter(encoded), "a source", clients)


def decoded(tmp_path: Path, *encoded: Encoded, shape: Any = None, skip: bool = False, workers: int = 2) -> Decoded:
    return decode_splits({"train": split_of(*encoded)}, shape, skip, tmp_path, workers=workers)[0]["train"]


def with_palette(transparent: bool) -> bytes:
    image = Image.fromarray(draw(50, 70)).quantize(16)
    return encode(image, transparency=bytes(range(0, 160, 10))) if transparent else encode(image)


FILES = {
    "JPEG": lambda: encode(draw(60, 45), "JPEG", quality=80),
    "progressive JPEG": lambda: encode(draw(61, 90), "JPEG", progressive=True),
    "grey JPEG": lambda: encode(draw(60, 45, channels=1)[..., 0], "JPEG"),
    "CMYK JPEG": lambda: encode(Image.fromarray(draw(40, 66)).convert("CMYK"), "JPEG"),
    "PNG": lambda: encode(draw(33, 80)),
    "RGBA": lambda: encode(draw(48, 48, channels=4)),
    "grey and alpha": lambda: encode(Image.fromarray(draw(50, 30, channels=4)).convert("LA")),
    "palette": lambda: with_palette(False),
    "palette with transparency": lambda: with_palette(True),
    "colour that is transparent": lambda: encode(draw(50, 30), transparency=(255, 255, 255)),
    "black and white": lambda: encode(Image.fromarray(draw(50, 30)).convert("1")),
    "WebP": lambda: encode(draw(60, 45), "WEBP"),
    "BMP": lambda: encode(draw(60, 45), "BMP"),
    "TIFF": lambda: encode(draw(60, 45), "TIFF", compression="tiff_lzw"),
    "GIF": lambda: encode(Image.fromarray(draw(60, 45)).quantize(), "GIF"),
    "smaller than the shape": lambda: encode(draw(7, 5)),
    "exactly the shape": lambda: encode(draw(32, 32)),
    "one line of pixels": lambda: encode(draw(1, 90)),
}


@pytest.mark.parametrize("side", [32, 45])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", FILES)
def test_pixels_are_those_of_torchvisions_resize_and_center_crop(kind: str, side: int, channels: int) -> None:
    encoded = FILES[kind]()
    usual = transforms.Compose([transforms.Resize(side, antialias=True), transforms.CenterCrop(side)])
    wanted = np.asarray(usual(Image.open(io.BytesIO(encoded)).convert("RGB" if channels == 3 else "L")))
    found = decode(encoded, (side, side, channels))
    assert isinstance(found, np.ndarray), found
    assert np.array_equal(found, wanted.reshape(side, side, channels))


@pytest.mark.parametrize("size", [(60, 45), (45, 60), (20, 200), (200, 20), (3, 4)])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (32, 32), (1, 9)])
def test_an_image_just_covers_any_shape_and_its_center_is_kept(size: tuple[int, int], shape: tuple[int, int]) -> None:
    image = Image.fromarray(draw(*size))
    scale = max(Fraction(shape[0], size[0]), Fraction(shape[1], size[1]))
    covering = tuple(int(scale * side) for side in size)
    usual = transforms.Compose([transforms.Resize(covering, antialias=True), transforms.CenterCrop(shape)])
    assert all(large >= side for large, side in zip(covering, shape, strict=True))
    assert any(large == side for large, side in zip(covering, shape, strict=True))
    assert np.array_equal(decode(encode(image), (*shape, 3)), np.asarray(usual(image)))


def test_16_bits_are_scaled_to_8_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 256 * 128, 65535 - 129, 65535 - 128, 65535]], dtype=np.uint16)
    wanted = np.round(values * (255 / 65535)).astype(np.uint8)
    for encoded in (encode(values), encode(values, "TIFF"), encode(Image.fromarray(values.astype(">u2")), "TIFF")):
        found = decoded(tmp_path, encoded)
        assert found.shape == (1, 8, 1)
        assert found.images[0, ..., 0].tolist() == wanted.tolist()


TURNS = {  # what an image of each EXIF orientation looks like, upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
    9: lambda a: a,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_is_turned_as_its_exif_says(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(draw(20, 33), kind, exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    if kind == "TIFF":  # PIL turns it by itself
        stored = draw(20, 33)
    found = decode(encoded, None)
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, TURNS[orientation](stored))


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.fromarray(draw(20, 20, seed)).quantize() for seed in range(3)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        encoded = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        image = Image.open(io.BytesIO(encoded))
        first = np.asarray(next(ImageSequence.Iterator(image)).convert("RGB"))
        assert getattr(image, "n_frames", 1) == 3
        assert np.array_equal(decode(encoded, (20, 20, 3)), first)


def png_that_claims(width: int, height: int) -> bytes:
    """Return a PNG whose header says a size, with hardly any data."""
    content = encode(draw(9, 9))
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


BAD = {
    "nothing": (lambda: b"", "it is empty"),
    "a text": (lambda: b"not an image\n" * 40, "not an image of a known format (JPEG, PNG, WEBP, BMP, GIF, TIFF)"),
    "another format": (lambda: encode(draw(9, 9), "PPM"), "it is not an image of a known format"),
    "a truncated JPEG": (lambda: encode(draw(200, 200), "JPEG")[:-2000], "truncated"),
    "a truncated PNG": (lambda: encode(draw(200, 200))[:-2000], "truncated"),
    "a header alone": (lambda: encode(draw(200, 200), "JPEG")[:100], ""),
    "a bomb of 2.5 billion pixels": (lambda: png_that_claims(50_000, 50_000), "pixels"),
    "a bomb of which PIL only warns": (lambda: png_that_claims(10_000, 10_000), "pixels"),
    "a line that becomes a bomb": (lambda: encode(np.zeros((1, 60_000), "u1")), "pixels of 60000x1 scaled to cover"),
    "floats": (lambda: encode(np.zeros((9, 9), "f4"), "TIFF"), "32 bits a pixel (mode F), whose range is unknown"),
    "32 bits": (lambda: encode(np.zeros((9, 9), "i4"), "TIFF"), "32 bits a pixel (mode I), whose range is unknown"),
    "what the source says": (lambda: "permission denied", "permission denied"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_reported_in_one_line(kind: str) -> None:
    make, said = BAD[kind]
    found = decode(make(), (64, 64, 3))
    assert isinstance(found, str)
    assert said in found
    assert "\n" not in found
    assert 0 < len(found) < 200


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_damage_of_a_file_is_an_error_or_pixels_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        whole = np.frombuffer(
            encode(Image.fromarray(draw(30, 30)).convert("P"), kind) if kind == "GIF" else encode(draw(30, 30), kind),
            np.uint8,
        )
        for _ in range(60):
            bad = whole.copy()
            bad[rng.integers(0, min(len(bad), 300), 4)] = rng.integers(0, 256, 4)
            assert isinstance(decode(bad.tobytes(), (16, 16, 3)), str | np.ndarray)


def test_every_unreadable_image_is_named_and_skipping_changes_no_other(tmp_path: Path) -> None:
    good = [encode(draw(20 + n, 30, n), "JPEG") for n in range(40)]
    mixed: list[Encoded] = list(good)
    mixed[7], mixed[20], mixed[39] = b"", good[20][:-300], "permission denied"
    with pytest.raises(UnreadableError) as caught:
        decoded(tmp_path, *mixed, shape=(16, 16, 3))
    assert [line.partition(" (")[0] for line in caught.value.lines] == ["image 7", "image 20", "image 39"]
    assert str(caught.value).startswith("3 of 40 images cannot be read, the first is image 7 (it is empty): repair")
    raw = {"train": split_of(*mixed, clients=tuple(f"client {n}" for n in range(40))), "test": split_of(*good[:3])}
    found, bad = decode_splits(raw, (16, 16, 3), True, tmp_path)
    assert len(bad) == 3
    kept = [n for n in range(40) if n not in (7, 20, 39)]
    assert found["train"].labels.tolist() == kept
    assert found["train"].clients == [f"client {n}" for n in kept]
    assert np.array_equal(found["train"].images, decoded(tmp_path, *good, shape=(16, 16, 3)).images[kept])
    assert len(found["test"].labels) == 3
    with pytest.raises(DataError, match="train: none of 2 images can be read: repair or replace them"):
        decoded(tmp_path, b"", b"x", skip=True)
    assert list(tmp_path.iterdir()) == []


def test_order_and_bytes_do_not_depend_on_how_many_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encode(draw(10 + n % 50, 12 + n % 7, n)) for n in range(300)]
    first = decoded(tmp_path, *images, shape=(12, 12, 3), workers=1)
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 5000)
    assert np.array_equal(first.images[5:8], first.read_rows(5, 8))
    for workers in (2, 5):
        assert np.array_equal(first.images, decoded(tmp_path, *images, shape=(12, 12, 3), workers=workers).images)


def test_few_images_are_read_ahead_and_large_ones_decoded_singly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, ahead, at_once, counts = [encode(draw(40, 40, n)) for n in range(60)], [0], [0], threading.Lock()
    read = done = inside = 0

    def read_each() -> Iterator[bytes]:
        nonlocal read
        for image in images:
            read += 1
            ahead.append(read - done)
            yield image

    def progress(count: int) -> None:
        nonlocal done
        done += count

    def slowly(image: Image.Image, shape: Any) -> np.ndarray:
        nonlocal inside
        with counts:
            inside += 1
            at_once.append(inside)
        time.sleep(0.002)
        with counts:
            inside -= 1
        return np.zeros(shape, np.uint8)

    monkeypatch.setattr(decoding, "to_shape", slowly)
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 1000)
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 2 * (len(images[0]) + 16 * 16 * 3))
    split = RawSplit(str, np.zeros(60, np.int64), read_each, "")
    decode_splits({"train": split}, (16, 16, 3), False, tmp_path, progress, workers=3)
    assert (done, max(at_once)) == (60, 1)
    assert max(ahead) <= 2 * 3 * 3  # of six jobs, each of about two images
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 5000)
    read = done = 0
    decode_splits({"train": split}, (16, 16, 3), False, tmp_path, progress, workers=3)
    assert max(at_once) > 1


def test_without_a_shape_images_of_one_size_stay_as_they_are(tmp_path: Path) -> None:
    grey, colour = draw(20, 30, channels=1)[..., 0], draw(20, 30)
    found = decoded(tmp_path, encode(grey), encode(Image.fromarray(grey).convert("LA")))
    assert found.shape == (20, 30, 1)
    assert np.array_equal(found.images[0, ..., 0], grey)
    found = decoded(tmp_path, encode(grey), encode(colour))
    assert found.shape == (20, 30, 3)
    assert np.array_equal(found.images, np.stack([np.stack([grey] * 3, -1), colour]))
    raw = {"train": split_of(encode(grey)), "test": split_of(encode(colour))}
    assert decode_splits(raw, None, False, tmp_path)[0]["train"].shape == (20, 30, 3)
    with pytest.raises(DataError) as caught:
        decoded(tmp_path, encode(grey), encode(grey), encode(draw(30, 20)))
    assert str(caught.value) == (
        "image 0 has 20x30 pixels (height x width) and image 2 has 30x20: add the shape that all shall have, "
        "such as dataset.shape=[224,224,3]"
    )


@pytest.mark.parametrize("shape", [(32,), (32, 32), (32, 32, 4), (3, 32, 32)])
def test_a_shape_that_no_image_has_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"is not of images: give \[height,width,1\] or \[height,width,3\]"):
        decoded(tmp_path, encode(draw(9, 9)), shape=shape)


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="bytes free|free: make room"):
        decoded(tmp_path, encode(draw(9, 9)), shape=(1 << 24, 1 << 24, 3))
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(decoding.tempfile, "TemporaryFile", full)
    with pytest.raises(DataError, match=f"{tmp_path} cannot hold the decoded images \\(No space left on device\\)"):
        decoded(tmp_path, encode(draw(9, 9)), shape=(4, 4, 3))
