"""What a client reads from its shard, and that it reads nothing else."""

import logging
import os
import pickle
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.utils.data import DataLoader

from flapp.data.loader import ClientLoader
from flapp.data.shards import dataset as shard_dataset
from flapp.data.shards.build import write_shards
from flapp.data.shards.client import DistributedShardLoader
from flapp.data.shards.manifest import Manifest
from tests.support.leaf_files import SPLITS


def test_a_shard_says_what_it_holds(
    source: Path, shards: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = shards.shard_path("2")
    shard = DistributedShardLoader(path, expected_client_id="2")
    assert (shard.client_id, shard.num_samples) == ("2", shards["2"].num_samples)
    assert tuple(shard.label_hist) == shards["2"].label_hist
    assert shard.label_hist == np.bincount(load_file(path / "train.safetensors")["labels"], minlength=62).tolist()
    assert shard.digest == shards["2"].digest
    assert shard.last_modified == max(file.stat().st_mtime for file in path.iterdir())
    counts = "{train} train, {val} val, {test} test samples".format(**shard.num_samples)
    assert f"client 2: {counts} from {path}" in caplog.text
    other = write_shards(source, tmp_path / "other", "round_robin", clients=3, seed=2)
    assert len({record.digest for made in (shards, other) for record in made.values()}) == 6


def test_client_loader_reads_a_split_like_any_dataset(shards: Manifest) -> None:
    path = shards.shard_path("0")
    split = DistributedShardLoader(path).split("train")
    tensors = load_file(path / "train.safetensors")
    assert (split.images.shape[1:], split.images.dtype, split.labels.dtype) == ((28, 28, 1), torch.uint8, torch.int64)
    assert len(split.classes) == 62
    inputs, labels = next(iter(ClientLoader(split, np.arange(len(split)), batch_size=8)))
    expected = (torch.from_numpy(tensors["images"][:8]).float() / 255 - 0.5) / 0.5
    assert torch.allclose(inputs[:, 0], expected, atol=1e-6)
    assert labels.tolist() == tensors["labels"][:8].tolist()
    assert torch.allclose(split[3][0], inputs[3], atol=1e-6)
    assert split[3][1] == labels[3]


def test_a_split_pickles_as_its_file_and_streams_the_same_samples_in_the_same_order(shards: Manifest) -> None:
    path = shards.shard_path("0")
    whole = DistributedShardLoader(path).split("train")
    content = pickle.dumps(whole)
    assert len(content) < 1000
    assert torch.equal(pickle.loads(content).images, whole.images)  # noqa: S301
    streamed = list(DistributedShardLoader(path, streaming=True).split("train"))
    assert len(streamed) == len(whole)
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(streamed, whole, strict=True))


def test_streaming_holds_one_block_at_a_time(shards: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Mock(wraps=shard_dataset.read_rows)
    monkeypatch.setattr(shard_dataset, "read_rows", read)
    path = shards.shard_path("0") / "train.safetensors"
    stream = iter(shard_dataset.ShardStream(path, block=8, batch_size=4))
    assert next(stream)[0].shape == (4, 1, 28, 28)
    assert read.call_count == 1
    sizes = [4] + [len(labels) for _, labels in stream]
    assert max(call.args[2] - call.args[1] for call in read.call_args_list) == 8
    assert sum(sizes) == shards["0"].num_samples["train"]


def test_a_seeded_stream_shuffles_anew_each_epoch_and_alike_each_time(shards: Manifest) -> None:
    path = shards.shard_path("0") / "train.safetensors"

    def epochs(seed: int | None) -> list[list[float]]:
        stream = shard_dataset.ShardStream(path, seed=seed, block=8)
        return [[float(image.sum()) for image, _ in stream] for _ in range(2)]

    plain, drawn = epochs(None), epochs(5)
    assert plain[0] == plain[1]
    assert sorted(drawn[0]) == sorted(drawn[1]) == sorted(plain[0])
    assert drawn[0] != drawn[1]
    assert drawn[0] != plain[0]
    assert drawn == epochs(5)


def test_the_workers_of_a_data_loader_share_a_stream(shards: Manifest) -> None:
    path = shards.shard_path("0") / "train.safetensors"
    stream = shard_dataset.ShardStream(path, block=8, batch_size=8)
    labels = [label for _, batch in DataLoader(stream, batch_size=None, num_workers=2) for label in batch.tolist()]
    assert sorted(labels) == sorted(load_file(path)["labels"].tolist())


def opened_by_reading(path: Path) -> list[str]:
    """Return the paths that are opened while a shard is read; call it in a process of its own."""
    opened: list[Any] = []
    names = ("open", "os.listdir", "os.scandir")
    sys.addaudithook(lambda event, args: opened.append(args[0]) if event in names else None)
    for streaming in (False, True):
        shard = DistributedShardLoader(path, streaming=streaming, expected_client_id="1")
        for split in SPLITS:
            list(shard.split(split))
    return sorted({os.path.abspath(os.fsdecode(path)) for path in opened if not isinstance(path, int)})


def test_a_client_opens_files_in_its_own_folder_only_and_needs_no_other(shards: Manifest, tmp_path: Path) -> None:
    path = shards.shard_path("1").rename(tmp_path / "alone")
    shutil.rmtree(shards.folder)
    with ProcessPoolExecutor(1, get_context("fork"), torch.set_num_threads, (1,)) as process:
        opened = process.submit(opened_by_reading, path).result()
    assert opened == sorted(str(path / name) for name in ["meta.json", *(f"{s}.safetensors" for s in SPLITS)])
