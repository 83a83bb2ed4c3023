"""Datasets over artifacts, and the loader that a client trains from."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flapp.data.artifact import Artifact, open_artifact

# Mean and standard deviation per channel of pixels in [0, 1]; `none` leaves features as they are.
NORMALIZATIONS: dict[str, tuple[Sequence[float], Sequence[float]] | None] = {
    "none": None,
    "half": ((0.5,), (0.5,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class OfflineDataset:
    """Read one split of an artifact as a map-style dataset of (float32 sample, label).

    `transform` gets a PIL image, as in torchvision, and comes before the normalisation, never instead of it.
    Pickles as its folder and settings, never as data, so that worker processes share one memory map.
    """

    def __init__(
        self, folder: Path, transform: Callable[[Any], Any] | None = None, normalization: str = "half"
    ) -> None:
        self.artifact: Artifact = open_artifact(folder)
        self.transform = transform
        self.normalization = normalization
        self.images = torch.from_numpy(self.artifact.images)
        self.labels = torch.from_numpy(self.artifact.labels)

    def __reduce__(self) -> tuple[Any, ...]:
        return OfflineDataset, (self.artifact.path, self.transform, self.normalization)

    @property
    def targets(self) -> list[Any]:
        return self.artifact.labels.tolist()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.artifact.classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if self.transform is None:
            samples = self.images[index : index + 1] if index >= 0 else self.images[index:][:1]
        else:
            from PIL import Image

            pixels = self.artifact.images[index]
            changed = self.transform(Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels))
            samples = torch.from_numpy(np.array(changed)).view(1, *np.shape(changed)[:2], -1)
        return to_input(samples, self.normalization)[0], self.artifact.labels[index].item()

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Any]]:
        return [self[index] for index in indices]


class ClientLoader:
    """Iterate over one client's samples in batches of (float32 input, label), in an order drawn from `seed`.

    Each iteration is one epoch with an order of its own; seed=None keeps the order of `indices`. Images are
    resized to image_size (None: as stored); F.interpolate on uint8 equals PIL's resize byte for byte.
    """

    def __init__(
        self,
        dataset: OfflineDataset,
        indices: np.ndarray,
        batch_size: int,
        seed: int | None = None,
        image_size: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.indices = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        self.batch_size = batch_size
        self.image_size = image_size
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.indices
        if self.generator is not None:
            order = order[torch.randperm(len(order), generator=self.generator)]
        for batch in order.split(self.batch_size) if len(order) else ():
            # index_select and not images[batch]: 12 times faster on uint8.
            samples = torch.index_select(self.dataset.images, 0, batch)
            yield to_input(samples, self.dataset.normalization, self.image_size), self.dataset.labels[batch]


def to_input(samples: Tensor, normalization: str, image_size: int | None = None) -> Tensor:
    """Turn stored samples into model input: uint8 (n, H, W, C) to normalised float32 (n, C, size, size)."""
    if samples.dtype != torch.uint8:
        return samples
    pixels = samples.permute(0, 3, 1, 2)
    if image_size and pixels.shape[-2:] != (image_size, image_size):
        pixels = F.interpolate(pixels, (image_size, image_size), mode="bilinear", antialias=True)
    scaled = pixels.contiguous().float().div_(255)
    if statistics := NORMALIZATIONS[normalization]:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in statistics)
        scaled.sub_(mean).div_(std)
    return scaled
