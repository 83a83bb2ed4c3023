"""What chooses between rounds goes by validation samples, which no client trains on; test samples only report."""

from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from flapp import partitions
from flapp.client.data import open_client_data
from flapp.config.load import compose
from flapp.config.schema import ConfigError, NodeConfig
from flapp.data.artifact import DataError, write_artifact
from flapp.data.partition import Partition, hold_out, load_partition, save_partition
from flapp.messages import METRICS, NUM_EXAMPLES
from flapp.server.roster import FederationError
from flapp.server.summary import Summary
from tests.conftest import Federate, read_clients, read_lines
from tests.support.replies import lying

CLASSES, SEEDS, TEST = 3, 8, 30
MADE = (
    *("dataset=custom", "dataset.shape=[4,4,1]", f"dataset.classes={CLASSES}", "partition=iid", "model=linear"),
    *("clients=2", "train.optimizer=sgd", "train.schedule=constant", "train.batch_size=8", "checkpoint=off"),
    *("num_rounds=3", "evaluate.every=1", "train.steps=2", "train.lr=0.1"),
)
NOISE = (*MADE, "num_rounds=8", "train.lr=10.0", "train.batch_size=4", "evaluate.personal_epochs=0")
BEST, NONE = "evaluate.select=best", "evaluate.validation_fraction=0"


def write_dataset(home: Path, name: str, train: np.ndarray, test: np.ndarray, seed: int = 0) -> str:
    """Write artifacts of random images with these labels; return the setting that names them."""
    draw = np.random.default_rng(seed)
    for split, labels in (("train", train), ("test", test)):
        images = draw.integers(0, 256, (len(labels), 4, 4, 1)).astype(np.uint8)
        write_artifact(home / "data" / name / split, images, labels.astype(np.int64), ["a", "b", "c"])
    return f"dataset.name={name}"


def labels_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CLASSES, count)


@pytest.fixture
def made(data_home: Path) -> str:
    return write_dataset(data_home, "made", labels_of(40), labels_of(20, 1))


@pytest.mark.slow
def test_on_labels_of_pure_noise_the_best_round_is_no_better_than_chance(federate: Federate, data_home: Path) -> None:
    ended, by_test = [], []
    for seed in range(SEEDS):
        name = write_dataset(data_home, f"noise{seed}", labels_of(60, 100 + seed), labels_of(TEST, 200 + seed), seed)
        summary, path = federate(*NOISE, name, f"seed={seed}", BEST)
        ended.append(summary["accuracy"])
        by_test.append(max(line["accuracy"] for line in read_lines(path, "evaluate")))
    chance = 1 / CLASSES
    error = sqrt(chance * (1 - chance) / (SEEDS * TEST))
    assert abs(np.mean(ended) - chance) < 2 * error
    assert np.mean(by_test) > chance + 4 * error  # what a choice by test samples would have claimed


FEDSA = (
    *("model=linear", "strategy=fedlora", "strategy.aggregation=fedsa", "lora=default", "lora.targets=[fc]"),
    *("lora.rank=2", "clients=2", "num_rounds=3", "train.steps=2", "evaluate.every=1"),
    "evaluate.objective=personal_accuracy",
)


@pytest.mark.parametrize(("settings", "kind"), [((*NOISE, "dataset.name=made"), ""), (FEDSA, "personal_")])
def test_the_end_has_the_test_figures_of_the_round_that_validation_chose(
    federate: Federate, made: str, settings: tuple[str, ...], kind: str
) -> None:
    summary, path = federate(*settings, BEST)
    lines = read_lines(path, "evaluate")
    chosen = max(lines, key=lambda line: line[f"val_{kind}accuracy"])  # of equals the first
    assert summary["selected_round"] == summary["best_round"] == chosen["round"]
    for key in ("accuracy", "loss", "val_accuracy", "val_loss"):
        assert summary[key] == chosen[key]
    assert summary["objective_metric"] == f"val_{kind}accuracy"
    assert summary["objective"] == summary["best_value"] == chosen[f"val_{kind}accuracy"]
    if kind:
        assert summary["personal_accuracy"] == chosen["personal_accuracy"]
    else:
        assert max(line["accuracy"] for line in lines) > chosen["accuracy"]
        clients = read_clients(path)
        assert [[clients[name][split] for split in ("train", "val", "test")] for name in "01"] == [[16, 4, 10]] * 2


def test_the_servers_own_test_chooses_nothing(data_home: Path) -> None:
    summary = Summary(compose([f"home={data_home}", BEST]))
    for number, value in ((5, 0.5), (10, 0.4)):
        summary.add({"kind": "evaluate", "round": number, "val_accuracy": value, "accuracy": 1 - value})
        summary.add({"kind": "central", "round": number, "accuracy": 1 - value, "val_accuracy": 1 - value})
    assert (summary.selected_round(), summary.best.value, summary.totals["accuracy"]) == (5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("settings", "held"),
    [
        ((), 0),
        (("evaluate.validation_fraction=0",), 0),
        (("evaluate.validation_fraction=0.25",), 0.25),
        ((BEST,), 0.2),
        (("stopping.metric=loss", "stopping.patience=1"), 0.2),
        ((BEST, "evaluate.validation_fraction=0.5"), 0.5),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_samples_are_held_out_where_something_chooses_or_it_is_asked_for(
    settings: tuple[str, ...], held: float
) -> None:
    assert compose([*MADE, "dataset.name=made", *settings]).held_out == held


def test_a_run_that_chooses_nothing_ends_in_the_bytes_of_one_without_validation(federate: Federate, made: str) -> None:
    settings = (*MADE, made, "num_rounds=1")
    plain, _ = federate(*settings)
    assert "val_loss" not in plain
    without, _ = federate(*settings, "evaluate.validation_fraction=0")
    with_some, _ = federate(*settings, "evaluate.validation_fraction=0.2")
    assert plain["model_sha256"] == without["model_sha256"] != with_some["model_sha256"]


def test_no_sample_is_held_out_and_trained_on(data_home: Path, made: str) -> None:
    config = compose([*MADE, f"home={data_home}", made, BEST])
    whole = partitions.open_partition(compose([*MADE, f"home={data_home}", made]))
    for client in "01":
        data = open_client_data(config, NodeConfig(partition_id=int(client), num_partitions=2), client)
        (train, trained), (val, held) = data.splits["train"], data.splits["val"]
        assert train.artifact.path == val.artifact.path
        assert np.array_equal(np.union1d(trained, held), whole.train[int(client)])
        assert len(trained) + len(held) == len(whole.train[int(client)])
        assert sum(data.claim.label_hist) == len(trained)


def partition_of(*sizes: int) -> Partition:
    parts = tuple(np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]))
    return Partition(parts, parts, np.zeros((len(sizes), 0)))


def test_what_is_held_out_has_the_labels_of_the_whole_and_depends_on_the_seed_and_the_client_alone() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    found = hold_out(partition_of(100), labels, 0.2, seed=3)
    assert np.bincount(labels[found.val[0]]).tolist() == [10, 6, 4]
    assert np.array_equal(np.sort(np.concatenate([found.train[0], found.val[0]])), np.arange(100))

    one, other, same = partition_of(50, 50), partition_of(50, 20, 30), np.zeros(100, np.int64)
    first = hold_out(one, same, 0.2, seed=0)
    assert np.array_equal(first.val[0], hold_out(other, same, 0.2, seed=0).val[0])
    assert not np.array_equal(first.val[0], first.val[1] - 50)
    assert not np.array_equal(first.val[0], hold_out(one, same, 0.2, seed=1).val[0])


@pytest.mark.parametrize(
    ("size", "fraction", "held"), [(1, 0.5, 0), (2, 0.9, 1), (2, 0.01, 1), (5, 0.2, 1), (10, 0.9, 9)]
)
def test_a_client_of_two_samples_or_more_holds_out_one_and_keeps_one(size: int, fraction: float, held: int) -> None:
    found = hold_out(partition_of(size), np.zeros(size), fraction, seed=0)
    assert (len(found.val[0]), len(found.train[0])) == (held, size - held)


def test_every_sample_is_as_likely_as_any_other_to_be_held_out() -> None:
    labels = np.arange(10)  # of classes of one sample each
    drawn = np.concatenate([hold_out(partition_of(10), labels, 0.2, seed).val[0] for seed in range(500)])
    counts = np.bincount(drawn, minlength=10)
    assert counts.sum() == 1000
    assert counts.min() > 60


def test_personalised_figures_come_from_training_samples_alone(federate: Federate, data_home: Path) -> None:
    """All test and validation samples have a class that no training sample has: who tunes on them gets them right."""
    train = np.concatenate([labels_of(40) % 2, np.full(20, 2)])
    name = write_dataset(data_home, "unlike", train, np.full(20, 2))
    rows = {"train": np.arange(40), "val": np.arange(40, 60), "test": np.arange(20)}
    parts = {split: tuple(np.split(found, 2)) for split, found in rows.items()}
    path = data_home / "data" / "unlike" / "partitions" / "natural.safetensors"
    path.parent.mkdir()
    save_partition(path, Partition(**parts, requested=np.zeros((2, 3))))
    settings = ("partition=natural", "evaluate.personal_epochs=30", "evaluate.personal_lr=0.5", "train.steps=20")
    summary, _ = federate(*MADE, name, *settings)
    for key in ("accuracy", "personal_accuracy", "val_accuracy", "val_personal_accuracy"):
        assert summary[key] == 0.0


def test_an_exported_partition_without_validation_samples_is_refused_with_the_command_that_makes_it(
    data_home: Path, made: str
) -> None:
    path = data_home / "data" / "made" / "partitions" / "natural.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_partition(path, partition_of(20, 20))
    assert load_partition(path).val == ()
    with pytest.raises(DataError, match=r"has no validation samples, .* make it with python -m tools.prepare_data"):
        partitions.open_partition(compose([*MADE, f"home={data_home}", made, "partition=natural"]))


def test_a_choice_without_any_validation_sample_is_refused_before_round_one(
    federate: Federate, data_home: Path
) -> None:
    name = write_dataset(data_home, "tiny", labels_of(2), labels_of(4))
    with pytest.raises(FederationError, match=r"choose by validation samples, of which no client has any: set eval"):
        federate(*MADE, name, BEST)
    assert federate(*MADE, name, "evaluate.select=last")[0]["status"] == "finished"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{BEST} {NONE}", "select=best chooses by validation samples, and .*=0.0 holds out none: set it to null"),
        (f"stopping.metric=loss evaluate.every=1 {NONE}", "stopping.metric=loss chooses by validation samples"),
        (
            "experiment=femnist_fedavg evaluate.validation_fraction=0.2",
            "clients of partition=natural have validation samples of their own: set it to null",
        ),
        ("evaluate.validation_fraction=1", "validation_fraction=1 is out of range: it must be at most 0.9"),
    ],
)
def test_settings_that_leave_nothing_to_choose_by_are_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(words.split())


@pytest.mark.parametrize("val", [0, 5])
def test_a_claim_of_other_validation_samples_than_the_partition_gives_is_refused(
    federate: Federate, made: str, val: int
) -> None:
    settings = (*MADE, made, "evaluate.validation_fraction=0.2", "num_rounds=1")
    _, path = federate(*settings, tamper=lying({"1": {"val": val}}))
    refused = read_lines(path, "roster")[0]["refused"]
    assert refused == {"1": f"claims {val} validation samples, the partition gives it 4"}


def test_validation_figures_are_sums_over_clients(federate: Federate, made: str) -> None:
    seen: dict[str, dict[str, float]] = {}

    def tamper(name: str, reply: Message) -> Message:
        if "val-loss-sum" in (numbers := reply.content.metric_records.get(METRICS, {})):
            seen[name] = dict(numbers)
        return reply

    _, path = federate(*MADE, made, "evaluate.validation_fraction=0.25", "num_rounds=1", tamper=tamper)
    (line,) = read_lines(path, "evaluate")
    assert {name: numbers[NUM_EXAMPLES] for name, numbers in seen.items()} == {"0": 10, "1": 10}
    for figure, total in (("accuracy", "correct"), ("loss", "loss-sum")):
        for kind in ("", "personal-"):
            whole = sum(numbers[f"val-{kind}{total}"] for numbers in seen.values())
            assert line[f"val_{kind.replace('-', '_')}{figure}"] == pytest.approx(whole / 10)
