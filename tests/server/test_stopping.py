"""A run ends when its evaluations get no better, and with the round that is asked for, however often it broke off."""

from collections.abc import Callable, Sequence
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from flapp.checkpoint.manager import ChunkManager
from flapp.server.observer import Observer
from flapp.server.run import Run
from flapp.server.summary import Best
from tests.conftest import Broken, break_off, read_lines

Federate = Callable[..., tuple[dict[str, Any], Path]]
TOY = ("experiment=toy_regression", "num_rounds=6", "checkpoint=recent", "checkpoint.keep_rounds=1")
STOP = ("stopping.metric=loss", "stopping.patience=2")
BEST = ("evaluate.select=best",)
LOSSES = (5.0, 3.0, 4.0, 3.0, 2.0, 1.0)  # the best of the first four is round 2, which round 4 only equals
FOLDS = (
    *("strategy=fedlora", "lora=default", "lora.rank=2", "clients=2", "num_rounds=4", "evaluate.every=1"),
    *("train.steps=1", "evaluate.personal_epochs=0", "checkpoint.keep_rounds=1", "evaluate.objective=loss"),
)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], None]:
    """Return a function that gives the evaluations of later runs these validation losses, by round.

    Their test losses have the opposite order, so that a choice by those would be another one.
    """
    real = Observer.append

    def script(values: Sequence[float]) -> None:
        def append(run: Observer, kind: str, server_round: int, **rest: Any) -> None:
            if kind == "evaluate":
                rest["val_loss"] = values[server_round - 1]
                rest["loss"] = -values[server_round - 1]
            real(run, kind, server_round, **rest)

        monkeypatch.setattr(Observer, "append", append)

    script(LOSSES)
    return script


def best_of(metric: str, values: Sequence[float | None], min_delta: float = 0.0) -> Best:
    best = Best(metric, min_delta)
    for number, value in enumerate(values, 1):
        best.add(number, value)
    return best


@pytest.mark.parametrize(
    ("metric", "values", "number", "waited"),
    [
        ("loss", (3.0, 1.0, 2.0), 2, 1),
        ("accuracy", (0.3, 0.1, 0.2), 1, 2),
        ("loss", (1.0, 1.0, 1.0), 1, 2),
        ("loss", (nan, 5.0, nan, -inf), 2, 2),
        ("accuracy", (inf, None, 0.1), 3, 0),
        ("accuracy", (None, nan), None, 2),
        ("loss", (), None, 0),
    ],
)
def test_the_best_is_finite_and_of_equals_the_first(
    metric: str, values: Sequence[float | None], number: int | None, waited: int
) -> None:
    best = best_of(metric, values)
    assert (best.round, best.waited) == (number, waited)
    assert best.value == (None if number is None else values[number - 1])


def test_only_more_than_min_delta_over_the_last_improvement_is_one_again() -> None:
    values = (1.0, 0.75, 0.5, 0.25)
    assert best_of("loss", values, 0.5).waited == 0
    assert best_of("loss", values[:3], 0.5).waited == 2
    assert best_of("loss", values[:3], 0.5).round == 3


@pytest.mark.usefixtures("losses")
def test_a_run_stops_when_patience_is_over_and_says_so(federate: Federate) -> None:
    summary, path = federate(*TOY, *STOP)
    assert (summary["rounds"], summary["stopped_early"], summary["selected_round"]) == (4, True, 4)
    assert (summary["best_round"], summary["best_value"], summary["loss"]) == (2, 3.0, -3.0)
    assert [line["round"] for line in read_lines(path, "train")] == [1, 2, 3, 4]
    (line,) = read_lines(path, "stop")
    assert (line["round"], line["metric"], line["best_round"], line["patience"]) == (4, "val_loss", 2, 2)


@pytest.mark.usefixtures("losses")
def test_patience_counts_evaluations_and_not_rounds(federate: Federate) -> None:
    summary, _ = federate(*TOY, "stopping.metric=loss", "stopping.patience=1", "evaluate.every=2")
    assert (summary["rounds"], summary["best_round"]) == (4, 2)


def test_a_run_whose_patience_ends_with_its_last_round_was_not_stopped(
    federate: Federate, losses: Callable[[Sequence[float]], None]
) -> None:
    losses((2.0, 1.0, 1.0, 1.0, 1.0, 1.0))
    summary, path = federate(*TOY, "stopping.metric=loss", "stopping.patience=4")
    assert (summary["rounds"], summary["stopped_early"]) == (6, False)
    assert read_lines(path, "stop") == []


@pytest.mark.parametrize(
    "settings",
    [TOY, *((*FOLDS, f"strategy.aggregation={rule}") for rule in ("fedit", "flora", "fedex"))],
    ids=["fedavg", "fedit", "flora", "fedex"],
)
def test_the_best_rounds_bytes_are_those_of_a_run_that_ended_there(
    federate: Federate, losses: Callable[[Sequence[float]], None], settings: tuple[str, ...]
) -> None:
    stop = ("stopping.metric=loss", "stopping.patience=1")
    best, path = federate(*settings, *stop, *BEST)
    losses((1.0, 2.0, 3.0))
    ended_there, _ = federate(*settings, *stop)
    assert (best["selected_round"], best["rounds"]) == (2, 3)
    assert ended_there["rounds"] == 2
    assert best["model_sha256"] == ended_there["model_sha256"]
    assert (best["objective"], best["val_loss"], best["loss"]) == (3.0, 3.0, -3.0)
    with ChunkManager(path / "server_chunks.db") as store:
        assert [kept.round for kept in store.rounds()] == [2, 3]


@pytest.mark.usefixtures("losses")
@pytest.mark.parametrize(
    ("server_round", "place"), [(2, "aggregate_train"), (3, "facts"), (4, "aggregate_evaluate"), (4, "facts")]
)
def test_a_run_broken_off_before_or_after_its_best_round_ends_in_the_same_bytes(
    federate: Federate, server_round: int, place: str
) -> None:
    whole, _ = federate(*TOY, *STOP, *BEST)
    name = f"run_name=stops-{server_round}-{place}"
    break_off(federate, server_round, place, *TOY, *STOP, *BEST, name)
    resumed, path = federate(*TOY, *STOP, *BEST, name, "resume=true")
    unlike = {"seconds", "run_dir"}
    assert {k: v for k, v in resumed.items() if k not in unlike} == {k: v for k, v in whole.items() if k not in unlike}
    assert len(read_lines(path, "stop")) == 1


@pytest.mark.usefixtures("losses")
def test_a_run_broken_off_after_it_stopped_trains_no_further(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(*_: Any) -> None:
        raise Broken("the power is gone")

    whole, _ = federate(*TOY, *STOP, *BEST)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", finish)
        with pytest.raises(Broken):
            federate(*TOY, *STOP, *BEST, "run_name=stopped")
    resumed, path = federate(*TOY, *STOP, *BEST, "run_name=stopped", "resume=true")
    assert resumed["model_sha256"] == whole["model_sha256"]
    assert len(read_lines(path, "train")) == 4
    assert len(read_lines(path, "roster")) == 1


def test_without_a_finite_evaluation_the_last_round_is_taken(
    federate: Federate, losses: Callable[[Sequence[float]], None]
) -> None:
    losses((nan,) * 6)
    summary, _ = federate(*TOY, *STOP, *BEST)
    assert (summary["rounds"], summary["selected_round"]) == (2, 2)
    assert (summary["best_round"], summary["best_value"]) == (None, None)
