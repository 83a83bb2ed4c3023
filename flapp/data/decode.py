"""From encoded images (JPEG, PNG and others) to uint8 pixels of one shape, in parallel and in bounded memory.

A source of images, such as a folder or parquet files, says what it holds as a RawSplit. `decode_splits` decodes all of
it into temporary files without names, from which artifacts and shards are written.
"""

import io
import os
import struct
import tempfile
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from flapp.data.artifact import DataError, check_space
from flapp.untrusted import printable, read_bytes

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MOST_BYTES = 256 << 20  # of an encoded image
MOST_PIXELS = 89_478_485  # of an image, before and after it is resized; PIL warns of more, and refuses twice as many
LARGE_PIXELS = 1 << 24  # of images with more, only one is decoded at a time
BLOCK_BYTES = 4 << 20  # of images, encoded and decoded together, in one job
MOST_BLOCK = 256  # images that one job takes
GREY = ("1", "L", "LA", "I", "F")  # grey modes; modes that begin with 'I;' are grey, too
ORIENTATION = 0x0112  # the tag of EXIF
_PIL_ERRORS = (  # what PIL raises for files that are damaged, hostile or no images
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError),
    *(struct.error, zlib.error, MemoryError, RuntimeError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)

Encoded = bytes | str  # an encoded image, or a text that says why there is none
Pixels = np.ndarray | str  # uint8 (H, W, C), or a text that says why an image cannot be read

_large = Lock()


@dataclass(frozen=True)
class RawSplit:
    """The images of one split of a source, before they are decoded.

    name(i): what a message calls image i: its path, or a parquet file and row. labels: int64 (N,). images() reads the
    encoded images anew, one after the other, in one thread. sha256: names the source of the split. clients: the client
    of each sample, empty if the source names none.
    """

    name: Callable[[int], str]
    labels: np.ndarray
    images: Callable[[], Iterator[Encoded]]
    sha256: str
    clients: Sequence[str] = ()


@dataclass(frozen=True)
class Decoded:
    """A decoded split: memory-mapped pixels uint8 (N, H, W, C), with labels and clients of the same N samples.

    The pixels are in a temporary file, which is gone when the array is, or in the source's own images.npy.
    """

    images: np.ndarray
    labels: np.ndarray
    clients: Sequence[str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return height, width and channels."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Return the pixels of a range of samples; `images` takes any index."""
        return self.images[start:stop]


class UnreadableError(DataError):
    """Some images cannot be read; `lines` names each of them and says why."""

    def __init__(self, lines: Sequence[str], total: int) -> None:
        fix = "repair or remove them, or add dataset.skip_unreadable=true"
        super().__init__(f"{len(lines):,} of {total:,} images cannot be read, the first is {lines[0]}: {fix}")
        self.lines = lines


def decode_splits(
    raw: Mapping[str, RawSplit],
    shape: Sequence[int] | None,
    skip_unreadable: bool,
    scratch: Path,
    progress: Callable[[int], object] = lambda images: None,
    workers: int | None = None,
) -> tuple[dict[str, Decoded], list[str]]:
    """Decode all splits of a source into temporary files in the folder `scratch`.

    shape: (H, W, C) that images are scaled, cropped and converted to. None takes images as they are, if all have one
    size; then C is 1 if all are grey, and otherwise 3. Returns the splits, without images that cannot be read, and a
    line on each of those. The result does not depend on the number of workers. Raises UnreadableError if there are such
    images and not skip_unreadable, and DataError for a split without images, for images of several sizes if shape is
    None, and for a full disk. progress(n) is called for every n images.
    """
    if shape is not None and (len(shape) != 3 or shape[2] not in (1, 3)):
        raise DataError(f"dataset.shape={list(shape)} is not of images: give [height,width,1] or [height,width,3]")
    total = sum(len(split.labels) for split in raw.values())
    if shape is not None:
        check_space(scratch / "images", total * int(np.prod(shape)))
    scratch.mkdir(parents=True, exist_ok=True)
    shapes, bad, kept = dict[tuple[int, ...], str](), list[str](), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, about metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for name, split in raw.items():
            images = _decode_all(split, shape, workers or count_cores(), progress)
            kept[name] = _store(split, images, shapes if shape is None else None, bad, scratch)
    if bad and not skip_unreadable:
        raise UnreadableError(bad, total)
    if empty := [name for name, (_, rows) in kept.items() if not rows]:
        raise DataError(f"{empty[0]}: none of {len(raw[empty[0]].labels):,} images can be read: repair or replace them")
    size = tuple(shape) if shape is not None else (*next(iter(shapes))[:2], 3)
    channels = size[2] if shape is not None else max(found[2] for found in shapes)
    decoded = {}
    for name, (file, rows) in kept.items():
        pixels = np.memmap(file, np.uint8, "r", shape=(len(rows), *size))[..., :channels]
        clients = [raw[name].clients[row] for row in rows] if raw[name].clients else ()
        decoded[name] = Decoded(pixels, raw[name].labels[rows], clients)
    return decoded, bad


def read_image(path: Path) -> Encoded:
    """Return the content of an image's file, or why it cannot be read."""
    try:
        return read_bytes(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)


def decode(encoded: Encoded, shape: Sequence[int] | None) -> Pixels:
    """Decode one image, turned as its EXIF says, to uint8 (H, W, C), or say why it cannot be read.

    shape: (H, W, C), by `to_shape`. None keeps the size, and C is 1 for a grey image and 3 for others.
    """
    if isinstance(encoded, str):
        return encoded
    if not encoded:
        return "it is empty"
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            large = _check_pixels(*image.size) > LARGE_PIXELS
            with _large if large else nullcontext():
                image.load()  # some formats have their EXIF behind the pixels
                turned = image.getexif().get(ORIENTATION, 1) != 1
                upright = ImageOps.exif_transpose(image) if turned else image
                return to_shape(upright, shape)
    except UnidentifiedImageError:
        return f"it is not an image of a known format ({', '.join(FORMATS)})"
    except _PIL_ERRORS as error:
        return printable(" ".join(str(error).split()) or type(error).__name__, 120)


def to_shape(image: Image.Image, shape: Sequence[int] | None) -> np.ndarray:
    """Return the pixels of an image as uint8 (H, W, C).

    Scales the image by antialiased bilinear interpolation so that it just covers H x W, and crops the center: the bytes
    of torchvision's Resize(H) and CenterCrop(H) where H = W. Conversion comes first. It is that of PIL's convert: alpha
    is dropped, so that the colours beneath show, and grey is 0.299 R + 0.587 G + 0.114 B (ITU-R 601). 16 bits become 8
    by value / 257, rounded. Raises ValueError for pixels of other depths.
    """
    grey = image.mode in GREY or image.mode.startswith("I;") if shape is None else shape[2] == 1
    image = _convert(image, "L" if grey else "RGB")
    if shape is not None:
        height, width = shape[:2]
        w, h = image.size
        # As torchvision computes the longer side, which differs from rounding.
        size = (width, int(width * h / w)) if width * h >= height * w else (int(height * w / h), height)
        if size != image.size:
            _check_pixels(*size, f" of {w}x{h} scaled to cover {width}x{height}")
            image = image.resize(size, Image.Resampling.BILINEAR)
        if size != (width, height):
            top, left = round((size[1] - height) / 2), round((size[0] - width) / 2)
            image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image)
    return pixels[..., None] if grey else pixels


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _note_shape(shapes: dict[tuple[int, ...], str], pixels: np.ndarray, split: RawSplit, row: int) -> None:
    """Add the shape of an image and its name; raises DataError if its size is not that of the images before."""
    if pixels.shape not in shapes:
        name = shapes[pixels.shape] = split.name(row)
        (first, first_name), *_ = shapes.items()
        if first[:2] != pixels.shape[:2]:
            raise DataError(
                f"{first_name} has {first[0]}x{first[1]} pixels (height x width) and {name} has {pixels.shape[0]}x"
                f"{pixels.shape[1]}: add the shape that all shall have, such as dataset.shape=[224,224,3]"
            )


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Return an image of mode L or RGB."""
    if image.mode in ("I", "F"):
        raise ValueError(f"it has 32 bits a pixel (mode {image.mode}), whose range is unknown: save it with 8 or 16")
    if image.mode.startswith("I;"):
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # PIL warns of some palettes with transparency without this step
    return image if image.mode == mode else image.convert(mode)


def _check_pixels(width: int, height: int, what: str = "") -> int:
    """Return the number of pixels; raises ValueError if they are too many."""
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width}x{height} pixels{what} are too many, at most {MOST_PIXELS:,} are allowed")
    return width * height


def _decode_all(
    split: RawSplit, shape: Sequence[int] | None, workers: int, progress: Callable[[int], object]
) -> Iterator[Pixels]:
    """Decode the images of a split in threads and yield them in their order; PIL decodes without the GIL.

    To bound the memory, a job takes images of about BLOCK_BYTES, encoded and decoded, and each worker has two jobs.
    """

    def decode_block(encoded: Sequence[Encoded]) -> list[Pixels]:
        return [decode(each, shape) for each in encoded]

    pending: deque[Future[list[Pixels]]] = deque()
    images, total, start, count = split.images(), len(split.labels), 0, 1
    decoded = int(np.prod(shape)) if shape else 0
    pool = ThreadPoolExecutor(workers)
    try:
        while start < total or pending:
            if start < total and len(pending) < 2 * workers:
                encoded = list(islice(images, count))
                if not encoded:
                    raise DataError(f"{split.name(start)} is gone, the source changed while it was read: start again")
                pending.append(pool.submit(decode_block, encoded))
                each = sum(map(len, encoded)) // len(encoded) + decoded
                start, count = start + len(encoded), min(2 * count, MOST_BLOCK, max(1, BLOCK_BYTES // max(1, each)))
                continue
            block = pending.popleft().result()
            decoded = max([decoded, *(pixels.nbytes for pixels in block if isinstance(pixels, np.ndarray))])
            yield from block
            progress(len(block))
    finally:
        pool.shutdown(cancel_futures=True)


def _store(
    split: RawSplit, images: Iterator[Pixels], shapes: dict[tuple[int, ...], str] | None, bad: list[str], scratch: Path
) -> tuple[IO[bytes], list[int]]:
    """Write all readable images to a file without a name; return the file, and the rows of these images in the split.

    With `shapes`, which names the first image of each shape, they must have one size, and are stored with three
    channels. `bad` gets a line on each other image.
    """
    rows = []
    try:
        # It stays open while its pixels are used. The large buffer saves writes, which wait for the decoding threads.
        file = tempfile.TemporaryFile(dir=scratch, buffering=BLOCK_BYTES)  # noqa: SIM115
        for row, pixels in enumerate(images):
            if isinstance(pixels, str):
                bad.append(f"{printable(split.name(row))} ({pixels})")
                continue
            if shapes is not None:
                _note_shape(shapes, pixels, split, row)
                pixels = pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels
            rows.append(row)
            file.write(np.ascontiguousarray(pixels).data)
        file.flush()
    except OSError as error:
        raise DataError(f"{scratch} cannot hold the decoded images ({error.strerror}): make room there") from error
    return file, rows
