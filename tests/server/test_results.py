"""What a run leaves for people: where the time went, and events that say what metrics.jsonl says."""

import json
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flapp.server import observer, run, run_dir
from flapp.server.observer import PHASES, Observer
from flapp.server.roster import Roster
from flapp.strategy.fedavg import FedAvg
from tests.conftest import Broken, Federate, LocalGrid, break_off, read_clients, read_lines

TOY = ("experiment=toy_regression", "clients=2", "num_rounds=3")
DIGITS = ("model=linear", "clients=3", "num_rounds=1", "train.steps=1")
PAUSE = 0.1  # seconds


def slow(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Make a method or function take PAUSE longer."""
    real = getattr(owner, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        time.sleep(PAUSE)
        return real(*args, **kwargs)

    patch.setattr(owner, name, method)


@pytest.mark.slow
def test_time_is_counted_in_the_phase_that_takes_it_and_adds_up(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed = {
        "configure": (Roster, "refresh"),
        "send": (LocalGrid, "push_messages"),
        "train": (LocalGrid, "pull_messages"),
        "aggregate": (FedAvg, "combine_sum"),
        "evaluate": (FedAvg, "aggregate_evaluate"),
        "central": (run, "evaluate"),
        "save": (run_dir, "config_digest"),
    }
    for owner, method in slowed.values():
        slow(monkeypatch, owner, method)
    _, path = federate(*TOY, "evaluate.central=true", "evaluate.every=2")
    rounds = read_lines(path, "round")
    assert [line["round"] for line in rounds] == [1, 2, 3]
    assert tuple(slowed) == PHASES
    for line in rounds:
        assert tuple(line["phases"]) == PHASES
        assert sum(line["phases"].values()) == pytest.approx(line["seconds"], rel=0.05)
        assert all(line["phases"][phase] >= PAUSE for phase in PHASES if line["round"] > 1 or phase != "central")
    for line, after in pairwise(rounds):
        assert after["time"] - line["time"] == pytest.approx(after["seconds"], rel=0.05)


def test_the_line_of_a_round_is_its_last_and_says_what_the_store_took(federate: Federate) -> None:
    _, path = federate(*TOY, "evaluate.central=true")
    lines = [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines[2:]] == ["train", "evaluate", "central", "round"] * 3
    assert lines[-1]["store"] == {"bytes": (path / "server_chunks.db").stat().st_size, "stored": 44, "total": 44}
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_clients_jsonl_says_who_holds_how_much_of_what(federate: Federate) -> None:
    _, path = federate(*DIGITS, "num_rounds=1", "train.steps=1", "evaluate.personal_epochs=0")
    clients = read_clients(path)
    assert list(clients) == ["0", "1", "2"]
    assert all(line["kind"] == "client" and len(line["shard_digest"]) == 64 for line in clients.values())
    assert all(sum(line["labels"]) == line["train"] for line in clients.values())
    assert sum(line[split] for line in clients.values() for split in ("train", "val", "test")) == 1797
    assert not {"samples", "label_hist"} & read_lines(path, "roster")[0].keys()  # it stays short
    _, path = federate(*TOY, "num_rounds=1")
    assert [line["labels"] for line in read_clients(path).values()] == [[], []]


def test_a_round_that_was_saved_but_not_noted_is_not_run_again(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Observer.append

    def append(self: Observer, kind: str, server_round: int, **values: Any) -> None:
        if (kind, server_round) == ("round", 2):
            raise Broken("the power is gone")
        real(self, kind, server_round, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Observer, "append", append)
        with pytest.raises(Broken):
            federate(*TOY, "run_name=unnoted")
    _, path = federate(*TOY, "run_name=unnoted", "resume=true")
    assert [line["round"] for line in read_lines(path, "train")] == [1, 2, 3]
    assert [line["round"] for line in read_lines(path, "round")] == [1, 3]


def test_pauses_between_starts_are_no_part_of_the_time(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    break_off(federate, 3, "aggregate_train", *TOY, "run_name=paused")
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 1000, time=time.time)
    monkeypatch.setattr(observer, "time", later)
    summary, path = federate(*TOY, "run_name=paused", "resume=true")
    times = [line["time"] for line in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())]
    assert times == sorted(times)
    assert times[-1] <= summary["seconds"] < 1000


def read_events(path: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("words", [(), ("results.tensorboard=true",)], ids=["asked-for-later", "from-the-start"])
def test_events_say_what_the_lines_say_also_of_a_resumed_run(federate: Federate, words: tuple[str, ...]) -> None:
    pytest.importorskip("tensorboard")
    name = f"run_name=events-{len(words)}"
    break_off(federate, 3, "aggregate_evaluate", *TOY, name, *words)
    _, path = federate(*TOY, name, "resume=true", "results.tensorboard=true")
    events = read_events(path)
    for kind, key in (("train", "loss"), ("evaluate", "loss"), ("train", "bytes_up")):
        assert events[f"{kind}/{key}"] == [(line["round"], pytest.approx(line[key])) for line in read_lines(path, kind)]
    spread = [(line["round"], pytest.approx(line["loss_spread"]["p90"])) for line in read_lines(path, "evaluate")]
    assert events["evaluate/loss_spread/p90"] == spread
    assert [step for step, _ in events["round/phases/save"]] == [1, 2, 3]
    assert not [tag for tag in events if "client" in tag and tag != "roster/clients"]
