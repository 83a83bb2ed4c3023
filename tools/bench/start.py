"""From a client's start to its first batch, against flwr-datasets.

Each client is a made-up writer with 200 random images of FEMNIST's shape. Ours opens its own shard, checks it against
its meta.json, and takes a batch from its training loader. flwr-datasets opens the whole dataset from disk and deals it
by writer, as each of its clients does, and loads through a DataLoader with a transform, as its documentation shows.
"""

import contextlib
import io
import itertools
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from flapp.client.data import make_batches, open_client_data, open_once
from flapp.config.load import compose
from flapp.config.schema import Config, NodeConfig
from flapp.custom import source_digest, versions
from flapp.data.shards.build import write_shards
from tools.bench import Row, measure

WRITERS = (500, 3500)  # FEMNIST has 3,597; only the work of flwr-datasets grows with their number
IMAGES, BATCH = 200, 32
SHARDS = 8  # each client opens only its own, so the others need not exist


def rows(sizes: Sequence[int] = WRITERS) -> list[Row]:
    """Compare on datasets with these numbers of writers."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    return [compare(writers) for writers in sizes]


def compare(writers: int) -> Row:
    """Start one client after the other by both ways, in turn, with nothing cached but the files' pages."""
    with tempfile.TemporaryDirectory(prefix="flapp-bench-") as folder:
        images = np.random.default_rng(0).integers(0, 256, (IMAGES, 28, 28), dtype=np.uint8)
        write_theirs(Path(folder) / "theirs", images, writers)
        config = write_ours(Path(folder), images)
        ways = {"theirs": partial(start_theirs, Path(folder) / "theirs"), "ours": partial(start_ours, config)}
        seconds = measure({name: for_each_client(way) for name, way in ways.items()})
    figures = " and ".join(f"{1e3 * seconds[name]:.1f} ms" for name in ways)
    what, against = f"client start to first batch, shard of {IMAGES} images", "flwr-datasets' natural partition"
    note, ratio = f"{writers * IMAGES:,} images in all; {figures}", seconds["theirs"] / seconds["ours"]
    return Row(f"{what}, {writers:,} writers", against, ratio, 100, note=note)


def for_each_client(way: Callable[[int], object]) -> Callable[[], None]:
    """Return a function that starts one client after the other, over and over."""
    clients = itertools.cycle(range(SHARDS))
    return lambda: assert_batch(way(next(clients)))


def assert_batch(images: Any) -> None:
    if images.shape != (BATCH, 1, 28, 28) or images.dtype != torch.float32:
        raise RuntimeError(f"a first batch is {images.dtype} {tuple(images.shape)}: it cannot be compared")


def write_ours(folder: Path, images: np.ndarray) -> Config:
    """Write SHARDS shards by flapp's own writer and return the config of a run over them."""
    source = folder / "source"
    source.mkdir()
    np.save(source / "images.npy", np.tile(images, (SHARDS, 1, 1)))
    np.save(source / "labels.npy", np.tile(np.arange(IMAGES) % 62, SHARDS))
    np.save(source / "writers.npy", np.repeat(np.arange(SHARDS), IMAGES))
    words = [f"home={folder}", f"clients={SHARDS}", f"train.batch_size={BATCH}"]
    config = compose(["experiment=femnist_fedavg", *words])
    write_shards(source, config.shards_dir, "natural", SHARDS)
    return config


def start_ours(config: Config, client: int) -> Any:
    """Open a client's data as a fresh process does, and return the images of its first batch."""
    for cached in (open_once, source_digest, versions):
        cached.cache_clear()
    data = open_client_data(config, NodeConfig(), str(client))
    return next(iter(make_batches(config, data, "train", torch.device("cpu"), seed=0)))[0]


def write_theirs(folder: Path, images: np.ndarray, writers: int) -> None:
    """Save a dataset with the columns of FEMNIST on the Hugging Face Hub; every writer has the same images."""
    from datasets import Dataset, Features, Value, concatenate_datasets
    from datasets import Image as ImageFeature

    pictures = []
    for image in images:
        Image.fromarray(image).save(out := io.BytesIO(), "PNG")
        pictures.append({"bytes": out.getvalue(), "path": None})
    columns = {"image": pictures, "character": [label % 62 for label in range(IMAGES)]}
    one = Dataset.from_dict(columns, features=Features({"image": ImageFeature(), "character": Value("int64")}))
    names = [f"f{writer:04d}" for writer in range(writers) for _ in range(IMAGES)]
    concatenate_datasets([one] * writers).add_column("writer_id", names).save_to_disk(folder)


def start_theirs(folder: Path, client: int) -> Any:
    """Deal the dataset as a fresh process does, and return the images of a client's first batch."""
    from datasets import load_from_disk
    from flwr_datasets.partitioner import NaturalIdPartitioner

    partitioner = NaturalIdPartitioner(partition_by="writer_id")
    with contextlib.redirect_stderr(io.StringIO()):  # hides the progress bar of flwr-datasets
        partitioner.dataset = load_from_disk(folder)
        partition = partitioner.load_partition(client)
    loader = DataLoader(partition.with_transform(to_tensors), batch_size=BATCH, shuffle=True)
    return next(iter(loader))["image"]


def to_tensors(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    pipeline = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    return batch | {"image": [pipeline(image) for image in batch["image"]]}
