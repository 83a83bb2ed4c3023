"""Shards: every sample with one client, the same bytes after any crash, and nothing damaged is ever read."""

import hashlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.utils.data import DataLoader

from flapp.data import (
    ClientLoader,
    DataError,
    DistributedShardLoader,
    Manifest,
    OfflineDataset,
    export_artifacts,
    load_manifest,
    load_partition,
    shard_dataset,
    write_shards,
)
from flapp.training import train
from tests.leaf_files import Samples, as_leaf, content_of, draw_samples, write_arrays, write_leaf

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def samples() -> Samples:
    return draw_samples(20, 12, 30, 11, 10, 16, 25)


@pytest.fixture(scope="module")
def source(samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_leaf(tmp_path_factory.mktemp("leaf"), as_leaf(samples))


@pytest.fixture
def shards(source: Path, tmp_path: Path) -> Manifest:
    return write_shards(source, tmp_path / "shards", "round_robin", clients=3, seed=1)


def rows(images: np.ndarray, labels: np.ndarray) -> Counter[tuple[int, bytes]]:
    return Counter((int(label), image.tobytes()) for image, label in zip(images, labels, strict=True))


def rows_of(manifest: Manifest, *splits: str) -> Counter[tuple[int, bytes]]:
    """Count every sample in the given splits of all shards, read without flapp."""
    found: Counter[tuple[int, bytes]] = Counter()
    for client in manifest:
        for split in splits:
            tensors = load_file(manifest.shard_path(client) / f"{split}.safetensors")
            found += rows(tensors["images"], tensors["labels"])
    return found


def writers_of(manifest: Manifest) -> dict[str, list[str]]:
    return {c: json.loads((manifest.shard_path(c) / "meta.json").read_text())["writers"] for c in manifest}


# Who gets what


@pytest.mark.parametrize(
    ("strategy", "clients"), [("round_robin", 3), ("random", 3), ("natural", None), ("natural", 7)]
)
def test_every_sample_is_with_exactly_one_client_and_split(
    source: Path, samples: Samples, tmp_path: Path, strategy: str, clients: int | None
) -> None:
    made = write_shards(source, tmp_path / "shards", strategy, clients=clients)
    expected: Counter[tuple[int, bytes]] = sum((rows(*pair) for pair in samples.values()), Counter())
    assert rows_of(made, *SPLITS) == expected
    assert sorted(name for names in writers_of(made).values() for name in names) == sorted(samples)
    assert len(made) == (clients or 7)
    assert made.facts["totals"] == {"clients": len(made), "writers": 7, "train": 98, "val": 13, "test": 13}


def test_round_robin_deals_sorted_writers_in_turn(shards: Manifest, samples: Samples) -> None:
    names = sorted(samples)
    assert writers_of(shards) == {"0": names[0::3], "1": names[1::3], "2": names[2::3]}


def test_random_depends_on_the_seed_alone(source: Path, tmp_path: Path) -> None:
    dealt = [
        writers_of(write_shards(source, tmp_path / str(i), "random", clients=3, seed=seed))
        for i, seed in enumerate([1, 1, 2])
    ]
    assert dealt[0] == dealt[1] != dealt[2]


def test_natural_draws_writers_when_there_are_more_than_clients(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = write_shards(source, tmp_path / "shards", "natural", clients=4, seed=3)
    assert all(len(names) == 1 for names in writers_of(made).values())
    assert made.facts["left_out"] == 3
    assert "3 of 7 writers go to no client" in caplog.text


def test_manual_follows_the_file(source: Path, samples: Samples, tmp_path: Path) -> None:
    names = sorted(samples)
    mapping = {"10": names[:2], "9": names[2:3], "hospital-a": names[3:]}
    (tmp_path / "mapping.json").write_text(json.dumps(mapping))
    made = write_shards(source, tmp_path / "shards", "manual", mapping=tmp_path / "mapping.json")
    assert writers_of(made) == mapping
    assert list(made) == ["9", "10", "hospital-a"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m, names: m["b"].append(names[0]), "writer f0000_00 is given to clients a and b"),
        (lambda m, names: m["a"].append(names[0]), "writer f0000_00 is given to client a twice"),
        (lambda m, names: m["b"].pop(), r"gives 1 writers of the source to nobody \(f0006_06\)"),
        (lambda m, names: m["b"].append("f9999"), "client b has writer 'f9999', who is not in the source"),
        (lambda m, names: m.__setitem__("c", []), "client c must have a list of one writer or more"),
        (lambda m, names: m.__setitem__("../x", m.pop("b")), r"client id '\.\./x' must be letters"),
    ],
)
def test_a_manual_mapping_with_a_fault_is_refused_before_anything_is_written(
    source: Path, samples: Samples, tmp_path: Path, change: Callable[[Any, list[str]], object], said: str
) -> None:
    names = sorted(samples)
    mapping = {"a": names[:3], "b": names[3:]}
    change(mapping, names)
    (tmp_path / "mapping.json").write_text(json.dumps(mapping))
    with pytest.raises(DataError, match=said):
        write_shards(source, tmp_path / "shards", "manual", mapping=tmp_path / "mapping.json")
    assert not (tmp_path / "shards").exists()


def test_a_client_named_twice_in_a_mapping_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mapping.json").write_text('{"a": ["f0000_00"], "a": ["f0001_01"]}')
    with pytest.raises(DataError, match="names client a twice"):
        write_shards(source, tmp_path / "shards", "manual", mapping=tmp_path / "mapping.json")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "dirichlet", "clients": 2}, "choose one of round_robin, random, natural, manual"),
        ({"strategy": "random"}, "set clients between 1 and 7"),
        ({"strategy": "natural", "clients": 8}, "clients=8 cannot share 7 writers"),
        ({"strategy": "round_robin", "clients": 0}, "clients=0"),
        ({"strategy": "manual"}, "needs a mapping file"),
        ({"strategy": "random", "clients": 2, "val_fraction": 0.5, "test_fraction": 0.5}, "no training samples"),
        ({"strategy": "random", "clients": 2, "val_fraction": -0.1}, "at least 0"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(
    source: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        write_shards(source, tmp_path / "shards", **settings)


def test_every_writer_is_in_each_split_in_proportion(source: Path, samples: Samples, tmp_path: Path) -> None:
    made = write_shards(source, tmp_path / "shards", "natural", val_fraction=0.2, test_fraction=0.1)
    for client, (name, (_, labels)) in zip(made, sorted(samples.items()), strict=True):
        count = len(labels)
        sizes = {"val": round(count * 0.2 + 1e-9), "test": round(count * 0.1 + 1e-9)}
        assert made[client].num_samples == {"train": count - sum(sizes.values()), **sizes}, name


def test_a_writers_split_is_the_same_whichever_client_has_it(source: Path, shards: Manifest, tmp_path: Path) -> None:
    natural = write_shards(source, tmp_path / "natural", "natural", seed=1)
    other_seed = write_shards(source, tmp_path / "other", "natural", seed=2)
    assert rows_of(natural, "test") == rows_of(shards, "test")
    assert rows_of(natural, "test") != rows_of(other_seed, "test")


def test_the_test_samples_of_leafs_own_split_stay_the_test_split(tmp_path: Path) -> None:
    own, held_out = draw_samples(20, 10), draw_samples(5, 4, seed=8)
    write_leaf(tmp_path / "leaf/train", as_leaf(own), "a.json")
    write_leaf(tmp_path / "leaf/test", as_leaf(held_out), "b.json")
    made = write_shards(tmp_path / "leaf", tmp_path / "shards", "natural")
    assert rows_of(made, "test") == sum((rows(*pair) for pair in held_out.values()), Counter())
    assert rows_of(made, "train", "val") == sum((rows(*pair) for pair in own.values()), Counter())
    assert [made[client].num_samples["val"] for client in made] == [2, 1]


def test_a_client_without_training_samples_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_leaf(tmp_path / "leaf/train", as_leaf(draw_samples(9)), "a.json")
    write_leaf(tmp_path / "leaf/test", as_leaf(draw_samples(9, prefix="g")), "b.json")
    with pytest.raises(DataError, match=r"client 1 would have no training sample \(writers g0000_00\)"):
        write_shards(tmp_path / "leaf", tmp_path / "shards", "natural")
    assert not (tmp_path / "shards").exists()


# The same bytes


def test_whole_numbers_and_floats_give_identical_shards(source: Path, samples: Samples, tmp_path: Path) -> None:
    whole = write_leaf(tmp_path / "whole", as_leaf(samples, scale=1))
    write_shards(source, tmp_path / "a", "random", clients=3)
    write_shards(whole, tmp_path / "b", "random", clients=3)
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


def test_arrays_and_leaf_hold_the_same_samples_with_the_same_clients(
    source: Path, samples: Samples, tmp_path: Path
) -> None:
    arrays = write_arrays(tmp_path / "arrays", samples)
    made = [write_shards(path, tmp_path / f"{i}", "random", clients=3) for i, path in enumerate([source, arrays])]
    assert writers_of(made[0]) == writers_of(made[1])
    assert rows_of(made[0], *SPLITS) == rows_of(made[1], *SPLITS)


def test_the_tensors_are_plain_safetensors_of_the_promised_kind(shards: Manifest) -> None:
    for client in shards:
        for split in SPLITS:
            tensors = load_file(shards.shard_path(client) / f"{split}.safetensors")
            count = shards[client].num_samples[split]
            assert {name: (str(t.dtype), t.shape) for name, t in tensors.items()} == {
                "images": ("uint8", (count, 28, 28)),
                "labels": ("int64", (count,)),
            }


KILLED = """
import os, signal, sys
from pathlib import Path
from flapp.data import write_shards
event, part, count = sys.argv[3], sys.argv[4], int(sys.argv[5])
def die(name, args):
    global count
    if name == event and part in str(args[0]):
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
write_shards(Path(sys.argv[1]), Path(sys.argv[2]), "natural", seed=1)
"""


@pytest.mark.parametrize(
    ("event", "part", "count"),
    [
        ("open", ".client_2.tmp/val.safetensors", 1),
        ("open", ".client_4.tmp/meta.json", 1),
        ("os.rename", ".client_", 6),
        ("open", ".clients.idx.tmp", 1),
        ("os.rename", ".manifest.json.tmp", 1),
    ],
)
def test_kill_9_and_the_same_command_again_end_in_identical_bytes(
    source: Path, tmp_path: Path, event: str, part: str, count: int
) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(source), str(out), event, part, str(count)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    finished = {path.name: (path / "meta.json").stat().st_mtime_ns for path in out.glob("client_*")}
    write_shards(source, out, "natural", seed=1)
    write_shards(source, tmp_path / "whole", "natural", seed=1)
    assert content_of(out) == content_of(tmp_path / "whole")
    assert {name: (out / name / "meta.json").stat().st_mtime_ns for name in finished} == finished


def test_a_second_run_writes_only_the_shard_that_was_damaged(source: Path, shards: Manifest, tmp_path: Path) -> None:
    before = content_of(shards.folder)
    times = {client: (shards.shard_path(client) / "meta.json").stat().st_mtime_ns for client in shards}
    flip(shards.shard_path("1") / "val.safetensors", 500)
    write_shards(source, shards.folder, "round_robin", clients=3, seed=1)
    assert content_of(shards.folder) == before
    again = {client: (shards.shard_path(client) / "meta.json").stat().st_mtime_ns for client in shards}
    assert {client for client in again if again[client] != times[client]} == {"1"}


@pytest.mark.parametrize(
    "settings",
    [
        {"clients": 3, "seed": 2},
        {"clients": 2, "seed": 1},
        {"clients": 3, "seed": 1, "val_fraction": 0.2},
    ],
)
def test_shards_of_other_settings_are_kept_unless_overwrite_is_set(
    source: Path, shards: Manifest, tmp_path: Path, settings: dict[str, Any]
) -> None:
    before = content_of(shards.folder)
    with pytest.raises(DataError, match="overwrite=true"):
        write_shards(source, shards.folder, "round_robin", **settings)
    assert content_of(shards.folder) == before
    write_shards(source, shards.folder, "round_robin", overwrite=True, **settings)
    write_shards(source, tmp_path / "fresh", "round_robin", **settings)
    assert content_of(shards.folder) == content_of(tmp_path / "fresh")


def test_a_source_that_changed_is_noticed(samples: Samples, shards: Manifest, tmp_path: Path) -> None:
    name = sorted(samples)[0]
    images = samples[name][0].copy()
    images[0, 0] ^= 255
    changed = write_leaf(tmp_path / "changed", as_leaf(samples | {name: (images, samples[name][1])}))
    with pytest.raises(DataError, match=r"client_0 comes from another source.*overwrite=true"):
        write_shards(changed, shards.folder, "round_robin", clients=3, seed=1)


def test_a_full_disk_is_noticed_before_writing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 10}))
    with pytest.raises(DataError, match="make room"):
        write_shards(source, tmp_path / "shards", "natural")
    assert list((tmp_path / "shards").iterdir()) == []


def test_preparing_shards_needs_no_torch(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flapp.data import write_shards, DistributedShardLoader;"
        "m = write_shards(Path(sys.argv[1]), Path(sys.argv[2]), 'natural');"
        "DistributedShardLoader(m.shard_path('0')); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "shards")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "False\n"


# Reading


def test_a_shard_says_what_it_holds(shards: Manifest, caplog: pytest.LogCaptureFixture) -> None:
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


def test_digests_differ_between_clients_and_contents(shards: Manifest, source: Path, tmp_path: Path) -> None:
    other = write_shards(source, tmp_path / "other", "round_robin", clients=3, seed=2)
    digests = [record.digest for made in (shards, other) for record in made.values()]
    assert len(set(digests)) == 6


def test_client_loader_reads_a_split_like_any_dataset(shards: Manifest) -> None:
    path = shards.shard_path("0")
    split = DistributedShardLoader(path).split("train")
    tensors = load_file(path / "train.safetensors")
    assert (split.images.shape[1:], split.images.dtype, split.labels.dtype) == ((28, 28, 1), torch.uint8, torch.int64)
    assert len(split.classes) == 62
    inputs, labels = next(iter(ClientLoader(split, np.arange(len(split)), batch_size=8)))
    expected = (torch.from_numpy(tensors["images"][:8]).float() / 255 - 0.5) / 0.5
    assert torch.allclose(inputs[:, 0], expected)
    assert labels.tolist() == tensors["labels"][:8].tolist()
    assert torch.equal(split[3][0], inputs[3])
    assert split[3][1] == labels[3]


def test_a_split_pickles_as_its_file(shards: Manifest) -> None:
    split = DistributedShardLoader(shards.shard_path("0")).split("test")
    content = pickle.dumps(split)
    assert len(content) < 1000
    assert torch.equal(pickle.loads(content).images, split.images)  # noqa: S301


def test_streaming_yields_the_same_samples_in_the_same_order(shards: Manifest) -> None:
    path = shards.shard_path("0")
    whole = DistributedShardLoader(path).split("train")
    stream = DistributedShardLoader(path, streaming=True).split("train")
    streamed = list(stream)
    assert len(streamed) == len(whole)
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(streamed, whole, strict=True))


def test_streaming_holds_one_block_at_a_time(shards: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = shard_dataset.read_rows
    monkeypatch.setattr(
        shard_dataset, "read_rows", lambda path, start, end: read.append(end - start) or original(path, start, end)
    )
    path = shards.shard_path("0") / "train.safetensors"
    stream = iter(shard_dataset.ShardStream(path, block=8, batch_size=4))
    assert next(stream)[0].shape == (4, 1, 28, 28)
    assert read == [8]
    sizes = [4] + [len(labels) for _, labels in stream]
    assert max(read) == 8
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


AUDITED = """
import os, sys
from pathlib import Path
from flapp.data import DistributedShardLoader, shard_dataset
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event in ("open", "os.listdir", "os.scandir") else None)
for streaming in (False, True):
    shard = DistributedShardLoader(sys.argv[1], streaming=streaming, expected_client_id="1")
    for split in ("train", "val", "test"):
        list(shard.split(split))
paths = {os.path.abspath(os.fsdecode(path)) for path in opened if not isinstance(path, int)}
print("\\n".join(sorted(paths)))
"""


def test_a_client_opens_files_in_its_own_folder_only(shards: Manifest) -> None:
    path = shards.shard_path("1")
    command = [sys.executable, "-c", AUDITED, str(path)]
    opened = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert opened == sorted(str(path / name) for name in ["meta.json", *(f"{s}.safetensors" for s in SPLITS)])


def test_a_shard_is_read_without_its_siblings_and_its_manifest(shards: Manifest, tmp_path: Path) -> None:
    alone = shards.shard_path("1").rename(tmp_path / "alone")
    for path in shards.folder.iterdir():
        os.rename(path, tmp_path / f"gone_{path.name}")
    assert DistributedShardLoader(alone).num_samples["train"] > 0


# Damage


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    tensors = load_file(path)
    images, labels = change(tensors["images"], tensors["labels"])
    save_file({"images": np.ascontiguousarray(images), "labels": np.ascontiguousarray(labels)}, path)


def restate(folder: Path, **values: Any) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | values))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (lambda f: f.rename(f.with_name("gone")), "no shard at .*dataset=femnist dataset.source=DIR"),
    "missing meta": (lambda f: (f / "meta.json").unlink(), r"meta\.json is missing"),
    "missing split": (lambda f: (f / "val.safetensors").unlink(), r"val\.safetensors is missing"),
    "meta cut": (
        lambda f: (f / "meta.json").write_bytes((f / "meta.json").read_bytes()[:99]),
        r"meta\.json is damaged",
    ),
    "meta binary": (lambda f: (f / "meta.json").write_bytes(b"\xff\x00"), r"meta\.json is damaged"),
    "meta a list": (lambda f: (f / "meta.json").write_text("[]"), "is not of a shard of format 1"),
    "meta of a later format": (lambda f: restate(f, format_version=2), "format_version 2"),
    "meta without counts": (lambda f: restate(f, num_samples=7), "num_samples is missing or of a wrong type"),
    "meta of other writers": (lambda f: restate(f, writers=["me"]), "does not have the digest it states"),
    "meta of another client": (lambda f: restate(f, client_id="1"), "does not have the digest it states"),
    "wrong counts": (
        lambda f: restate(f, num_samples={"train": 9, "val": 4, "test": 4}),
        r"train\.safetensors has 36 samples, meta\.json says 9",
    ),
    "wrong histogram": (lambda f: restate(f, label_hist=[36] + [0] * 61), "not the histogram of the training labels"),
    "file cut": (
        lambda f: (f / "train.safetensors").write_bytes((f / "train.safetensors").read_bytes()[:-9]),
        r"train\.safetensors is damaged",
    ),
    "file empty": (lambda f: (f / "test.safetensors").write_bytes(b""), r"test\.safetensors is damaged"),
    "pickled file": (
        lambda f: np.save(f / "a.npy", np.array([{}]), True) or (f / "a.npy").rename(f / "train.safetensors"),
        "damaged",
    ),
    "bit in an image": (lambda f: flip(f / "train.safetensors", 5000), r"train\.safetensors has SHA-256"),
    "bit in a label": (lambda f: flip(f / "val.safetensors", -8), r"val\.safetensors has SHA-256"),
    "bit in the header": (lambda f: flip(f / "val.safetensors", 20), "client_2"),
    "splits exchanged": (
        lambda f: (f / "val.safetensors").write_bytes((f / "test.safetensors").read_bytes()),
        r"val\.safetensors has SHA-256",
    ),
    "labels rolled": (lambda f: rewrite(f / "train.safetensors", lambda x, y: (x, np.roll(y, 1))), "SHA-256"),
    "images black": (lambda f: rewrite(f / "train.safetensors", lambda x, y: (x * 0, y)), "all zero"),
    "label 62": (lambda f: rewrite(f / "test.safetensors", lambda x, y: (x, y * 0 + 62)), "has label 62"),
    "label -1": (lambda f: rewrite(f / "test.safetensors", lambda x, y: (x, y * 0 - 1)), "has label -1"),
    "more images than labels": (
        lambda f: rewrite(f / "train.safetensors", lambda x, y: (x[:24], y[:3])),
        r"images U8 \[24, 28, 28\], labels I64 \[3\] instead of",
    ),
    "float images": (lambda f: rewrite(f / "train.safetensors", lambda x, y: (x / np.float32(255), y)), "images F32"),
    "images of 32 pixels": (
        lambda f: rewrite(f / "train.safetensors", lambda x, y: (np.zeros((len(y), 32, 32), np.uint8), y)),
        "instead of images U8",
    ),
    "other tensors": (lambda f: save_file({"x": np.zeros(3)}, f / "train.safetensors"), r"x F64 \[3\] instead of"),
    "scalars": (
        lambda f: save_file({"images": np.array(1), "labels": np.array(1)}, f / "train.safetensors"),
        "instead of images U8",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_shard_is_refused_in_one_line(shards: Manifest, name: str) -> None:
    damage, said = DAMAGE[name]
    folder = shards.shard_path("2")
    damage(folder)
    with pytest.raises(DataError, match=said) as refusal:
        DistributedShardLoader(folder)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_a_forged_meta_over_black_images_is_still_refused(shards: Manifest, tmp_path: Path) -> None:
    folder = shards.shard_path("2")
    rewrite(folder / "train.safetensors", lambda x, y: (x * 0, y))
    loose = DistributedShardLoader(folder, strict_check=False)
    meta = json.loads((folder / "meta.json").read_text())
    sha256 = hashlib.sha256((folder / "train.safetensors").read_bytes()).hexdigest()
    restate(folder, sha256=meta["sha256"] | {"train.safetensors": sha256}, digest=loose.digest)
    with pytest.raises(DataError, match=r"every image of train\.safetensors is all zero"):
        DistributedShardLoader(folder)


def test_client_1_does_not_run_on_the_shard_of_client_2(shards: Manifest) -> None:
    with pytest.raises(DataError, match="is the shard of client 2, not of client 1: set shard-path"):
        DistributedShardLoader(shards.shard_path("2"), expected_client_id="1")


def test_without_strict_check_faults_are_warnings_and_the_tensors_count(
    shards: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shards.shard_path("2")
    rewrite(folder / "train.safetensors", lambda x, y: (x[:30], y[:30]))
    shard = DistributedShardLoader(folder, strict_check=False, expected_client_id="7")
    assert shard.num_samples["train"] == sum(shard.label_hist) == len(shard.split("train")) == 30
    assert shard.digest != shards["2"].digest
    for said in ("has 30 samples, meta.json says 36", "has SHA-256", "not the histogram", "not of client 7"):
        assert said in caplog.text


def test_without_strict_check_a_file_that_cannot_be_read_is_still_an_error(shards: Manifest) -> None:
    (shards.shard_path("2") / "train.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="damaged"):
        DistributedShardLoader(shards.shard_path("2"), strict_check=False)


def test_an_unknown_split_is_named(shards: Manifest) -> None:
    with pytest.raises(DataError, match="no split training: choose one of train, val, test"):
        DistributedShardLoader(shards.shard_path("2")).split("training")


def test_splits_may_be_empty(source: Path, tmp_path: Path) -> None:
    made = write_shards(source, tmp_path / "shards", "natural", val_fraction=0)
    shard = DistributedShardLoader(made.shard_path("0"))
    assert shard.num_samples["val"] == len(shard.split("val")) == 0
    assert list(shard_dataset.ShardStream(made.shard_path("0") / "val.safetensors")) == []


# As shared artifacts


def test_shards_and_the_exported_artifacts_train_the_same_model(shards: Manifest, tmp_path: Path) -> None:
    path = export_artifacts(shards.path, tmp_path / "femnist")
    partition = load_partition(path)

    def model_of(dataset: Any, indices: np.ndarray) -> torch.nn.Module:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 62))
        loader = ClientLoader(dataset, indices, batch_size=8, seed=3)
        train(model, loader, torch.optim.SGD(model.parameters(), lr=0.1), epochs=2)
        return model

    for split in ("train", "test"):
        shared = OfflineDataset(tmp_path / "femnist" / split)
        assert shared.classes == shard_dataset.ShardSplit.classes
        for client in shards:
            own = DistributedShardLoader(shards.shard_path(client)).split(split)
            indices = getattr(partition, split)[int(client)]
            assert torch.equal(shared.images[indices], own.images)
            assert torch.equal(shared.labels[indices], own.labels)
            a, b = model_of(own, np.arange(len(own))), model_of(shared, indices)
            assert all(torch.equal(a.state_dict()[key], b.state_dict()[key]) for key in a.state_dict())
    assert partition.requested.tolist() == [list(shards[client].label_hist) for client in shards]
    assert sum(map(len, partition.train)) == shards.facts["totals"]["train"]


def test_a_shard_that_is_not_the_manifests_is_not_exported(source: Path, shards: Manifest, tmp_path: Path) -> None:
    other = write_shards(source, tmp_path / "other", "round_robin", clients=3, seed=9)
    os.rename(shards.shard_path("1"), tmp_path / "aside")
    os.rename(other.shard_path("1"), shards.folder / "client_1")
    with pytest.raises(DataError, match="is not the shard that"):
        export_artifacts(shards.path, tmp_path / "femnist")


def test_named_clients_cannot_be_exported_as_a_partition(source: Path, samples: Samples, tmp_path: Path) -> None:
    (tmp_path / "mapping.json").write_text(json.dumps({"a": sorted(samples)}))
    made = write_shards(source, tmp_path / "shards", "manual", mapping=tmp_path / "mapping.json")
    assert load_manifest(made.folder)["a"].writers == 7
    with pytest.raises(DataError, match="a partition counts them 0 to 0"):
        export_artifacts(made.path, tmp_path / "femnist")
