"""One split of a shard as a PyTorch dataset: whole in memory for ClientLoader, or streamed block by block."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from flapp.data.leaf import CLASS_NAMES, SIDE
from flapp.data.offline import to_input
from flapp.data.split_file import count_rows, read_rows


class ShardSplit:
    """Hold one split as a map-style dataset of (float32 sample (1, 28, 28), label), such as ClientLoader takes.

    images: uint8 (n, 28, 28, 1); labels: int64 (n,). Pickles as its file, never as data.
    """

    classes = CLASS_NAMES

    def __init__(self, path: Path, normalization: str = "half") -> None:
        self.path = path
        self.normalization = normalization
        images, labels = read_rows(path, 0, count_rows(path))
        self.images = torch.from_numpy(images).view(-1, SIDE, SIDE, 1)
        self.labels = torch.from_numpy(labels)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSplit, (self.path, self.normalization)

    @property
    def targets(self) -> list[int]:
        return self.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return to_input(self.images[index][None], self.normalization)[0], int(self.labels[index])


class ShardStream(IterableDataset):
    """Stream one split as (float32 sample (1, 28, 28), label), holding `block` samples at a time.

    With batch_size it yields whole batches (n, 1, 28, 28), (n,) for a DataLoader with batch_size=None, none of them
    across two blocks. With seed each iteration visits the blocks, and the samples within each, in an order of its
    own; without it the file's order is kept. The workers of a DataLoader share the blocks.
    """

    classes = CLASS_NAMES

    def __init__(
        self,
        path: Path,
        normalization: str = "half",
        batch_size: int | None = None,
        seed: int | None = None,
        block: int = 1024,
    ) -> None:
        self.path = path
        self.normalization = normalization
        self.batch_size = batch_size
        self.seed = seed
        self.block = block
        self.count = count_rows(path)
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        starts = torch.arange(0, self.count, self.block)
        if generator is not None:
            starts = starts[torch.randperm(len(starts), generator=generator)]
        worker = get_worker_info()
        for number, start in enumerate(starts.tolist()):
            end = min(start + self.block, self.count)
            order = torch.arange(end - start)
            if generator is not None:
                order = torch.randperm(end - start, generator=generator)
            if worker is None or number % worker.num_workers == worker.id:
                yield from self._batches(start, end, order)

    def _batches(self, start: int, end: int, order: Tensor) -> Iterator[tuple[Tensor, Any]]:
        images, labels = map(torch.from_numpy, read_rows(self.path, start, end))
        for batch in order.split(self.batch_size or 1):
            inputs = to_input(torch.index_select(images, 0, batch)[..., None], self.normalization)
            yield (inputs, labels[batch]) if self.batch_size else (inputs[0], int(labels[batch]))
