"""A run ends when its evaluations get no better, and with the round that is asked for, however often it broke off."""

from collections.abc import Callable, Sequence
from math import inf, nan
from typing import Any

import pytest

from flapp.checkpoint.manager import ChunkManager
from flapp.server.observer import Observer
from flapp.server.run import Run
from flapp.server.summary import Best
from tests.conftest import Broken, Federate, break_off, read_lines

TOY = ("experiment=toy_regression", "clients=2", "num_rounds=6", "checkpoint=recent", "checkpoint.keep_rounds=1")
STOP = ("stopping.metric=loss", "stopping.patience=2")
BEST = ("evaluate.select=best",)
LOSSES = (5.0, 3.0, 4.0, 3.0, 2.0, 1.0)  # the best of the first four is round 2, which round 4 only equals
FOLDS = (
    *("model=linear", "strategy=fedlora", "lora=default", "lora.targets=[fc]", "lora.rank=2", "clients=2"),
    *("num_rounds=4", "evaluate.every=1"),
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


@pytest.mark.parametrize(
    ("metric", "min_delta", "values", "number", "waited"),
    [
        ("loss", 0.0, (3.0, 1.0, 2.0), 2, 1),
        ("accuracy", 0.0, (0.3, 0.1, 0.2), 1, 2),
        ("loss", 0.0, (1.0, 1.0, 1.0), 1, 2),
        ("loss", 0.0, (nan, 5.0, nan, -inf), 2, 2),
        ("accuracy", 0.0, (inf, None, 0.1), 3, 0),
        ("accuracy", 0.0, (None, nan), None, 2),
        ("loss", 0.0, (), None, 0),
        ("loss", 0.5, (1.0, 0.75, 0.5), 3, 2),
        ("loss", 0.5, (1.0, 0.75, 0.5, 0.25), 4, 0),
    ],
)
def test_the_best_is_finite_of_equals_the_first_and_only_more_than_min_delta_is_an_improvement(
    metric: str, min_delta: float, values: Sequence[float | None], number: int | None, waited: int
) -> None:
    best = Best(metric, min_delta)
    for server_round, value in enumerate(values, 1):
        best.add(server_round, value)
    assert (best.round, best.waited) == (number, waited)
    assert best.value == (None if number is None else values[number - 1])


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


@pytest.mark.parametrize(
    ("values", "select", "patience", "rounds", "best"),
    [((2.0, *(1.0,) * 5), "last", 4, 6, (2, 1.0)), ((nan,) * 6, "best", 2, 2, (None, None))],
)
def test_a_run_ends_with_its_last_round_or_without_a_finite_evaluation_all_the_same(
    federate: Federate,
    losses: Callable[[Sequence[float]], None],
    values: Sequence[float],
    select: str,
    patience: int,
    rounds: int,
    best: tuple[int | None, float | None],
) -> None:
    losses(values)
    words = ("stopping.metric=loss", f"stopping.patience={patience}", f"evaluate.select={select}")
    summary, path = federate(*TOY, *words)
    assert (summary["rounds"], summary["selected_round"], summary["stopped_early"]) == (rounds, rounds, rounds < 6)
    assert (summary["best_round"], summary["best_value"]) == best
    assert len(read_lines(path, "stop")) == (rounds < 6)


@pytest.mark.parametrize(
    "settings",
    [TOY, *((*FOLDS, f"strategy.aggregation={rule}") for rule in ("flora", "fedex"))],
    ids=["fedavg", "flora", "fedex"],
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


@pytest.mark.slow
@pytest.mark.usefixtures("losses")
def test_a_run_broken_off_before_or_after_its_best_round_or_its_stop_ends_in_the_same_bytes(federate: Federate) -> None:
    def finish(*_: Any) -> None:
        raise Broken("the power is gone")

    settings = (*TOY, *STOP, *BEST)
    whole, _ = federate(*settings)
    for server_round, place in ((2, "aggregate_train"), (4, "aggregate_evaluate"), (4, "facts"), (4, "")):
        name = f"run_name=stops-{server_round}-{place}"
        if place:
            break_off(federate, server_round, place, *settings, name)
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Run, "finish", finish)
                with pytest.raises(Broken):
                    federate(*settings, name)
        resumed, path = federate(*settings, name, "resume=true")
        unlike = {"seconds", "run_dir"}
        assert {k: resumed[k] for k in resumed if k not in unlike} == {k: whole[k] for k in whole if k not in unlike}
        assert len(read_lines(path, "stop")) == 1
    assert len(read_lines(path, "train")) == 4  # the last had stopped, and trained no further
    assert len(read_lines(path, "roster")) == 1
