"""Samples of any kind: images are decoded, all others reach the model as they are stored; labels have any shape."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from flapp.client.data import make_batches, open_client_data
from flapp.config.load import compose
from flapp.config.schema import Config, NodeConfig
from flapp.data.artifact import DTYPES, DataError, open_artifact, read_meta, write_artifact
from flapp.data.images import materialize
from flapp.data.loader import ClientLoader
from flapp.data.offline import OfflineDataset
from flapp.data.sources import EMBEDDED, ensure_artifacts, is_own, named
from flapp.partitions import open_partition
from tests.conftest import Federate, read_clients
from tests.support.refusals import refused
from tools.partition_heatmap import read_tables
from tools.verify_data import verify

CLASSES = ["a", "b", "c"]
NODE = NodeConfig(partition_id=0, num_partitions=1)

DRAW = np.random.default_rng(0)
SAMPLES = {
    "token ids": DRAW.integers(0, 50_000, (84, 12)),
    "vectors": DRAW.normal(size=(84, 5)).astype(np.float32),
    "series": DRAW.normal(size=(84, 6, 2)).astype(np.float16),
    "float images": DRAW.random((84, 4, 4, 3), np.float32),
    "flags": DRAW.random((84, 9)) > 0.5,
    "bytes": DRAW.integers(0, 256, (84, 7), dtype=np.uint8),
    "numbers": DRAW.integers(-9, 9, 84, dtype=np.int32),
    "images": DRAW.integers(0, 256, (84, 4, 4, 1), dtype=np.uint8),
}
LABELS = {
    "classes": np.arange(84) % 3,
    "numbers": DRAW.normal(size=84).astype(np.float32),
    "several targets": DRAW.normal(size=(84, 2)).astype(np.float32),
    "many labels": (DRAW.random((84, 4)) > 0.5).astype(np.float32),
    "token targets": DRAW.integers(0, 50_000, (84, 12)),
    "counts": DRAW.integers(-5, 1 << 40, 84),
}


def write(home: Path, samples: np.ndarray, labels: np.ndarray, classes: list[str], *more: str) -> Config:
    """Write a dataset and return settings for a run on it."""
    folder = home / "data" / "own"
    write_artifact(folder / "train", samples[:60], labels[:60], classes)
    write_artifact(folder / "test", samples[60:], labels[60:], classes)
    shape = str(list(samples.shape[1:])).replace(" ", "")
    words = ["dataset=custom", "dataset.name=own", f"dataset.shape={shape}", f"dataset.classes={len(classes)}"]
    objective = [] if classes else ["evaluate.objective=loss"]
    return compose([f"home={home}", "model=linear", "partition=iid", "clients=4", *words, *objective, *more])


KINDS = [*((kind, "classes") for kind in SAMPLES), *(("vectors", target) for target in LABELS if target != "classes")]


@pytest.mark.parametrize(("kind", "target"), KINDS)
def test_a_batch_holds_the_samples_and_labels_that_were_written(tmp_path: Path, kind: str, target: str) -> None:
    samples, labels = SAMPLES[kind], LABELS[target]
    config = write(tmp_path, samples, labels, CLASSES if target == "classes" else [], "dataset.normalization=none")
    rows = open_partition(config).train[1]
    data = open_client_data(config, NODE, "1")
    inputs, targets = zip(*make_batches(config, data, "train", torch.device("cpu"), None), strict=True)
    stored = samples.transpose(0, 3, 1, 2) / np.float32(255) if kind == "images" else samples
    found = torch.cat([batch.clone() for batch in inputs])
    assert found.dtype == torch.from_numpy(stored).dtype
    np.testing.assert_allclose(found.numpy(), stored[rows], rtol=1e-6 if kind == "images" else 0)
    np.testing.assert_array_equal(torch.cat(targets).numpy(), labels[rows], strict=True)
    histogram = tuple(np.bincount(labels[rows], minlength=3)) if target == "classes" else ()
    assert (data.claim.train, data.claim.label_hist) == (len(rows), histogram)
    sample, label = OfflineDataset(tmp_path / "data/own/test", normalization="none")[3]
    np.testing.assert_allclose(sample.numpy(), stored[63], rtol=1e-6 if kind == "images" else 0)
    np.testing.assert_array_equal(np.asarray(label), labels[63])
    assert not [check for check in verify(tmp_path / "data" / "own", None) if not check.ok]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefetch", [0, 1])
def test_every_dtype_is_shuffled_by_the_same_seed_alike(tmp_path: Path, dtype: str, prefetch: int) -> None:
    values = np.arange(40).astype(dtype).reshape(20, 2)
    write_artifact(tmp_path / "train", values, np.arange(20, dtype=np.float32), [])
    loader = ClientLoader(OfflineDataset(tmp_path / "train"), np.arange(4, 20), 3, seed=7, prefetch=prefetch)
    order = np.arange(4, 20)[torch.randperm(16, generator=torch.Generator().manual_seed(7)).numpy()]
    for (inputs, labels), rows in zip(loader, np.split(order, range(3, 16, 3)), strict=True):
        np.testing.assert_array_equal(inputs.numpy(), values[rows], strict=True)
        assert labels.tolist() == rows.tolist()


@pytest.mark.parametrize("kind", ["dirichlet", "pathological"])
def test_partitions_by_class_work_with_token_ids(tmp_path: Path, kind: str) -> None:
    config = write(tmp_path, SAMPLES["token ids"], LABELS["classes"], CLASSES, f"partition={kind}")
    claims = [open_client_data(config, NODE, str(client)).claim for client in range(4)]
    assert np.sum([claim.label_hist for claim in claims], axis=0).tolist() == [20, 20, 20]
    (saved,) = (tmp_path / "data/own/partitions").glob(f"{kind}-*.safetensors")
    tables, classes = read_tables(saved, tmp_path / "data" / "own")
    assert (tables["train, actual"].sum(), classes) == (60, tuple(CLASSES))


@pytest.mark.parametrize("target", ["several targets", "token targets", "counts"])
def test_samples_for_validation_are_held_out_whatever_the_labels_are(tmp_path: Path, target: str) -> None:
    more = ("evaluate.validation_fraction=0.2",)
    partition = open_partition(write(tmp_path, SAMPLES["vectors"], LABELS[target], [], *more))
    assert [len(rows) for rows in partition.val] == [3] * 4
    assert sorted(np.concatenate([*partition.train, *partition.val]).tolist()) == list(range(60))
    assert partition.requested.shape == (4, 0)  # integers are not classes here


def test_the_digest_of_other_kinds_tells_equal_bytes_of_another_dtype_or_shape_apart(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.int32).reshape(4, 6)
    forms = [values, values.view(np.float32), values.reshape(4, 2, 3), values.view(np.int64)]
    for n, form in enumerate(forms):
        write_artifact(tmp_path / str(n), form, np.arange(4), CLASSES + ["d"])
    assert len({open_artifact(tmp_path / str(n)).digest for n in range(len(forms))}) == len(forms)
    assert len({str(read_meta(tmp_path / str(n))["images"]["blocks"]) for n in range(len(forms))}) == 1


def test_artifacts_that_were_possible_before_keep_their_digests_and_bytes(tmp_path: Path) -> None:
    """The expected values are those of flapp before other kinds of samples were possible."""
    images = np.arange(96, dtype=np.uint8).reshape(4, 4, 2, 3)
    write_artifact(tmp_path / "a", images, np.array([0, 1, 2, 0]), CLASSES)
    write_artifact(tmp_path / "b", images.reshape(4, -1).astype(np.float32), np.arange(4, dtype=np.float32), [])
    assert [open_artifact(tmp_path / name).digest[:16] for name in "ab"] == ["959ecafff5065380", "dce879c3e0b9bf8d"]


def test_image_settings_are_refused_for_other_data(tmp_path: Path) -> None:
    write(tmp_path, SAMPLES["float images"], LABELS["classes"], CLASSES)
    for setting, fix in {
        "dataset.augment=true": "dataset.augment=false",
        "dataset.normalization=imagenet": "dataset.normalization=half",
        "dataset.materialize=8": "dataset.materialize=null",
        "model.image_size=8": "model.image_size=null",
    }.items():
        config = write(tmp_path, SAMPLES["float images"], LABELS["classes"], CLASSES, setting)
        reason = rf"train holds no images \(uint8 with 4 axes\) but float32 \[60, 4, 4, 3\].*: set {re.escape(fix)}$"
        with pytest.raises(DataError, match=reason):
            open_partition(config)
    dataset = OfflineDataset(tmp_path / "data/own/train")
    loader_settings = {"augment": True, "image_size": 8, "output": "uint8"}
    for given, fix in zip(loader_settings.items(), ("augment=False", "image_size=None", "output=float32"), strict=True):
        with pytest.raises(DataError, match=f"set {fix}"):
            ClientLoader(dataset, np.arange(3), 2, seed=0, **dict([given]))  # type: ignore[arg-type]
    for given, fix in (({"transform": abs}, "transform=None"), ({"normalization": "imagenet"}, "normalization='half'")):
        with pytest.raises(DataError, match=f"set {fix}"):
            OfflineDataset(tmp_path / "data/own/train", **given)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="does not hold images"):
        materialize(tmp_path / "data/own/train", 8)


def test_splits_of_two_kinds_are_refused(tmp_path: Path) -> None:
    samples, labels = SAMPLES["vectors"], LABELS["several targets"]
    config = write(tmp_path, samples, labels, [])
    for other, found in (
        ((samples.astype(np.float64), labels), r"tests on float64 \[N, 5\] with labels float32 \[N, 2\]"),
        ((samples, labels[:, :1]), r"tests on float32 \[N, 5\] with labels float32 \[N, 1\]"),
    ):
        write_artifact(tmp_path / "data/own/test", other[0][60:], other[1][60:], [])
        with pytest.raises(
            DataError, match=rf"trains on float32 \[N, 5\] with labels float32 \[N, 2\] and {found}: write both"
        ):
            open_partition(config)
        failed = [check for check in verify(tmp_path / "data" / "own", None) if not check.ok]
        assert [check.name for check in failed] == ["fits train"]


def test_a_federation_learns_from_vectors_with_classes(tmp_path: Path, federate: Federate) -> None:
    labels = LABELS["classes"]
    samples = np.eye(3, dtype=np.float16)[labels] + DRAW.normal(scale=0.1, size=(84, 3)).astype(np.float16)
    write(tmp_path, samples.astype(np.float32), labels, CLASSES)
    words = ("dataset=custom", "dataset.name=own", "dataset.shape=[3]", "dataset.classes=3", "clients=3")
    more = ("partition=iid", "model=linear", "num_rounds=3", "train.lr=1", "evaluate.central=true")
    summary, path = federate(f"home={tmp_path}", "run_name=own", *words, *more)
    assert summary["accuracy"] == 1.0
    assert sum(sum(line["labels"]) for line in read_clients(path).values()) == 60


# Datasets that a function makes


def made(samples: Any = None, labels: Any = None, **change: Any) -> Any:
    """Return what a function makes: two splits of token ids in three classes."""
    one = (np.zeros((6, 4), np.int64) if samples is None else samples, np.arange(6) % 3 if labels is None else labels)
    splits = {"train": one, "test": (np.ones((3, 4), np.int64), np.arange(3))} | change
    return {name: arrays for name, arrays in splits.items() if arrays is not None}, CLASSES


def test_a_dataset_that_a_function_makes_is_made_once(tmp_path: Path) -> None:
    make = Mock(side_effect=made)
    with pytest.raises(ZeroDivisionError):
        ensure_artifacts(tmp_path, "own", lambda: 1 / 0)
    assert not (tmp_path / "own").exists()
    with ThreadPoolExecutor(4) as clients:
        folders = set(clients.map(lambda _: ensure_artifacts(tmp_path, "own", make), range(4)))
    assert (folders, make.call_count) == ({tmp_path / "own"}, 1)
    train, test = (open_artifact(tmp_path / "own" / split, verify=True) for split in ("train", "test"))
    assert (train.images.shape, test.images.shape, train.classes) == ((6, 4), (3, 4), tuple(CLASSES))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "got None: the function must return"),
        ([1, 2], "got 1: the function must return"),
        (({}, [], 3), "at most 2 items .* got a tuple: the function must return"),
        (([], CLASSES), "got a list: the function must return"),
        (made(test=None), "0: .* at least 2 items .*: the function must return .*test"),
        (made(val=made()[0]["train"]), r"0\.val.*: .* 'train' or 'test', got 'val': the function must return"),
        ((made()[0], "abc"), "1: .* got 'abc': .* a list of texts"),
        ((made()[0], {"a", "b", "c"}), "1: .* got a set: .* a list of texts"),
        ((made()[0], [1, 2, 3]), r"1\.0: .* got 1: .* a list of texts"),
        (made(train=np.zeros(3)), r"0\.train: .* got a ndarray: the function must return"),
        (made(train=(np.zeros(3),)), r"0\.train\.1: Field required: the function must return"),
        (made(samples=[[1, 2]] * 6), r"0\.train\.0: .* got a list: .* numpy arrays"),
        (made(labels=torch.zeros(6)), r"0\.train\.1: .* got a Tensor: .* numpy arrays"),
        (made(labels=np.zeros(5, np.int64)), r"equally many .*samples int64 \[6, 4\] and labels int64 \[5\]"),
        (made(labels=np.zeros(6)), r"train has 3 classes, so it needs labels int64 \[N\], got .* labels float64 \[6\]"),
        (made(labels=np.arange(6)), "train has labels from 0 to 5, but 3 classes"),
        (made(samples=np.zeros((6, 4), object)), "got samples object"),
        (made(samples=np.zeros((6, 4), np.int32)), r"has samples int32 \[N, 4\] in train and int64 \[N, 4\] in test"),
        (made(samples=np.zeros((6, 5), np.int64)), r"has samples int64 \[N, 5\] in train and int64 \[N, 4\] in test"),
    ],
)
def test_what_a_function_makes_wrongly_is_named_and_not_written(tmp_path: Path, value: Any, reason: str) -> None:
    with refused(DataError, f"^dataset own.*{reason}"):
        ensure_artifacts(tmp_path, "own", lambda: value)
    assert not (tmp_path / "own").exists()
    assert ensure_artifacts(tmp_path, "own", made) == tmp_path / "own"


@pytest.mark.parametrize(
    ("samples", "labels", "name", "reason"),
    [
        (np.zeros((9, 3), np.float32), np.arange(9) % 3, "pixel values", "all samples are the same"),
        (np.array([[np.nan, 1]] + [[0.0, 2]] * 8), np.arange(9) % 3, "pixel values", "1 samples hold NaN"),
        (np.array([[0, 0.0]] + [[1.0, 2]] * 8), np.arange(9) % 3, "no empty images", "1 samples are all zero"),
        (np.eye(9, 4), np.array([0, 1, np.inf], np.float32).repeat(3), "label range", "label 6 is NaN or infinite"),
    ],
)
def test_faults_of_other_samples_are_found(
    tmp_path: Path, samples: np.ndarray, labels: np.ndarray, name: str, reason: str
) -> None:
    write_artifact(tmp_path / "train", samples, labels, CLASSES if labels.dtype == np.int64 else [])
    found = {check.name: check.detail for check in verify(tmp_path / "train", None) if not check.ok}
    assert reason in found[name]


def test_token_ids_of_padding_only_and_numbers_of_zero_are_no_fault(tmp_path: Path) -> None:
    for n, samples in enumerate((np.array([[0, 0]] + [[0, 1]] * 8), np.arange(9.0), np.eye(9, 3).astype(np.uint8))):
        write_artifact(tmp_path / str(n), samples, np.arange(9) % 3, CLASSES)
        assert all(check.ok for check in verify(tmp_path / str(n), None))


def test_a_dataset_added_to_flapp_counts_as_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named("stripes") == "dataset=custom dataset.name=stripes"
    monkeypatch.setitem(EMBEDDED, "stripes", EMBEDDED["digits"])
    assert is_own("stripes")
    assert named("stripes") == "dataset=stripes"
