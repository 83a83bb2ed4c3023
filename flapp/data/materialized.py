"""Images resized once and stored, for those who would rather spend disk than time on it at every step."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from flapp.data.artifact import DataError, open_artifact, write_rows

COMPARED = 64  # images that are compared with PIL
# F.interpolate on uint8 equals PIL byte for byte, but at these sizes its rounding differs, by at most so many levels.
TOLERANCE = {299: 2, 336: 2}


def materialized_folder(folder: Path, size: int) -> Path:
    """Return where the split in `folder` is stored at size x size pixels."""
    return folder.with_name(f"{folder.name}@{size}")


def materialize(folder: Path, size: int, progress: Callable[[int], object] = lambda rows: None) -> Path:
    """Write the images in `folder`, resized to size x size, as the artifact `<folder>@<size>`, uint8 NCHW.

    Its source_sha256 is the digest of the artifact in `folder`. Goes on where an earlier call was cut off, and calls
    progress(n) for every n images on disk. Raises DataError when 64 of them are not what PIL makes of the same images.
    """
    native = open_artifact(folder, verify=True)
    if native.images.ndim != 4 or native.layout != "NHWC":
        raise DataError(f"{folder} holds no images at native resolution: materialize the split itself, as stored")

    def read(start: int, stop: int) -> np.ndarray:
        return resize(np.ascontiguousarray(native.images[start:stop].transpose(0, 3, 1, 2)), size)

    def inspect(resized: np.ndarray) -> None:
        compare_with_pil(native.images, resized, size)

    shape = (len(native.images), native.images.shape[3], size, size)
    target = materialized_folder(folder, size)
    write_rows(target, read, shape, native.labels, native.classes, native.digest, "NCHW", progress, inspect)
    return target


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 (n, C, H, W) to (n, C, size, size) by antialiased bilinear interpolation."""
    import torch
    from torch.nn import functional as F

    tensor = torch.from_numpy(pixels)
    return F.interpolate(tensor, (size, size), mode="bilinear", antialias=True).contiguous().numpy()


def compare_with_pil(native: np.ndarray, resized: np.ndarray, size: int) -> None:
    """Compare 64 images, spread over all of native (N, H, W, C) and resized (N, C, size, size), with PIL's resize.

    Raises DataError for the first that differs.
    """
    from PIL import Image

    if resized.shape != (len(native), native.shape[3], size, size):
        raise DataError(f"resized images of shape {resized.shape} are not those of {native.shape} at {size} pixels")
    allowed = TOLERANCE.get(size, 0)
    for index in np.unique(np.linspace(0, len(native) - 1, COMPARED).astype(int)):
        # Plane by plane, since PIL resizes each channel by itself and has no images of, say, two channels.
        for channel, plane in enumerate(resized[index]):
            image = Image.fromarray(np.ascontiguousarray(native[index, :, :, channel]))
            wanted = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).astype(np.int16)
            if (difference := int(np.abs(wanted - plane).max())) > allowed:
                raise DataError(
                    f"image {index} at {size} pixels differs from PIL's resize by {difference} levels, {allowed} are "
                    "allowed: leave dataset.materialize out, or use a torch build whose resize agrees with PIL"
                )
