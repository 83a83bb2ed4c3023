"""What a run leaves for people: where the time went, tables and events that say what metrics.jsonl says."""

import csv
import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flapp import server_app
from flapp.config.schema import ConfigError
from flapp.server import run_dir
from flapp.server.metrics_csv import COLUMNS, MetricsCsv
from flapp.server.roster import Roster
from flapp.server.run_dir import RunDirectory
from flapp.server.stopwatch import PHASES
from flapp.strategy.fedavg import FedAvg
from tests.conftest import Broken, LocalGrid, break_off, read_clients, read_lines

Federate = Callable[..., tuple[dict[str, Any], Path]]
TOY = ("experiment=toy_regression", "num_rounds=3")
DIGITS = ("model=linear", "clients=3", "num_rounds=2", "train.epochs=1", "evaluate.every=2")
PAUSE = 0.4  # seconds


def slow(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Make a method or function take PAUSE longer."""
    real = getattr(owner, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        time.sleep(PAUSE)
        return real(*args, **kwargs)

    patch.setattr(owner, name, method)


def read_csv(path: Path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_phases_of_a_round_add_up_to_its_seconds_and_rounds_to_the_time_between(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, FedAvg, "combine_sum")
    slow(monkeypatch, RunDirectory, "append")
    _, path = federate(*TOY, "evaluate.central=true", "evaluate.every=2")
    rounds = read_lines(path, "round")
    assert [line["round"] for line in rounds] == [1, 2, 3]
    for line in rounds:
        assert tuple(line["phases"]) == PHASES
        assert sum(line["phases"].values()) == pytest.approx(line["seconds"], rel=0.05)
    for line, after in pairwise(rounds):
        assert after["time"] - line["time"] == pytest.approx(after["seconds"], rel=0.05)


@pytest.mark.parametrize(
    ("owner", "method", "phase"),
    [
        (Roster, "refresh", "configure"),
        (LocalGrid, "push_messages", "send"),
        (LocalGrid, "pull_messages", "train"),
        (FedAvg, "combine_sum", "aggregate"),
        (FedAvg, "aggregate_evaluate", "evaluate"),
        (server_app, "evaluate", "central"),
        (run_dir, "config_digest", "save"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_time_is_counted_in_the_phase_that_takes_it(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, phase: str
) -> None:
    slow(monkeypatch, owner, method)
    _, path = federate(*TOY, "num_rounds=1", "evaluate.personal_epochs=0", "evaluate.central=true")
    (line,) = read_lines(path, "round")
    assert line["phases"][phase] >= PAUSE


def test_the_line_of_a_round_is_its_last_and_says_what_the_store_took(federate: Federate) -> None:
    _, path = federate(*TOY, "evaluate.central=true")
    lines = [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines[2:]] == ["train", "evaluate", "central", "round"] * 3
    assert lines[-1]["store"] == {"bytes": (path / "server_chunks.db").stat().st_size, "stored": 44, "total": 44}
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_clients_jsonl_says_who_holds_how_much_of_what(federate: Federate) -> None:
    _, path = federate(*DIGITS, "num_rounds=1")
    clients = read_clients(path)
    assert list(clients) == ["0", "1", "2"]
    assert all(line["kind"] == "client" and len(line["shard_digest"]) == 64 for line in clients.values())
    assert all(sum(line["labels"]) == line["train"] for line in clients.values())
    assert sum(line[split] for line in clients.values() for split in ("train", "val", "test")) == 1797
    assert not {"samples", "label_hist"} & read_lines(path, "roster")[0].keys()  # it stays short
    _, path = federate(*TOY, "num_rounds=1")
    assert [line["labels"] for line in read_clients(path).values()] == [[], [], []]


def test_the_table_has_a_row_a_round_and_the_same_columns_in_every_run(federate: Federate) -> None:
    _, path = federate(*DIGITS, "evaluate.central=true", "evaluate.validation_fraction=0.2")
    rows = read_csv(path)
    assert [row["round"] for row in rows] == ["1", "2"]
    assert list(rows[0]) == COLUMNS
    for kind, key in (("train", "loss"), ("evaluate", "accuracy"), ("round", "seconds"), ("train", "bytes_up")):
        line = read_lines(path, kind)[-1]
        assert float(rows[-1][f"{kind}_{key}"]) == line[key]
    assert rows[0]["evaluate_accuracy"] == rows[0]["central_accuracy"] == rows[0]["train_aggregation_error"] == ""
    assert rows[-1]["train_failures"] == "0"
    assert {name for name, value in rows[-1].items() if not value} == {"train_aggregation_error"}


@pytest.mark.parametrize("place", ["aggregate_evaluate", "facts"])
def test_a_resumed_runs_table_has_no_row_twice_and_none_of_the_broken_round(federate: Federate, place: str) -> None:
    _, whole = federate(*TOY)
    break_off(federate, 3, place, *TOY, f"run_name=table-{place}")
    _, path = federate(*TOY, f"run_name=table-{place}", "resume=true")
    timed = ("time", "seconds", "phases", "store")
    rows = [
        [{name: v for name, v in row.items() if not any(t in name for t in timed)} for row in read_csv(p)]
        for p in (path, whole)
    ]
    assert rows[0] == rows[1]
    assert [float(row["time"]) for row in read_csv(path)] == [line["time"] for line in read_lines(path, "round")]


def test_a_round_that_was_saved_but_not_noted_keeps_its_row(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunDirectory.append

    def append(run: RunDirectory, kind: str, server_round: int, **values: Any) -> None:
        if (kind, server_round) == ("round", 2):
            raise Broken("the power is gone")
        real(run, kind, server_round, **values)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", append)
        with pytest.raises(Broken):
            federate(*TOY, "run_name=unnoted")
    _, path = federate(*TOY, "run_name=unnoted", "resume=true")
    assert [row["round"] for row in read_csv(path)] == ["1", "2", "3"]
    assert [row["round_seconds"] != "" for row in read_csv(path)] == [True, False, True]


def test_pauses_between_starts_are_no_part_of_the_time(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    break_off(federate, 3, "aggregate_train", *TOY, "run_name=paused")
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 1000, time=time.time)
    monkeypatch.setattr(run_dir, "time", later)
    summary, path = federate(*TOY, "run_name=paused", "resume=true")
    times = [line["time"] for line in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())]
    assert times == sorted(times)
    assert times[-1] <= summary["seconds"] < 1000


def test_a_run_without_its_lines_is_not_resumed(federate: Federate) -> None:
    break_off(federate, 3, "aggregate_train", *TOY, "run_name=silent")
    _, other = federate(*TOY)
    path = other.parent / "silent" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["round"] < 2))
    with pytest.raises(ConfigError, match=r"ends with round 2, metrics.jsonl goes on to round 1: bring the right"):
        federate(*TOY, "run_name=silent", "resume=true")


def read_events(path: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_events_say_what_the_lines_say_also_of_a_resumed_run(federate: Federate) -> None:
    pytest.importorskip("tensorboard")
    break_off(federate, 3, "aggregate_evaluate", *TOY, "run_name=events", "results.tensorboard=true")
    _, path = federate(*TOY, "run_name=events", "resume=true", "results.tensorboard=true")
    events = read_events(path)
    for kind, key in (("train", "loss"), ("evaluate", "loss"), ("train", "bytes_up")):
        assert events[f"{kind}/{key}"] == [(line["round"], pytest.approx(line[key])) for line in read_lines(path, kind)]
    spread = [(line["round"], pytest.approx(line["loss_spread"]["p90"])) for line in read_lines(path, "evaluate")]
    assert events["evaluate/loss_spread/p90"] == spread
    assert [step for step, _ in events["round/phases/save"]] == [1, 2, 3]
    assert not [tag for tag in events if "client" in tag and tag != "roster/clients"]


def test_events_may_be_asked_for_when_a_run_is_resumed(federate: Federate) -> None:
    pytest.importorskip("tensorboard")
    break_off(federate, 2, "aggregate_train", *TOY, "run_name=late")
    _, path = federate(*TOY, "run_name=late", "resume=true", "results.tensorboard=true")
    assert [step for step, _ in read_events(path)["train/loss"]] == [1, 2, 3]


def test_without_its_package_events_are_refused_before_round_one(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, data_home: Path
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r'needs the package tensorboard, .*pip install -e "\.\[tensorboard\]"'):
        federate(*TOY, "run_name=eventless", "results.tensorboard=true")
    assert not (data_home / "runs" / "eventless").exists()


def test_the_table_keeps_a_rounds_own_time_when_a_run_is_resumed_again(tmp_path: Path) -> None:
    lines = [{"kind": "round", "round": 1, "time": 1.5}, {"kind": "roster", "round": 1, "time": 2.0}]
    table = MetricsCsv(tmp_path / "metrics.csv")
    table.rewrite(lines)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1].startswith("1,1.5,")
