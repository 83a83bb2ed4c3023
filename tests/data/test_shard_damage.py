"""Nothing damaged, forged or foreign is read as a shard."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flapp.data.artifact import DataError
from flapp.data.shards import dataset as shard_dataset
from flapp.data.shards.build import write_shards
from flapp.data.shards.client import DistributedShardLoader
from flapp.data.shards.manifest import Manifest
from tests.support.leaf_files import change_meta, flip
from tests.support.refusals import refused


def rewrite(path: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    tensors = load_file(path)
    images, labels = change(tensors["images"], tensors["labels"])
    save_file({"images": np.ascontiguousarray(images), "labels": np.ascontiguousarray(labels)}, path)


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def save(path: Path, **arrays: np.ndarray) -> None:
    save_file(arrays, path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (lambda f: f.rename(f.with_name("gone")), "no shard at .*dataset=DATASET dataset.source=DIR"),
    "missing meta": (lambda f: (f / "meta.json").unlink(), r"meta\.json is missing"),
    "missing split": (lambda f: (f / "val.safetensors").unlink(), r"val\.safetensors cannot be read \(No such file"),
    "meta cut": (lambda f: cut(f / "meta.json", 50), r"meta\.json is damaged"),
    "meta a list": (lambda f: (f / "meta.json").write_text("[]"), r"meta\.json is damaged .*make it again with"),
    "meta of a later format": (lambda f: change_meta(f, format_version=2), "format_version: .* got 2"),
    "meta without counts": (lambda f: change_meta(f, num_samples=7), "num_samples: .* got 7"),
    "meta of other writers": (lambda f: change_meta(f, writers=["me"]), "does not have the digest it states"),
    "meta of another client": (lambda f: change_meta(f, client_id="1"), "does not have the digest it states"),
    "wrong counts": (
        lambda f: change_meta(f, num_samples={"train": 9, "val": 4, "test": 4}),
        r"36 samples, .*json says 9",
    ),
    "wrong histogram": (
        lambda f: change_meta(f, label_hist=[36] + [0] * 61),
        "not the histogram of the training labels",
    ),
    "file cut": (lambda f: cut(f / "train.safetensors", 9), r"train\.safetensors is damaged"),
    "pickled file": (lambda f: (f / "train.safetensors").write_bytes(pickle.dumps([{}])), "damaged"),
    "bit in an image": (lambda f: flip(f / "train.safetensors", 5000), r"train\.safetensors has SHA-256"),
    "bit in a label": (lambda f: flip(f / "val.safetensors", -8), r"val\.safetensors has SHA-256"),
    "bit in the header": (lambda f: flip(f / "val.safetensors", 20), "client_2"),
    "images black": (lambda f: rewrite(f / "train.safetensors", lambda x, y: (x * 0, y)), "all zero"),
    "label 62": (lambda f: rewrite(f / "test.safetensors", lambda x, y: (x, y * 0 + 62)), "has label 62"),
    "few labels": (lambda f: rewrite(f / "train.safetensors", lambda x, y: (x[:24], y[:3])), r"labels I64 .3. "),
    "float images": (lambda f: rewrite(f / "train.safetensors", lambda x, y: (x / np.float32(255), y)), "images F32"),
    "other tensors": (lambda f: save(f / "train.safetensors", x=np.zeros(3)), r"x F64 \[3\] instead of"),
    "scalars": (lambda f: save(f / "test.safetensors", images=np.array(1), labels=np.array(1)), "instead of images U8"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_shard_is_refused_in_one_line(shards: Manifest, name: str) -> None:
    damage, said = DAMAGE[name]
    folder = shards.shard_path("2")
    damage(folder)
    with refused(DataError, said, path=folder):
        DistributedShardLoader(folder)


def test_a_forged_meta_over_black_images_is_still_refused(shards: Manifest, tmp_path: Path) -> None:
    folder = shards.shard_path("2")
    rewrite(folder / "train.safetensors", lambda x, y: (x * 0, y))
    loose = DistributedShardLoader(folder, strict_check=False)
    meta = json.loads((folder / "meta.json").read_text())
    sha256 = hashlib.sha256((folder / "train.safetensors").read_bytes()).hexdigest()
    change_meta(folder, sha256=meta["sha256"] | {"train.safetensors": sha256}, digest=loose.digest)
    with pytest.raises(DataError, match=r"every image of train\.safetensors is all zero"):
        DistributedShardLoader(folder)


def test_without_strict_check_faults_are_warnings(shards: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    folder = shards.shard_path("2")
    with pytest.raises(DataError, match="is the shard of client 2, not of client 7: set shard-path"):
        DistributedShardLoader(folder, expected_client_id="7")
    rewrite(folder / "train.safetensors", lambda x, y: (x[:30], y[:30]))
    shard = DistributedShardLoader(folder, strict_check=False, expected_client_id="7")
    assert shard.num_samples["train"] == sum(shard.label_hist) == len(shard.split("train")) == 30
    assert shard.digest != shards["2"].digest
    for said in ("has 30 samples, meta.json says 36", "has SHA-256", "not the histogram", "not of client 7"):
        assert said in caplog.text
    with pytest.raises(DataError, match="no split training: choose one of train, val, test"):
        shard.split("training")
    (folder / "train.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="damaged"):
        DistributedShardLoader(folder, strict_check=False)


def test_splits_may_be_empty(source: Path, tmp_path: Path) -> None:
    made = write_shards(source, tmp_path / "shards", "natural", val_fraction=0)
    shard = DistributedShardLoader(made.shard_path("0"))
    assert shard.num_samples["val"] == len(shard.split("val")) == 0
    assert list(shard_dataset.ShardStream(made.shard_path("0") / "val.safetensors")) == []
