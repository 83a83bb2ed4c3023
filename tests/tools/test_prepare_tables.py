"""tools.prepare_data from tables: artifacts, and shards of the clients that a column names."""

import logging
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import numpy as np
import pytest

from flapp.config.load import compose
from flapp.data import table_files, tables
from flapp.data.artifact import DataError, open_artifact
from flapp.data.shards.client import DistributedShardLoader
from flapp.data.shards.manifest import load_manifest
from flapp.partitions import prepared
from tests.conftest import LocalGrid, run_app
from tests.support.leaf_files import as_leaf, content_of, draw_samples, write_leaf
from tests.support.pictures import encode
from tests.support.tables import NAMES, as_dataset, draw_images, write_femnist, write_parquet
from tests.tools.conftest import Refusal
from tools import prepare_data, verify_data

MINE = ("dataset=custom", "dataset.name=mine")
WRITERS = (*MINE, "dataset.client_column=who", "partition=natural", "clients=3")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a parquet file of 90 images in three classes, of three writers."""
    labels = np.arange(90) % 3
    images = draw_images(90) // 2 + (labels * 60).astype(np.uint8)[:, None, None, None]
    who = [f"site {number % 5 % 3}" for number in range(90)]
    path = tmp_path_factory.mktemp("tables") / "all.parquet"
    as_dataset(images, labels.tolist(), who=who).to_parquet(path)
    return path


def prepare(home: Path, *words: str) -> int:
    return prepare_data.main([f"home={home}", *words])


@pytest.fixture
def refused(refusal: Refusal) -> Refusal:
    """Return a function that runs the tool, which must refuse and write nothing; it returns the line of error."""

    def refuse(home: Path, *words: str) -> str:
        error = refusal(prepare_data.main, f"home={home}", *words)
        assert not list(home.rglob("meta.json"))
        return error

    return refuse


def run(home: Path, name: str, *words: str) -> dict[str, Any]:
    """Run a federation over prepared data and return its metrics.json."""
    settings = compose([f"home={home}", f"run_name={name}", "model=linear", "num_rounds=2", *words])
    nodes = [{"partition-id": i, "num-partitions": settings.clients} for i in range(settings.clients)]
    return run_app(settings, LocalGrid({}, nodes))[0]


def test_femnist_from_parquet_gives_the_bytes_of_the_same_samples_from_leaf(tmp_path: Path) -> None:
    samples = draw_samples(20, 12, 30, 11, 10, 2, 25)
    sources = {
        "leaf": write_leaf(tmp_path / "leaf", as_leaf(samples)),
        "parquet": write_femnist(tmp_path / "parquet/data/train-00000-of-00001.parquet", samples).parents[1],
    }
    for kind, clients in (("natural", 7), ("round_robin", 3), ("random", 2)):
        for name, source in sources.items():
            words = (f"partition={kind}", f"clients={clients}", f"dataset.source={source}", "overwrite=true")
            assert prepare(tmp_path / name / "home", "dataset=femnist", *words) == 0
        assert content_of(tmp_path / "leaf/home") == content_of(tmp_path / "parquet/home")


def test_settings_of_femnist_count_for_leaf_too(tmp_path: Path, refused: Refusal) -> None:
    leaf = write_leaf(tmp_path / "leaf", as_leaf(draw_samples(20, 30)))
    words = ("dataset=femnist", "partition=natural", "clients=2", f"dataset.source={leaf}")
    for fraction, given in ((0.1, ()), (0.3, ("dataset.test_fraction=0.3", "overwrite=true"))):
        assert prepare(tmp_path, *words, *given) == 0
        facts = load_manifest(tmp_path / "data/femnist/shards").facts
        assert (facts["test_fraction"], facts["totals"]["test"]) == (fraction, 50 * fraction)
    said = refused(tmp_path / "home", *words, "dataset.label_column=y")
    assert "has no parquet files, and only they have columns: leave dataset.*_column out" in said


def test_femnist_with_a_character_that_it_does_not_have_is_refused(tmp_path: Path, refused: Refusal) -> None:
    columns = {"image": [encode(image) for image in draw_images(2, size=28)], "writer_id": ["a", "b"]}
    for values, said in (
        (["A", "ä"], "all.parquet has the unknown class ä in column character"),
        ([1, 62], "all.parquet row 1 has label 62 in column character, and labels are 0 to 61"),
    ):
        path = write_parquet(tmp_path / "all.parquet", **columns, character=values)
        words = ("dataset=femnist", "partition=natural", "clients=2", f"dataset.source={path}")
        assert said in refused(tmp_path / "home", *words)


def test_a_client_column_gives_shards_and_a_shared_artifact_that_end_in_the_same_model(
    table: Path, tmp_path: Path
) -> None:
    assert prepare(tmp_path, *WRITERS, f"dataset.source={table}") == 0
    manifest = load_manifest(tmp_path / "data/mine/shards")
    facts = {key: manifest.facts[key] for key in ("dataset", "shape", "classes", "normalization")}
    assert facts == {"dataset": "mine", "shape": [8, 8, 3], "classes": NAMES, "normalization": "half"}
    assert sum(record.num_samples["test"] for record in manifest.values()) == 18
    train, test = (open_artifact(tmp_path / "data/mine" / split).preparation for split in ("train", "test"))
    assert train == test != ""
    assert verify_data.main([str(tmp_path / "data/mine"), "--full"]) == 0
    words = (*MINE, "partition=natural", "clients=3")
    shared = run(tmp_path, "shared", *words)["model_sha256"]
    assert run(tmp_path, "own", *words, "distributed_data.enabled=true")["model_sha256"] == shared
    streamed = run(tmp_path, "streamed", *words, "distributed_data.enabled=true", "distributed_data.streaming=true")
    assert streamed["status"] == "finished"


@pytest.mark.parametrize("kind", ["natural", "manual"])
def test_every_partition_by_writer_works_on_shards_alone(table: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "who.json").write_text('{"0": ["site 2"], "1": ["site 0", "site 1"]}')
    words = (f"partition={kind}", "clients=2", "distributed_data.enabled=true")
    words += (f"partition.mapping={tmp_path / 'who.json'}",) if kind == "manual" else ()
    given = ("dataset.client_column=who", f"dataset.source={table}", "dataset.normalization=imagenet")
    assert prepare(tmp_path, *MINE, *words, *given) == 0
    assert not (tmp_path / "data/mine/train").exists()
    assert compose([f"home={tmp_path}", *MINE, *words]).dataset.normalization == "imagenet"
    assert run(tmp_path, "one", *MINE, *words)["status"] == "finished"
    settings = compose([f"home={tmp_path}", *MINE, *(word for word in words if "enabled" not in word)])
    with pytest.raises(DataError, match=r"mine is prepared as shards only, in .*: add distributed_data.enabled=true"):
        prepared(settings)


def test_a_test_split_of_the_source_stays_the_test_split_of_its_clients(tmp_path: Path) -> None:
    images, who = draw_images(40), [f"w{number % 4}" for number in range(40)]
    for split, rows in (("train", range(30)), ("test", range(30, 40))):
        columns = {"image": [encode(images[row]) for row in rows], "label": [row % 3 for row in rows]}
        write_parquet(tmp_path / f"raw/{split}.parquet", **columns, who=[who[row] for row in rows])
    words = (*MINE, "dataset.client_column=who", "partition=natural", "clients=4")
    assert prepare(tmp_path, *words, f"dataset.source={tmp_path / 'raw'}") == 0
    for client in range(4):
        shard = DistributedShardLoader(tmp_path / f"data/mine/shards/client_{client}")
        found = shard.split("test").artifact.images
        assert np.array_equal(found, images[[row for row in range(30, 40) if row % 4 == client]])
        assert sum(shard.num_samples[split] for split in ("train", "val")) == len(range(client, 30, 4))


def test_a_run_with_other_settings_than_the_shards_is_refused_by_name(table: Path, tmp_path: Path) -> None:
    words = (*WRITERS, "distributed_data.enabled=true")
    assert prepare(tmp_path, *words, f"dataset.source={table}") == 0
    for given, said in (
        ("dataset.shape=[8,8,1]", r"manifest\.json has samples of shape \[8, 8, 3\] in 3 classes, .*\[8, 8, 1\] in 3"),
        ("dataset.classes=4", r"set dataset\.shape=\[8,8,3\] dataset\.classes=3"),
        ("dataset.normalization=none", r"prepared with dataset\.normalization=half, the settings say none"),
    ):
        with pytest.raises(ValueError, match=said):
            run(tmp_path, f"other-{given[8]}", *words, given)


def test_a_site_refuses_a_shard_of_another_shape(table: Path, tmp_path: Path) -> None:
    words = (*WRITERS, "distributed_data.enabled=true")
    assert prepare(tmp_path / "large", *words, f"dataset.source={table}", "dataset.shape=[16,16,3]") == 0
    assert prepare(tmp_path, *words, f"dataset.source={table}") == 0
    target = tmp_path / "data/mine/shards/client_1"
    shutil.rmtree(target)
    shutil.copytree(tmp_path / "large/data/mine/shards/client_1", target)
    refused = run(tmp_path, "mixed", *words)["refused"]
    assert refused.keys() == {"1"}
    assert "client_1 has samples of shape [16, 16, 3] in 3 classes, the settings say [8, 8, 3] in 3" in refused["1"]


REFUSED = {
    "dataset.client_column=who partition=iid clients=2": "partition=iid does not make shards: choose one of",
    "dataset.client_column=whose partition=natural clients=2": "and not whose: set dataset.client_column to one of",
    "partition=natural clients=2": "add dataset.client_column=COLUMN, or leave partition out",
    "dataset.client_column=who partition=natural clients=9": "clients=9 cannot share 3 writers",
    "dataset.client_column=who partition=natural clients=3 dataset.materialize=16": "leave dataset.materialize out",
    "dataset.label_column=who dataset.image_column=label": "column label of type int64, which is no encoded image",
    "dataset.download=true": "two sources: leave one of them out",
    "dataset.hub=a/b": "is a download: add dataset.download=true",
}


@pytest.mark.parametrize("words", REFUSED)
def test_settings_that_do_not_fit_a_table_are_refused_in_one_line(
    table: Path, tmp_path: Path, refused: Refusal, words: str
) -> None:
    said = refused(tmp_path, *MINE, f"dataset.source={table}", *words.split())
    assert REFUSED[words] in said


def test_images_with_a_side_that_shards_cannot_hold_are_refused_before_anything_is_written(
    tmp_path: Path, refused: Refusal
) -> None:
    images = [encode(np.full((1, 70_000, 3), 7, np.uint8))] * 6
    source = write_parquet(tmp_path / "long.parquet", image=images, label=[0, 1] * 3, who=[0, 1, 2] * 2)
    words = ("dataset.client_column=who", "partition=natural", "clients=3")
    said = refused(tmp_path, *MINE, f"dataset.source={source}", *words)
    assert "long.parquet cannot become shards, shape.1: " in said
    assert "65536, got 70000: set dataset.shape" in said
    assert not (tmp_path / "data/mine").exists()


def test_a_table_of_the_hub_is_downloaded_once_and_later_commands_need_only_the_name_of_its_artifact(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = tmp_path / "hub/owner/name"
    hub.mkdir(parents=True)
    shutil.copy(table, hub / "train-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path / "hub")  # load_dataset takes a local folder of this name first
    home, words = tmp_path / "home", (*MINE, "dataset.hub=owner/name", "dataset.download=true")
    assert prepare(home, *words) == 0
    assert sorted(path.name for path in (home / "raw/owner--name").iterdir()) == ["dataset_dict.json", "train"]
    monkeypatch.delattr(datasets, "load_dataset")
    assert prepare(home, *words) == 0
    assert "nothing to do" in capsys.readouterr().out
    whole = tmp_path / "whole"
    assert prepare(whole, *MINE, f"dataset.source={table}") == 0
    for split in ("train", "test"):
        one, other = (open_artifact(path / "data/mine" / split) for path in (home, whole))
        assert (one.digest, len(one.labels)) == (other.digest, 72 if split == "train" else 18)
        assert one.classes == tuple(NAMES)
    settings = compose([f"home={home}", *MINE]).dataset
    assert (settings.shape, settings.classes, settings.normalization) == ((8, 8, 3), 3, "half")


def test_a_hub_that_cannot_be_reached_gives_a_one_line_error_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refusal
) -> None:
    fault = ConnectionError("Couldn't reach 'flwrlabs/femnist'\non the Hub")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=fault))
    said = refused(tmp_path, "dataset=femnist", "dataset.download=true", "partition=natural", "clients=3")
    assert "flwrlabs/femnist cannot be downloaded (Couldn't reach 'flwrlabs/femnist' on the Hub)" in said
    assert "check the name and the network, or download the files elsewhere and set dataset.source" in said
    assert not list((tmp_path / "raw").glob("flwrlabs--femnist"))
    assert logging.getLogger("huggingface_hub").level == logging.ERROR
    said = refused(tmp_path, *MINE, "dataset.download=true", "dataset.hub=../x")
    assert "dataset.hub=../x is not a name on the hub: give owner/name" in said
    assert "add dataset.hub=OWNER/NAME" in refused(tmp_path, *MINE, "dataset.download=true")


def test_without_pyarrow_one_line_says_what_to_install(
    table: Path, tmp_path: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for module in (table_files, tables):
        runpy.run_path(str(module.__file__))  # they can be imported
    for more, said in (
        ([f"dataset.source={table}"], f"{table} is a table, and pyarrow, which reads tables, is missing"),
        (["dataset.hub=a/b", "dataset.download=true"], "a/b is downloaded by the datasets library, which is missing"),
    ):
        line = refused(tmp_path, *MINE, *more)
        assert said in line
        assert 'pip install -e ".[data]"' in line
