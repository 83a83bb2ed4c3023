"""Small artifacts for the tests of datasets and loaders, and the results that PIL and torchvision give for them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from flapp.data.artifact import open_artifact, write_artifact

COUNT = 37
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_split(folder: Path, images: np.ndarray, layout: str = "NHWC", source: str = "0" * 64) -> Path:
    labels = np.arange(len(images)) % 10
    write_artifact(folder, images, labels, [f"class {i}" for i in range(10)], source, layout=layout)
    return folder


def photographs(count: int = COUNT, channels: int = 3) -> np.ndarray:
    """Return images with flat areas, edges and noise, so that rounding and clipping both happen."""
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (count, 32, 32, channels), dtype=np.uint8)
    images[::3, :16] = 255
    images[1::3, :, 16:] = 0
    return images


def pil_resize(image: np.ndarray, size: int) -> np.ndarray:
    squeezed = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    return np.asarray(squeezed.resize((size, size), Image.Resampling.BILINEAR)).reshape(size, size, -1)


def torchvision_batch(images: np.ndarray, size: int, normalization: str = "imagenet") -> Tensor:
    statistics = (MEAN, STD) if normalization == "imagenet" else ((0.5,) * 3, (0.5,) * 3)
    steps = [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(*statistics)]
    pipeline = transforms.Compose(steps)
    return torch.stack([pipeline(Image.fromarray(image)) for image in images])


def write_resized(folder: Path, size: int, images: np.ndarray) -> Path:
    """Write the images resized by PIL beside `folder`, as tools.prepare_data does."""
    resized = np.stack([pil_resize(image, size) for image in images]).transpose(0, 3, 1, 2)
    return write_split(folder.with_name(f"{folder.name}@{size}"), resized, "NCHW", open_artifact(folder).digest)
