"""From stored uint8 pixels to model input: resize as PIL does, scale and normalise as torchvision does, augment."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

# Mean and standard deviation per channel of pixels in [0, 1]; `none` only scales to [0, 1].
NORMALIZATIONS: dict[str, tuple[Sequence[float], Sequence[float]] | None] = {
    "none": None,
    "half": ((0.5,), (0.5,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def resize(pixels: Tensor, size: int) -> Tensor:
    """Resize uint8 (n, C, H, W) of any strides to (n, C, size, size) by antialiased bilinear interpolation.

    On the CPU the bytes equal PIL's at the usual sizes (32, 48, 64, 96, 128, 160, 192, 224, 256, 384); elsewhere, and
    on other devices, a value may differ by a level or two.
    """
    count, channels, height, width = pixels.shape
    if (height, width) == (size, size):
        return pixels
    if pixels.device.type != "cpu":
        return _interpolate(pixels.float(), size, size).round_().clamp_(0, 255).to(torch.uint8)
    if size % 4:
        return _interpolate(pixels, size, size).contiguous()
    # As PIL does: first every row, then every column, rounding to uint8 in between. Turning channels-last into planes
    # between the two moves a fraction of the bytes that it would move at the end.
    rows = _interpolate(pixels, height, size).contiguous()
    # Columns do not care which pixels share a row. Four neighbours posing as the channels of one pixel take the
    # vectorised channels-last path, and leave the planes in place.
    quads = rows.view(count * channels, height, size // 4, 4).permute(0, 3, 1, 2)
    return _interpolate(quads, size, size // 4).permute(0, 2, 3, 1).reshape(count, channels, size, size)


def normalize(pixels: Tensor, normalization: str, out: Tensor | None = None, exact: bool = True) -> Tensor:
    """Scale uint8 (..., C, H, W) to [0, 1] and normalise, into float32 `out` (contiguous and new if None).

    exact gives torchvision's ToTensor and Normalize bit for bit; otherwise one multiplication and one addition a
    value do the same to within 1e-6, in two thirds of the time.
    """
    out = torch.empty(pixels.shape, device=pixels.device) if out is None else out
    out.copy_(pixels)
    if exact:
        out.div_(255)
        if statistics := _statistics(normalization, pixels.device):
            out.sub_(statistics[0]).div_(statistics[1])
        return out
    scale, shift = _scale_and_shift(normalization, pixels.device)
    # Not one fused call: the rounding of a fused multiply-add depends on where a vector ends.
    return out.mul_(scale).add_(shift)


def to_input(pixels: Tensor, normalization: str, image_size: int | None = None) -> Tensor:
    """Turn uint8 (n, C, H, W) into normalised float32 (n, C, image_size, image_size) on the device where it is.

    image_size None keeps the size. Equal to torchvision's pipeline bit for bit on the CPU.
    """
    return normalize(resize(pixels, image_size) if image_size else pixels, normalization)


def augment(pixels: Tensor, draws: Tensor) -> Tensor:
    """Shift each image of (n, C, H, W) and then mirror it, filling what it leaves with zeros; strides are kept.

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


def _interpolate(pixels: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)


@lru_cache
def _statistics(normalization: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation as (C or 1, 1, 1), or None if there is nothing to do."""
    if (statistics := NORMALIZATIONS[normalization]) is None:
        return None
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in statistics)
    return mean, std


@lru_cache
def _scale_and_shift(normalization: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what (x / 255 - mean) / std multiplies x by and adds, as float32 (C or 1, 1, 1)."""
    mean, std = NORMALIZATIONS[normalization] or ((0.0,), (1.0,))
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale.view(-1, 1, 1), shift.view(-1, 1, 1)
