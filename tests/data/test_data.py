"""Artifacts, the embedded datasets, partitions and batches."""

import json
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from flapp.data import artifact as artifact_module
from flapp.data import verified
from flapp.data.artifact import DataError, open_artifact, write_artifact
from flapp.data.embedded import ensure_artifacts
from flapp.data.loader import ClientLoader
from flapp.data.offline import OfflineDataset
from flapp.data.partition import load_partition, make_partition
from flapp.data.pixels import to_input
from flapp.data.verified import open_verified


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    write_artifact(tmp_path / "train", images, rng.integers(0, 4, 50), ["a", "b", "c", "d"], "source")
    return tmp_path / "train"


def test_an_artifact_reads_back_as_written(folder: Path) -> None:
    artifact = open_artifact(folder, verify=True)
    images = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(artifact.images, images)
    assert artifact.classes == ("a", "b", "c", "d")
    assert not folder.with_name("train.tmp").exists()


def test_writing_to_an_opened_artifact_never_reaches_the_file(folder: Path) -> None:
    open_artifact(folder).images[:] = 0
    assert open_artifact(folder, verify=True).images.any()


def test_the_digest_is_that_of_the_content(folder: Path, tmp_path: Path) -> None:
    artifact = open_artifact(folder)
    write_artifact(tmp_path / "copy", artifact.images, artifact.labels, artifact.classes, "elsewhere")
    assert open_artifact(tmp_path / "copy").digest == artifact.digest
    write_artifact(tmp_path / "rolled", artifact.images, np.roll(artifact.labels, 1), artifact.classes, "source")
    assert open_artifact(tmp_path / "rolled").digest != artifact.digest


def count_hashing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows whenever an artifact's arrays are hashed."""
    hashed: list[int] = []
    real = artifact_module.damaged_blocks

    def damaged_blocks(array: np.ndarray, *rest: Any) -> list[int]:
        hashed.append(len(array))
        return real(array, *rest)

    monkeypatch.setattr(artifact_module, "damaged_blocks", damaged_blocks)
    return hashed


@pytest.mark.parametrize("writable", [True, False])
def test_the_bytes_of_an_artifact_are_compared_once_by_one_process_where_it_can_leave_a_note(
    folder: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    note = folder.with_name(f"{folder.name}.verified.json")
    if not writable:
        note.mkdir()  # stands for a folder in which no file can be made, which root always can
    hashed = count_hashing(monkeypatch)
    for process in range(3):
        monkeypatch.setattr(verified, "_compared", set())  # as a new process has it
        for _ in range(2):
            open_verified(folder)
        assert len(hashed) == (2 if writable else 2 * (process + 1))


def test_an_artifact_whose_files_were_touched_is_compared_again_and_a_change_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_verified(folder)
    hashed = count_hashing(monkeypatch)
    path = folder / "images.npy"
    facts = path.stat()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # same inode, size and time of writing
    with pytest.raises(DataError, match=rf"{path} was changed or damaged .*: delete {folder} and prepare it again"):
        open_verified(folder)
    with pytest.raises(DataError, match="was changed or damaged"):
        OfflineDataset(folder)
    path.write_bytes(whole)
    open_verified(folder)
    assert hashed


def test_a_note_that_was_cut_off_or_is_of_other_files_is_not_believed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    open_verified(folder)
    note = folder.with_name(f"{folder.name}.verified.json")
    hashed = count_hashing(monkeypatch)
    for text in ("", note.read_text()[:40], "[[1]]", note.read_text().replace("1", "2")):
        note.write_text(text)
        monkeypatch.setattr(verified, "_compared", set())
        hashed.clear()
        open_verified(folder)
        assert hashed, text


def test_damage_is_named(folder: Path) -> None:
    path = folder / "images.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="images.npy cannot be read"):
        open_artifact(folder)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    open_artifact(folder)
    with pytest.raises(DataError, match="block 0 has another SHA-256"):
        open_artifact(folder, verify=True)
    np.save(path, np.array([{"a": 1}] * 50, dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="images.npy cannot be read"):
        open_artifact(folder)
    np.save(path, np.zeros((50, 32, 32), np.uint8))
    with pytest.raises(DataError, match=r"holds uint8 \[50, 32, 32\], its meta.json says uint8 \[50, 32, 32, 3\]"):
        open_artifact(folder)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"complete": False}))
    with pytest.raises(DataError, match="is not a complete artifact"):
        open_artifact(folder)
    (folder / "meta.json").write_text("[1")
    with pytest.raises(DataError, match=r"meta.json is damaged"):
        open_artifact(folder)


def test_an_artifact_of_the_wrong_kind_is_not_written(tmp_path: Path) -> None:
    images = np.zeros((3, 4, 4, 1), np.uint8)
    for bad_images, labels, classes in (
        (images.astype(np.float32), np.zeros(3, np.int64), ["a"]),
        (images, np.zeros(2, np.int64), ["a"]),
        (images, np.array([0, 1, 2]), ["a", "b"]),
        (images, np.zeros(3, np.float32), ["a"]),
    ):
        with pytest.raises(DataError):
            write_artifact(tmp_path / "x", bad_images, labels, classes, "")
    assert list(tmp_path.iterdir()) == []


def prepare(data: Path) -> int:
    ensure_artifacts(data, "digits")
    return (data / "digits" / "train" / "images.npy").stat().st_ino


def test_clients_that_start_together_prepare_the_digits_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        inodes = pool.map(prepare, [tmp_path] * 8)
    assert len(set(inodes)) == 1  # a second preparation would have replaced the file
    train, test = (open_artifact(tmp_path / "digits" / split, verify=True) for split in ("train", "test"))
    assert len(train.labels) + len(test.labels) == 1797
    assert train.images.shape[1:] == (32, 32, 1)
    assert train.images.max() == 255


def test_a_dataset_that_is_not_embedded_must_be_prepared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataset cifar is not prepared"):
        ensure_artifacts(tmp_path, "cifar")


@pytest.mark.parametrize("normalization", ["half", "imagenet"])
def test_samples_equal_torchvisions_pipeline(folder: Path, normalization: str) -> None:
    mean, std = ((0.5,) * 3, (0.5,) * 3)
    if normalization == "imagenet":
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pipeline = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    dataset = OfflineDataset(folder, normalization=normalization)
    for index in (0, 49, -1):
        expected = pipeline(Image.fromarray(open_artifact(folder).images[index]))
        torch.testing.assert_close(dataset[index][0], expected, rtol=0, atol=0)
        assert dataset[index][1] == dataset.targets[index]
    assert len(dataset.__getitems__([1, 2])) == 2


def test_a_transform_gets_a_pil_image_before_the_normalisation(folder: Path) -> None:
    flipped = OfflineDataset(folder, transform=transforms.RandomHorizontalFlip(p=1.0))[3][0]
    torch.testing.assert_close(flipped, OfflineDataset(folder)[3][0].flip(-1), rtol=0, atol=0)


def test_resized_batches_equal_pil_byte_for_byte(folder: Path) -> None:
    images = open_artifact(folder).images
    found = to_input(torch.from_numpy(images).permute(0, 3, 1, 2), "none", 96) * 255
    for image, resized in zip(images, found, strict=True):
        expected = np.asarray(Image.fromarray(image).resize((96, 96), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(resized.round().numpy().transpose(1, 2, 0), expected)


def test_a_dataset_pickles_as_its_path(folder: Path) -> None:
    text = pickle.dumps(OfflineDataset(folder))
    assert len(text) < 1000
    assert len(pickle.loads(text)) == 50  # noqa: S301 - our own bytes


def test_the_loader_shuffles_by_seed_and_gives_every_sample_once(folder: Path) -> None:
    dataset, indices = OfflineDataset(folder), np.arange(5, 45)

    def labels(seed: int | None) -> list[list[int]]:
        loader = ClientLoader(dataset, indices, 16, seed)
        return [[int(label) for _, batch in loader for label in batch] for _ in range(2)]

    in_order = [dataset.targets[i] for i in indices]
    assert labels(None) == [in_order, in_order]
    assert labels(3) == labels(3) != labels(4)
    assert labels(3)[0] != labels(3)[1]
    assert sorted(labels(3)[0]) == sorted(in_order)
    assert [len(y) for _, y in ClientLoader(dataset, indices, 16)] == [16, 16, 8]
    assert list(ClientLoader(dataset, indices[:0], 16)) == []


LABELS = np.random.default_rng(1).integers(0, 10, 2000), np.random.default_rng(2).integers(0, 10, 500)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
@pytest.mark.parametrize("clients", [1, 7, 20])
def test_every_sample_is_used_exactly_once(kind: str, clients: int) -> None:
    partition = make_partition(kind, *LABELS, clients, seed=0, classes_per_client=10 if clients == 1 else 3)
    for parts, labels in ((partition.train, LABELS[0]), (partition.test, LABELS[1])):
        assert len(parts) == clients
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))


def test_train_and_test_share_each_clients_label_mix() -> None:
    partition = make_partition("dirichlet", *LABELS, 10, seed=0, alpha=0.3, min_size=20)
    for train, test in zip(partition.train, partition.test, strict=True):
        shares = [
            np.bincount(y[part], minlength=10) / np.bincount(y) for y, part in zip(LABELS, (train, test), strict=True)
        ]
        np.testing.assert_allclose(*shares, atol=0.03)  # a class has some 50 test samples: rounding is 0.02
    actual = np.stack([np.bincount(LABELS[0][part], minlength=10) for part in partition.train])
    np.testing.assert_allclose(actual, partition.requested, atol=1)


def test_a_smaller_alpha_makes_clients_less_alike() -> None:
    def unlikeness(alpha: float) -> float:
        partition = make_partition("dirichlet", *LABELS, 5, seed=0, alpha=alpha)
        return float(np.mean([np.bincount(LABELS[0][p], minlength=10).std() for p in partition.train]))

    assert unlikeness(0.1) > 2 * unlikeness(100.0)


def test_pathological_clients_hold_just_their_classes() -> None:
    partition = make_partition("pathological", *LABELS, 10, seed=0, classes_per_client=2)
    for train, test in zip(partition.train, partition.test, strict=True):
        assert len(set(LABELS[0][train])) == 2
        assert set(LABELS[1][test]) <= set(LABELS[0][train])


def test_partitions_depend_on_the_seed() -> None:
    first, again, other = (make_partition("dirichlet", *LABELS, 5, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first.train, again.train, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first.train, other.train, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "dirichlet", "clients": 500, "min_size": 5}, "clients=500 partition.min_size=5 of 2000 training"),
        ({"kind": "dirichlet", "clients": 5, "min_size": 3000}, "2000 training samples: lower partition.min_size"),
        (
            {"kind": "dirichlet", "clients": 50, "alpha": 0.01, "min_size": 30},
            "the smallest of 50 clients at best",
        ),
        ({"kind": "iid", "clients": 50, "min_size": 41}, "lower clients to at most 48"),
        ({"kind": "pathological", "clients": 3, "classes_per_client": 2}, "cannot deal 10 classes to 3 clients with 2"),
    ],
)
def test_what_cannot_be_had_fails_with_the_numbers(settings: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_partition(train_labels=LABELS[0], test_labels=LABELS[1], seed=0, **settings)  # type: ignore[arg-type]


def test_regression_targets_are_only_dealt_at_random() -> None:
    targets = LABELS[0].astype(np.float32), LABELS[1].astype(np.float32)
    assert len(make_partition("iid", *targets, 3, seed=0).train) == 3
    with pytest.raises(DataError, match="needs class labels, got float32"):
        make_partition("dirichlet", *targets, 3, seed=0)


def test_a_saved_partition_is_read_back_not_drawn_again(tmp_path: Path) -> None:
    path = tmp_path / "p" / "one.safetensors"
    settings = {"kind": "dirichlet", "train_labels": LABELS[0], "test_labels": LABELS[1], "clients": 5, "seed": 0}
    drawn = load_partition(path, **settings)
    read = load_partition(path, **settings | {"seed": 1})
    for a, b in zip([*drawn.train, *drawn.test], [*read.train, *read.test], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(drawn.requested, read.requested)
