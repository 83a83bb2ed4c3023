"""What reads each kind of the files that tests/test_poisoned_files.py poisons."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flapp.data.artifact import DataError
from flapp.data.decode import decode_splits
from flapp.data.shards.client import digest_of
from flapp.data.shards.leaf import open_source
from flapp.data.shards.manifest import load_manifest
from flapp.data.sources import read_cifar
from flapp.data.tables import Columns, open_tables
from flapp.files import sha256_of_file
from flapp.model.adapter_files import import_adapter
from flapp.model.split.factory import ModelFactory
from tests.support.adapters import adapted
from tests.support.poison import ask, refuses
from tools import federation, partition_heatmap, report, split_model, verify_data
from tools.page.drawing import Picture


def rehash(folder: Path) -> None:
    """State the digests of what is there now, as whoever poisons shards would."""
    path = folder / "manifest.json"
    try:
        facts = json.loads(path.read_text()) | {"clients_sha256": sha256_of_file(folder / "clients.jsonl")}
        path.write_text(json.dumps(facts | {"digest": digest_of(facts)}))
        for meta in folder.glob("*/meta.json"):
            said = json.loads(meta.read_text())
            meta.write_text(json.dumps(said | {"digest": digest_of(said)}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # there is nothing to hash in this one


def read_all_records(folder: Path) -> None:
    manifest = load_manifest(folder)
    for client in manifest:
        manifest.shard_path(client)


def read_shards(folder: Path) -> None:
    ask(verify_data.main, folder)
    rehash(folder)
    ask(verify_data.main, folder)
    refuses(DataError, read_all_records, folder)


def read_whole(folder: Path) -> None:
    ask(split_model.main, folder / "mine", "--points", 1, 2, "--out", folder / "out", "--check")


def read_cifar_batch(folder: Path) -> str:
    return refuses(DataError, lambda: read_cifar("cifar10", folder, "test"))


def read_partition(folder: Path) -> None:
    ask(partition_heatmap.main, folder / "part.safetensors", folder, folder / "o.png")


def read_table(folder: Path) -> None:
    def read() -> None:
        raw, _ = open_tables(folder, Columns(), 0.2, 0)
        decode_splits(raw, (6, 7, 3), True, folder)

    refuses(DataError, read)


def read_report(folder: Path) -> None:
    """Write the page of what is in the folder; its figures are drawn once each, and not laid out before."""

    def draw(picture: Picture) -> str:
        picture.figure.set_layout_engine("none")
        picture.figure.draw_without_rendering()
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Picture, "svg", draw)
        ask(report.main, folder, "--out", folder / "r.html")


SHARDS = "manifest.json clients.jsonl client_0/meta.json client_0/train.safetensors client_1/test.safetensors"

# by kind: the files that are poisoned, what reads them, and how many variants are tried
FUZZED: dict[str, tuple[str, Callable[[Path], object], int]] = {
    "run": (
        "runs/r/config.yaml runs/r/metrics.jsonl runs/r/metrics.json runs/r/progress.json",
        lambda folder: read_report(folder / "runs" / "r"),
        7,
    ),
    "sweep": ("sweep.json 0/metrics.json 0/metrics.jsonl", read_report, 4),
    "set": (
        "train/meta.json train/images.npy test/labels.npy test/meta.json",
        lambda folder: ask(verify_data.main, folder),
        60,
    ),
    "partition": ("part.safetensors test/meta.json", read_partition, 15),
    "shards": (SHARDS, read_shards, 60),
    "own_shards": (SHARDS, read_shards, 60),
    "tables": ("train.parquet", read_table, 60),
    "saved": ("data-00000-of-00001.arrow state.json", read_table, 60),
    "leaf": ("all_data_0.json", lambda folder: refuses(DataError, open_source, folder), 30),
    "cifar": ("cifar-10-batches-py/test_batch cifar-10-batches-py/batches.meta", read_cifar_batch, 60),
    "adapter": (
        "a/adapter_config.json a/adapter_model.safetensors",
        lambda folder: refuses(ValueError, import_adapter, adapted(), folder / "a"),
        40,
    ),
    "whole": ("mine/metrics.json mine/config.yaml mine/model.safetensors", read_whole, 30),
    "split": (
        "bottom/mine_1-2_bottom_metadata.json trunk/mine_1-2_trunk_metadata.json top/mine_1-2_top_metadata.json "
        "top/mine_1-2_top.safetensors",
        lambda folder: refuses(ValueError, ModelFactory.load_split_models, folder),
        40,
    ),
    "up": ("federation.json supervisor.json", lambda folder: ask(federation.main, "status", "--folder", folder), 40),
}
