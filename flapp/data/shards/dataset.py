"""One split of a shard as a PyTorch dataset: whole in memory for ClientLoader, or streamed block by block."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from flapp.data.artifact import Artifact
from flapp.data.images import check_normalization, normalize
from flapp.data.offline import OfflineDataset
from flapp.data.shards.client import count_rows, read_rows
from flapp.data.shards.source import FEMNIST, Kind, block_rows


class ShardSplit(OfflineDataset):
    """Hold one split as a map-style dataset of (float32 sample (C, H, W), label), like OfflineDataset.

    digest: SHA-256 of the file. The path and the settings are pickled, not the data.
    """

    exact = False

    def __init__(self, path: Path, normalization: str = "half", digest: str = "", kind: Kind = FEMNIST) -> None:
        check_normalization(normalization)
        self.transform = self.image_size = None
        self.normalization = normalization
        self.kind = kind
        images, labels = read_rows(path, 0, count_rows(path), kind)
        self.hold(Artifact(path, images.reshape(-1, *kind.shape), labels, kind.classes, digest, digest))

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSplit, (self.artifact.path, self.normalization, self.artifact.digest, self.kind)


class ShardStream(IterableDataset[tuple[Tensor, Any]]):
    """Stream one split as (float32 sample (C, H, W), label), holding `block` samples at a time.

    With batch_size it yields batches (n, C, H, W), (n,), each from one block, for a DataLoader with batch_size=None.
    block=None is 1024, or fewer if the images are large. With seed each iteration visits the blocks, and the samples
    within each, in an order drawn from (seed, epoch), and increments epoch; without it the file's order is kept. The
    workers of a DataLoader share the blocks (they work on copies: set epoch before each pass over the DataLoader).
    """

    def __init__(
        self,
        path: Path,
        normalization: str = "half",
        batch_size: int | None = None,
        seed: int | None = None,
        block: int | None = None,
        kind: Kind = FEMNIST,
    ) -> None:
        check_normalization(normalization)
        self.path = path
        self.normalization = normalization
        self.batch_size = batch_size
        self.seed = seed
        self.kind = kind
        self.block = block or block_rows(kind, 1024)
        self.count = count_rows(path)
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        rng = None if self.seed is None else np.random.default_rng((self.seed, self.epoch))
        self.epoch += 1
        starts = np.arange(0, self.count, self.block)
        worker = get_worker_info()
        for number, start in enumerate(starts if rng is None else rng.permutation(starts)):
            end = min(start + self.block, self.count)
            order = np.arange(end - start) if rng is None else rng.permutation(end - start)
            if worker is None or number % worker.num_workers == worker.id:
                yield from self._batches(start, end, torch.from_numpy(order))

    def _batches(self, start: int, end: int, order: Tensor) -> Iterator[tuple[Tensor, Any]]:
        images, labels = map(torch.from_numpy, read_rows(self.path, start, end, self.kind))
        for batch in order.split(self.batch_size or 1):
            pixels = torch.index_select(images, 0, batch).view(-1, *self.kind.shape).permute(0, 3, 1, 2)
            inputs = normalize(pixels, self.normalization, exact=False)  # as ClientLoader does
            yield (inputs, labels[batch]) if self.batch_size else (inputs[0], int(labels[batch]))
