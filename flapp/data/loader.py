"""Load a client's batches for training; one thread prepares them ahead."""

import math
import mmap
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from flapp.data.artifact import Artifact, DataError, refuse_rows
from flapp.data.images import augment, normalize, resize
from flapp.data.offline import OfflineDataset, read_rows

OUTPUTS = ("float32", "uint8")
# Values normalized in one step; four times as many are read and resized in one step. Both fit into the cache.
CACHED_VALUES = 3 * 224 * 224
AUGMENT_SEED = 0x5EED  # makes the random numbers of the augmentation independent of those of the order

Batch = tuple[Tensor, Tensor]


Job = tuple[Tensor, Tensor, Tensor | None]  # rows of a batch and of the one after it, and draws for the augmentation
Buffers = dict[str, Tensor]  # memory that is allocated on first use and overwritten from then on


def take(buffers: Buffers, name: str, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return (count, *shape) of the buffer `name`; the first call, which needs the largest count, allocates it."""
    if name not in buffers:
        buffers[name] = torch.empty((count, *shape), dtype=dtype)
    return buffers[name][:count]


class ClientLoader:
    """Iterate over one client's samples in batches of (input, label), in an order drawn from `seed`.

    Each iteration is one epoch with an order of its own; seed=None keeps the order of `indices`. Images are resized to
    image_size (None: as stored) by `resize`, or read from a materialized artifact if there is one. `output`:

        float32   normalized (n, C, H, W); exact=True gives torchvision's bits, False is faster and within 1e-6 of them
        uint8     (n, C, H, W) before normalization, a quarter of the bytes to move to a GPU: see to_input

    augment mirrors an image with probability 1/2 and shifts it by up to 1/8 of its size (4 of 32 pixels), both drawn
    from `seed`, before it is resized. Samples that are not images are returned as stored, in their own dtype.

    With prefetch, a thread makes up to `prefetch` batches ahead in a ring of prefetch + 1 buffers: the inputs of a
    batch are valid until the next batch is requested, those of the last until the next epoch (clone() them to keep
    them); labels stay valid. With prefetch=0 there is no thread and each batch has new tensors, with the same bits.

    Raises DataError for settings that contradict each other.
    """

    def __init__(
        self,
        dataset: OfflineDataset,
        indices: np.ndarray,
        batch_size: int,
        seed: int | None = None,
        image_size: int | None = None,
        output: str = "float32",
        prefetch: int = 1,
        augment: bool = False,
        exact: bool = False,
    ) -> None:
        if output not in OUTPUTS:
            raise DataError(f"output={output} is unknown: choose one of {', '.join(OUTPUTS)}")
        given = {"output=float32": output != "float32", "augment=False": augment, "image_size=None": image_size}
        refuse_rows(dataset.artifact, given)
        if augment and seed is None:
            raise DataError("augmentation is drawn from a seed: set seed, or augment=False")
        if batch_size < 1 or prefetch < 0:
            raise DataError(f"batch_size={batch_size} must be at least 1 and prefetch={prefetch} at least 0")
        self.dataset = dataset
        self.indices = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        self.batch_size = batch_size
        self.image_size = image_size
        self.output = output
        self.prefetch = prefetch if dataset.has_images else 0
        self.augment = augment
        self.exact = exact
        # Augmentation comes before the resize, so it cannot use a materialized artifact.
        self.source: Artifact = dataset.artifact if augment else dataset.artifact_at(image_size)
        self.shape = tuple(dataset.images.shape[1:])
        if dataset.has_images:
            channels = self.source.images.shape[1 if self.source.layout == "NCHW" else 3]
            self.shape = (channels, *((image_size, image_size) if image_size else self.source.size))
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.augment_generator = None if seed is None else torch.Generator().manual_seed(seed ^ AUGMENT_SEED)
        # Large planes of the right size are normalized straight from the memory map, which saves a copy.
        self._is_as_wanted = (
            dataset.has_images
            and self.source.layout == "NCHW"
            and tuple(self.source.images.shape[1:]) == self.shape
            and math.prod(self.shape) >= CACHED_VALUES // 4
        )
        self._is_cold = True
        # The kernel zeroes new memory, which costs as much as four batches: later epochs use the first one's buffers.
        self._idle: list[list[Buffers]] = []

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        jobs = self._draw_epoch()
        if self.prefetch:
            yield from self._make_ahead(jobs)
        else:
            for job in jobs:
                yield self._make(job, Buffers(), Buffers())
        self._is_cold = False

    def to_input(self, pixels: Tensor) -> Tensor:
        """Turn a batch of output uint8, on any device, into the normalized float32 that the model takes."""
        return normalize(pixels, self.dataset.normalization)

    def _draw_epoch(self) -> list[Job]:
        """Draw the whole epoch at once, so that the generators do not depend on prefetch if it is left early."""
        order = self.indices
        if not len(order):
            return []
        if self.generator is not None:
            order = order[torch.randperm(len(order), generator=self.generator)]
        batches = order.split(self.batch_size)
        draws = self._draw_augmentation().split(self.batch_size) if self.augment else [None] * len(batches)
        following = [*batches[1:], order[:0]]
        return list(zip(batches, following, draws, strict=True))

    def _draw_augmentation(self) -> Tensor:
        """Draw flip, top and left of each sample as int64 (samples, 3)."""
        limits = [(0, 1), *((-(length // 8), length // 8) for length in self.source.size)]
        count, generator = (len(self.indices),), self.augment_generator
        return torch.stack([torch.randint(low, high + 1, count, generator=generator) for low, high in limits], 1)

    def _make_ahead(self, jobs: list[Job]) -> Iterator[Batch]:
        """Make batches in a thread, which ends with the iteration, however that ends; its errors are raised here."""
        is_exiting = sys.is_finalizing  # looked up now: at exit Python clears modules
        scratch, *slots = self._idle.pop() if self._idle else [Buffers() for _ in range(self.prefetch + 2)]
        ahead: deque[Future[Batch]] = deque()
        maker = ThreadPoolExecutor(1, "flapp-loader")
        try:
            for job, slot in zip(jobs, cycle(slots), strict=False):
                ahead.append(maker.submit(self._make, job, slot, scratch))
                if len(ahead) == len(slots):  # the next job takes the slot of the batch that the consumer has now
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            if not is_exiting():  # at exit the thread has ended already, and nothing is left to do
                # If the garbage collector closes the iterator in that thread, the thread cannot wait for itself.
                with suppress(RuntimeError):
                    maker.shutdown(cancel_futures=True)
                    self._idle.append([scratch, *slots])

    def _make(self, job: Job, slot: Buffers, scratch: Buffers) -> Batch:
        """Make one batch, its inputs in `slot`; intermediate results are in `scratch`."""
        rows, next_rows, draws = job
        labels = self.dataset.labels[rows]
        if not self.dataset.has_images:
            return torch.index_select(self.dataset.images, 0, rows), labels
        if self._is_cold:
            will_need(self.source.images, next_rows)
        if self.output == "uint8":
            return self._read(rows, draws, slot), labels
        inputs = take(slot, "inputs", len(rows), self.shape, torch.float32)
        if self._is_as_wanted and draws is None:
            stored = torch.from_numpy(self.source.images)
            for row, target in zip(rows.tolist(), inputs, strict=True):
                normalize(stored[row : row + 1], self.dataset.normalization, target.unsqueeze(0), self.exact)
            return inputs, labels
        piece = max(1, CACHED_VALUES // math.prod(self.shape))
        for start in range(0, len(inputs), 4 * piece):
            part = slice(start, start + 4 * piece)
            pixels = self._read(rows[part], None if draws is None else draws[part], scratch)
            for images, target in zip(pixels.split(piece), inputs[part].split(piece), strict=True):
                normalize(images, self.dataset.normalization, target, self.exact)
        return inputs, labels

    def _read(self, rows: Tensor, draws: Tensor | None, buffers: Buffers) -> Tensor:
        """Read, augment and resize images: uint8 (n, C, H, W), in `buffers` if they are as stored."""
        stored = take(buffers, "stored", len(rows), self.source.images.shape[1:], torch.uint8)
        pixels = read_rows(self.source, rows, out=stored)
        if draws is not None:
            pixels = augment(pixels, draws)
        return resize(pixels, self.image_size) if self.image_size else pixels


def will_need(images: np.ndarray, rows: Tensor) -> None:
    """Tell the kernel which rows of a memory-mapped array are read next, so that it reads them from disk ahead."""
    if not isinstance(images, np.memmap) or not isinstance(images.base, mmap.mmap):
        return
    first, row = images.offset % mmap.ALLOCATIONGRANULARITY, images.strides[0]
    for index in rows.tolist():
        start = (first + index * row) // mmap.PAGESIZE * mmap.PAGESIZE
        images.base.madvise(mmap.MADV_WILLNEED, start, first + (index + 1) * row - start)
