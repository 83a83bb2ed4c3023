"""Partitions: every sample with exactly one client, drawn from a seed, saved once for all."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flapp.data.artifact import DataError
from flapp.data.partition import Partition, load_partition, make_partition, save_partition
from tests.support.refusals import refused

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
        ({"kind": "dirichlet", "clients": 50, "alpha": 0.01, "min_size": 30}, "the smallest of 50 clients at best"),
        ({"kind": "iid", "clients": 50, "min_size": 41}, "lower clients to at most 48"),
        ({"kind": "pathological", "clients": 3, "classes_per_client": 2}, "cannot deal 10 classes to 3 clients with 2"),
    ],
)
def test_a_partition_that_cannot_be_made_fails_with_the_numbers(settings: dict[str, object], message: str) -> None:
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


@pytest.mark.parametrize(
    ("split", "change"),
    [
        ("train", {"train_offsets": [0, 2, 4, 6]}),
        ("test", {"test_offsets": [0, 3, 2]}),
        ("test", {"test_offsets": [1, 2, 2]}),
        ("test", {"test_offsets": [0, 1, 1]}),
        ("train", {"train_indices": [0, 1, 2, 3, 4, 6]}),
        ("train", {"train_indices": [-1, 1, 2, 3, 4, 5]}),
        ("train", {"requested": [[0.5]]}),
    ],
)
def test_a_saved_partition_that_does_not_cut_the_samples_into_parts_is_refused(
    tmp_path: Path, split: str, change: dict[str, list[int]]
) -> None:
    path = tmp_path / "one.safetensors"
    parts = (np.arange(3), np.arange(3, 6)), (np.arange(1), np.arange(1, 2))
    save_partition(path, Partition(*parts, np.full((2, 1), 3.0)))
    assert len(load_partition(path).train) == 2
    save_file(load_file(path) | {name: np.array(values) for name, values in change.items()}, path)
    with refused(DataError, rf"one\.safetensors is damaged \({split}_indices and .* the parts of .* delete it"):
        load_partition(path)
