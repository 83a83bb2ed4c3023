"""Encoded pictures, and folders of them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def draw(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """Return pixels with smooth areas and edges, uint8 (height, width, channels)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 5, channels), dtype=np.uint8)
    planes = [Image.fromarray(small[..., n]).resize((width, height), Image.Resampling.BICUBIC) for n in range(channels)]
    pixels = np.stack([np.array(plane) for plane in planes], axis=-1)
    pixels[height // 3, : width // 2] = 255
    return pixels


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """Return an image as the bytes of a file."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_pictures(folder: Path, classes: Sequence[str], count: int) -> Path:
    """Write JPEGs of classes whose colours differ, of many sizes, and return the folder."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            rng = np.random.default_rng([label, number])
            height, width = rng.integers(20, 60, 2)
            pixels = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
            pixels[..., label % 3] += 60 + 30 * (label // 3)
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.jpg")
    return folder
