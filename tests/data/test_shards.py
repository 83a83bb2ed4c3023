"""Shards: every sample with one client, in the split that its writer and the seed decide, and the same bytes again."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from flapp.data.artifact import DataError
from flapp.data.loader import ClientLoader
from flapp.data.offline import OfflineDataset
from flapp.data.partition import load_partition
from flapp.data.shards.build import export_artifacts, write_shards
from flapp.data.shards.client import DistributedShardLoader
from flapp.data.shards.manifest import Manifest
from flapp.data.shards.source import FEMNIST
from tests.support.faults import die, killed
from tests.support.leaf_files import (
    SPLITS,
    Samples,
    as_leaf,
    content_of,
    draw_samples,
    flip,
    rows,
    rows_of,
    write_arrays,
    write_leaf,
    writers_of,
)


@pytest.mark.parametrize(("strategy", "clients"), [("round_robin", 3), ("random", 3), ("natural", None)])
def test_every_sample_is_with_exactly_one_client_and_split(
    source: Path, samples: Samples, tmp_path: Path, strategy: str, clients: int | None
) -> None:
    made = write_shards(source, tmp_path / "shards", strategy, clients=clients)
    expected: Counter[tuple[int, bytes]] = sum((rows(*pair) for pair in samples.values()), Counter())
    assert rows_of(made, *SPLITS) == expected
    assert sorted(name for names in writers_of(made).values() for name in names) == sorted(samples)
    assert len(made) == (clients or 7)
    assert made.facts["totals"] == {"clients": len(made), "writers": 7, "train": 98, "val": 13, "test": 13}


def test_who_gets_which_writer_follows_from_strategy_seed_and_file(
    source: Path, shards: Manifest, samples: Samples, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = sorted(samples)
    assert writers_of(shards) == {"0": names[0::3], "1": names[1::3], "2": names[2::3]}
    drawn = [
        write_shards(source, tmp_path / f"{i}", "random", clients=3, seed=seed) for i, seed in enumerate((1, 1, 2))
    ]
    assert writers_of(drawn[0]) == writers_of(drawn[1]) != writers_of(drawn[2])
    fewer = write_shards(source, tmp_path / "fewer", "natural", clients=4, seed=3)
    assert all(len(writers) == 1 for writers in writers_of(fewer).values())
    assert fewer.facts["left_out"] == 3
    assert "3 of 7 writers go to no client" in caplog.text
    mapping = {"10": names[:2], "9": names[2:3], "hospital-a": names[3:]}
    (tmp_path / "mapping.json").write_text(json.dumps(mapping))
    named = write_shards(source, tmp_path / "named", "manual", mapping=tmp_path / "mapping.json")
    assert writers_of(named) == mapping
    assert list(named) == ["9", "10", "hospital-a"]
    assert named["hospital-a"].writers == 4
    with pytest.raises(DataError, match="with the ids 0 to 2 in partition.mapping"):
        export_artifacts(named.path, tmp_path / "femnist")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m, names: m["b"].append(names[0]), "writer f0000_00 is given to clients a and b"),
        (lambda m, names: m["a"].append(names[0]), "writer f0000_00 is given to client a twice"),
        (lambda m, names: m["b"].pop(), r"leaves 1 writers of the source out \(f0006_06\)"),
        (lambda m, names: m["b"].append("f9999"), "client b has writer 'f9999', who is not in the source"),
        (lambda m, names: m.__setitem__("twice", []), "names client a twice"),
        (lambda m, names: m.__setitem__("c", []), "client c must have a list of one writer or more"),
        (lambda m, names: m.__setitem__("../x", m.pop("b")), r"client id '\.\./x' must be 1 to 100 letters"),
    ],
)
def test_a_faulty_mapping_is_refused(
    source: Path, samples: Samples, tmp_path: Path, change: Callable[[Any, list[str]], object], said: str
) -> None:
    names = sorted(samples)
    mapping = {"a": names[:3], "b": names[3:]}
    change(mapping, names)
    text = json.dumps(mapping).replace('"twice"', '"a"')
    (tmp_path / "mapping.json").write_text(text)
    with pytest.raises(DataError, match=said):
        write_shards(source, tmp_path / "shards", "manual", mapping=tmp_path / "mapping.json")
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "dirichlet", "clients": 2}, "choose one of round_robin, random, natural, manual"),
        ({"strategy": "random"}, "set clients between 1 and 7"),
        ({"strategy": "natural", "clients": 8}, "clients=8 cannot share 7 writers"),
        ({"strategy": "round_robin", "clients": 0}, "clients=0"),
        ({"strategy": "manual"}, r"needs partition.mapping=FILE, JSON of the form"),
        ({"strategy": "random", "clients": 2, "val_fraction": 0.5, "test_fraction": 0.5}, "no training samples"),
        ({"strategy": "random", "clients": 2, "val_fraction": -0.1}, "at least 0"),
    ],
)
def test_impossible_settings_are_refused(source: Path, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        write_shards(source, tmp_path / "shards", **settings)


def test_every_writer_is_in_each_split_in_proportion(source: Path, samples: Samples, tmp_path: Path) -> None:
    made = write_shards(source, tmp_path / "shards", "natural", val_fraction=0.2, test_fraction=0.1)
    for client, (name, (_, labels)) in zip(made, sorted(samples.items()), strict=True):
        count = len(labels)
        sizes = {"val": round(count * 0.2 + 1e-9), "test": round(count * 0.1 + 1e-9)}
        assert made[client].num_samples == {"train": count - sum(sizes.values()), **sizes}, name


def test_a_writers_split_is_drawn_from_its_name_and_the_seed(source: Path, shards: Manifest, tmp_path: Path) -> None:
    natural = write_shards(source, tmp_path / "natural", "natural", seed=1)
    other_seed = write_shards(source, tmp_path / "other", "natural", seed=2)
    assert rows_of(natural, "test") == rows_of(shards, "test")
    assert rows_of(natural, "test") != rows_of(other_seed, "test")
    pair = draw_samples(40)["f0000_00"]
    twins = write_leaf(tmp_path / "leaf", as_leaf({"a": pair, "b": pair}))
    made = write_shards(twins, tmp_path / "shards of twins", "natural")
    a, b = (load_file(made.shard_path(client) / "test.safetensors")["images"] for client in made)
    assert a.shape == b.shape
    assert not np.array_equal(a, b)


def test_the_test_samples_of_leafs_own_split_stay_the_test_split(tmp_path: Path) -> None:
    own, held_out = draw_samples(20, 10), draw_samples(5, 4, seed=8)
    write_leaf(tmp_path / "leaf/train", as_leaf(own), "a.json")
    write_leaf(tmp_path / "leaf/test", as_leaf(held_out), "b.json")
    made = write_shards(tmp_path / "leaf", tmp_path / "shards", "natural")
    assert rows_of(made, "test") == sum((rows(*pair) for pair in held_out.values()), Counter())
    assert rows_of(made, "train", "val") == sum((rows(*pair) for pair in own.values()), Counter())
    assert [made[client].num_samples["val"] for client in made] == [2, 1]
    write_leaf(tmp_path / "leaf/test", as_leaf(held_out | draw_samples(9, prefix="g")), "b.json")
    with pytest.raises(DataError, match=r"client 2 would have no training sample \(writers g0000_00\)"):
        write_shards(tmp_path / "leaf", tmp_path / "other", "natural")
    assert not (tmp_path / "other").exists()


def test_every_form_of_the_source_gives_the_same_shards(source: Path, samples: Samples, tmp_path: Path) -> None:
    whole = write_leaf(tmp_path / "whole", as_leaf(samples, scale=1))
    arrays = write_arrays(tmp_path / "arrays", samples)
    numbers = write_arrays(tmp_path / "numbers", samples, list(range(5, 12)))
    forms = (source, whole, arrays, numbers)
    made = [write_shards(form, tmp_path / f"{i}", "random", clients=3) for i, form in enumerate(forms)]
    assert content_of(tmp_path / "0") == content_of(tmp_path / "1")
    assert writers_of(made[0]) == writers_of(made[2])  # whose samples are in another order
    assert rows_of(made[0], *SPLITS) == rows_of(made[2], *SPLITS) == rows_of(made[3], *SPLITS)


def test_the_exported_artifacts_hold_the_samples_of_the_shards(shards: Manifest, tmp_path: Path) -> None:
    path = export_artifacts(shards.path, tmp_path / "femnist")
    partition = load_partition(path)
    for split, artifact in (("train", "train"), ("val", "train"), ("test", "test")):
        shared = OfflineDataset(tmp_path / "femnist" / artifact)
        assert shared.classes == FEMNIST.classes
        for client in shards:
            own = DistributedShardLoader(shards.shard_path(client)).split(split)
            indices = getattr(partition, split)[int(client)]
            for a, b in zip(ClientLoader(own, np.arange(len(own)), 8), ClientLoader(shared, indices, 8), strict=True):
                assert torch.equal(a[0], b[0])
                assert torch.equal(a[1], b[1])
    assert partition.requested.tolist() == [list(shards[client].label_hist) for client in shards]
    assert sum(map(len, partition.train)) == shards.facts["totals"]["train"]


def test_an_export_leaves_no_partition_of_other_samples_and_reads_only_shards_of_the_manifest(
    source: Path, shards: Manifest, tmp_path: Path
) -> None:
    stale = export_artifacts(shards.path, tmp_path / "data")
    other = write_shards(source, tmp_path / "other", "random", clients=3, seed=9)
    export_artifacts(other.path, tmp_path / "data")
    assert not stale.exists()
    os.rename(shards.shard_path("1"), tmp_path / "aside")
    os.rename(other.shard_path("1"), shards.folder / "client_1")
    with pytest.raises(DataError, match="is not the shard that"):
        export_artifacts(shards.path, tmp_path / "femnist")


@pytest.mark.parametrize(
    ("event", "part"),
    [("open", "val.safetensors"), ("os.rename", ".client_4."), ("open", "/manifest.json"), ("os.rename", "/.killed.")],
)
def test_kill_9_and_the_same_command_again_end_alike(source: Path, tmp_path: Path, event: str, part: str) -> None:
    out = tmp_path / "killed"

    def write() -> None:
        sys.addaudithook(lambda name, args: die() if name == event and part in str(args[0]) else None)
        write_shards(source, out, "natural", seed=1)

    killed(write)
    assert not out.exists()
    write_shards(source, out, "natural", seed=1)
    write_shards(source, tmp_path / "whole", "natural", seed=1)
    assert content_of(out) == content_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "killed.lock", "whole", "whole.lock"]


def test_a_second_run_keeps_whole_shards_and_writes_damaged_ones_again(source: Path, shards: Manifest) -> None:
    before, inode = content_of(shards.folder), shards.folder.stat().st_ino
    write_shards(source, shards.folder, "round_robin", clients=3, seed=1)
    assert shards.folder.stat().st_ino == inode
    flip(shards.shard_path("1") / "val.safetensors", 500)
    write_shards(source, shards.folder, "round_robin", clients=3, seed=1)
    assert shards.folder.stat().st_ino != inode
    assert content_of(shards.folder) == before


@pytest.mark.parametrize(
    "settings", [{"seed": 2}, {"clients": 2}, {"val_fraction": 0.2}, {"source": "changed"}, {"manifest": "gone"}]
)
def test_shards_from_elsewhere_are_kept_unless_overwrite_is_set(
    source: Path, samples: Samples, shards: Manifest, tmp_path: Path, settings: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {"source": source, "strategy": "round_robin", "clients": 3, "seed": 1} | settings
    refusal = r"comes from another source.*overwrite=true"
    if arguments.pop("manifest", None):
        shards.path.unlink()
        refusal = r"no manifest at .*tools\.prepare_data .*overwrite=true"
    if arguments["source"] == "changed":
        name = sorted(samples)[0]
        images = samples[name][0].copy()
        images[0, 0] ^= 255
        arguments["source"] = write_leaf(tmp_path / "leaf", as_leaf(samples | {name: (images, samples[name][1])}))
    before = content_of(shards.folder)
    with pytest.raises(DataError, match=refusal):
        write_shards(out=shards.folder, **arguments)
    assert content_of(shards.folder) == before
    write_shards(out=shards.folder, overwrite=True, **arguments)
    write_shards(out=tmp_path / "fresh", **arguments)
    assert content_of(shards.folder) == content_of(tmp_path / "fresh")


def test_a_folder_with_other_files_is_not_replaced(source: Path, shards: Manifest) -> None:
    (shards.folder / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"thesis\.tex is not part of the shards: move it away"):
        write_shards(source, shards.folder, "natural", overwrite=True)
    assert (shards.folder / "thesis.tex").exists()


def test_a_full_disk_is_noticed_first(
    source: Path, shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content_of(shards.folder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 10}))
    with pytest.raises(DataError, match="make room"):
        write_shards(source, tmp_path / "new", "natural")
    with pytest.raises(DataError, match="make room"):
        write_shards(source, shards.folder, "natural", overwrite=True)
    assert not (tmp_path / "new").exists()
    assert content_of(shards.folder) == before
