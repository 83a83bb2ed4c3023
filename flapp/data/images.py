"""From stored uint8 pixels to model input: resize as PIL does, scale and normalize as torchvision does, augment.

`materialize` stores resized images, which takes disk space but saves the time to resize them at every step.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flapp.data.artifact import NORMALIZATIONS, DataError, open_artifact, resized_folder, write_rows, writing
from flapp.untrusted import open_npy

COMPARED = 64  # images that are compared with PIL
# F.interpolate on uint8 gives PIL's bytes for images of these sides (MNIST's, FEMNIST's, CIFAR's), except at these
# sizes. Elsewhere a value may differ by two levels, because PIL computes with longer fixed-point weights.
EXACT_SIDES, INEXACT_SIZES, MOST_LEVELS = (28, 32), (299, 336), 2


def check_normalization(name: str) -> None:
    """Raise DataError for a normalization that does not exist."""
    if name not in NORMALIZATIONS:
        raise DataError(f"normalization={name} is unknown: choose one of {', '.join(NORMALIZATIONS)}")


def resize(pixels: Tensor, size: int) -> Tensor:
    """Resize uint8 (n, C, H, W) of any strides to (n, C, size, size) by antialiased bilinear interpolation.

    On the CPU the bytes equal PIL's for square images of 28 or 32 pixels at the usual sizes (32, 48, 64, 96, 128, 160,
    192, 224, 256, 384). Otherwise, and on other devices, a value may differ by a level or two.
    """
    count, channels, height, width = pixels.shape
    if (height, width) == (size, size):
        return pixels
    if pixels.device.type != "cpu":
        return _interpolate(pixels.float(), size, size).round_().clamp_(0, 255).to(torch.uint8)
    if size % 4:
        return _interpolate(pixels, size, size).contiguous()
    # As PIL does: first every row, then every column, rounding to uint8 in between. Channels-last pixels become planes
    # between the two steps: when images grow, this moves fewer bytes than doing it at the end.
    rows = _interpolate(pixels, height, size).contiguous()
    # The columns are independent of each other. Four neighbours passed as the channels of one pixel take PyTorch's
    # vectorised channels-last path and stay where they are.
    quads = rows.view(count * channels, height, size // 4, 4).permute(0, 3, 1, 2)
    return _interpolate(quads, size, size // 4).permute(0, 2, 3, 1).reshape(count, channels, size, size)


def normalize(pixels: Tensor, normalization: str, out: Tensor | None = None, exact: bool = True) -> Tensor:
    """Scale uint8 (..., C, H, W) to [0, 1] and normalize, into float32 `out` (contiguous and new if None).

    exact gives the bits of torchvision's ToTensor and Normalize; otherwise one multiplication and one addition per
    value give the same to within 1e-6, in two thirds of the time.
    """
    out = torch.empty(pixels.shape, device=pixels.device) if out is None else out
    out.copy_(pixels)
    mean, std, scale, shift = _constants(normalization, pixels.device)
    if exact:
        return out.div_(255).sub_(mean).div_(std)
    # Not one fused call: the rounding of a fused multiply-add depends on where a vector ends.
    return out.mul_(scale).add_(shift)


def augment(pixels: Tensor, draws: Tensor) -> Tensor:
    """Shift each image of (n, C, H, W), filling the rest with zeros, and then mirror it; strides are kept.

    draws: int64 (n, 3) of flip (0 or 1), top and left (of any sign). Row y of the result is row y + top of the image,
    column x is column x + left, as in a crop from the padded image.
    """
    height, width = pixels.shape[-2:]
    changed = torch.zeros_like(pixels)
    for image, into, (flip, top, left) in zip(pixels, changed, draws.tolist(), strict=True):
        kept = image[:, max(top, 0) : height + min(top, 0), max(left, 0) : width + min(left, 0)]
        start = width - kept.shape[-1] - max(-left, 0) if flip else max(-left, 0)
        target = into[:, max(-top, 0) : max(-top, 0) + kept.shape[-2], start : start + kept.shape[-1]]
        target.copy_(kept.flip(-1) if flip else kept)
    return changed


def materialize(folder: Path, size: int, progress: Callable[[int], object] = lambda rows: None) -> Path:
    """Write the images in `folder`, resized to size x size, as the artifact `<folder>@<size>`, uint8 NCHW.

    Its source_sha256 is the digest of the artifact in `folder`. progress(n) is called for every n images written.
    Raises DataError when one of 64 images, spread over all, differs from PIL's by more than compare_with_pil allows.
    """
    native = open_artifact(folder, verify=True)
    if not native.has_images or native.layout != "NHWC":
        raise DataError(f"{folder} does not hold images that can be resized: name a split of images of original size")

    def read(start: int, stop: int) -> np.ndarray:
        return resize(torch.from_numpy(native.images[start:stop]).permute(0, 3, 1, 2), size).numpy()

    shape = (len(native.images), native.images.shape[3], size, size)
    target = resized_folder(folder, size)
    with writing(target) as partial:
        about = (shape, native.labels, native.classes, native.digest, "NCHW", progress)
        write_rows(target, read, *about, into=partial)
        compare_with_pil(native.images, open_npy(partial / "images.npy"), size)
    return target


def compare_with_pil(native: np.ndarray, resized: np.ndarray, size: int) -> int:
    """Compare up to 64 images, spread over native (N, H, W, C) and resized (N, C, size, size), with PIL's resize.

    Returns how many were compared. Raises DataError for the first that differs by more than rounding: MOST_LEVELS, or 0
    for EXACT_SIDES except at INEXACT_SIZES.
    """
    from PIL import Image

    count, height, width, channels = native.shape
    if resized.shape != (count, channels, size, size):
        raise DataError(f"resized images of shape {resized.shape} are not those of {native.shape} at {size} pixels")
    is_exact = height == width and height in EXACT_SIDES and size not in INEXACT_SIZES
    allowed = 0 if is_exact else MOST_LEVELS
    compared = np.unique(np.linspace(0, count - 1, COMPARED).astype(int)).tolist()
    for index, channel in product(compared, range(channels)):  # PIL takes a second channel for alpha
        image = Image.fromarray(np.ascontiguousarray(native[index, :, :, channel]))
        wanted = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).astype(np.int16)
        if (difference := int(np.abs(wanted - resized[index, channel]).max())) > allowed:
            found = f"image {index} at {size} pixels differs from PIL's resize by {difference} levels"
            fix = "leave dataset.materialize out, or use a torch build whose resize agrees with PIL"
            raise DataError(f"{found}, {allowed} are allowed: {fix}")
    return len(compared)


def _interpolate(pixels: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)


@lru_cache
def _constants(normalization: str, device: torch.device) -> tuple[Tensor, ...]:
    """Return mean, std, and scale, shift with x * scale + shift = (x / 255 - mean) / std, each (C or 1, 1, 1)."""
    mean, std = NORMALIZATIONS[normalization]
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return tuple(torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std, scale, shift))
