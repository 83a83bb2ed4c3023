"""A run that breaks off at any moment and is resumed ends in the bytes of one that did not."""

import json
import multiprocessing
import random
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict

from flapp import client_app, server_app
from flapp.checkpoint.manager import ChunkManager
from flapp.config.load import compose, to_json
from flapp.config.schema import ConfigError
from flapp.model.files import save_tensors
from tests.conftest import LocalGrid, break_off, read_lines

Federate = Callable[..., tuple[dict[str, Any], Path]]
TOY = ("experiment=toy_regression", "num_rounds=4")
MOMENTUM = (  # everything that carries state from step to step, or draws at random
    *("clients=5", "num_rounds=6", "train.optimizer=sgd", "train.momentum=0.9", "train.steps=2", "model.dropout=0.2"),
    *("strategy.fraction_train=0.8", "evaluate.every=2", "evaluate.personal_epochs=0", "train.weight_decay=0.0"),
)


def count_fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return a list that grows by (client, round) whenever a client really trains."""
    trained: list[tuple[str, int]] = []
    real = client_app.fit

    def fit(*args: Any) -> Any:
        if args[-1] == "train":
            trained.append((args[1].client_id, args[1].instructions.server_round))
        return real(*args)

    monkeypatch.setattr(client_app, "fit", fit)
    return trained


@pytest.mark.parametrize("place", ["aggregate_train", "aggregate_evaluate", "configure_evaluate", "facts"])
def test_a_run_that_broke_off_in_any_phase_is_resumed_to_the_same_bytes_and_figures(
    federate: Federate, place: str
) -> None:
    whole, whole_path = federate(*TOY, "evaluate.central=true")
    break_off(federate, 3, place, *TOY, "evaluate.central=true", f"run_name=broken-{place}")
    resumed, path = federate(*TOY, "evaluate.central=true", f"run_name=broken-{place}", "resume=true")
    same = ("status", "model_sha256", "rounds", "loss", "objective", "bytes_up", "bytes_down")
    assert {key: resumed[key] for key in same} == {key: whole[key] for key in same}
    for kind in ("train", "evaluate", "central"):
        assert [line["round"] for line in read_lines(path, kind)] == [
            line["round"] for line in read_lines(whole_path, kind)
        ]
    assert [line["round"] for line in read_lines(path, "roster")] == [0, 2]


def test_a_client_that_has_trained_the_round_answers_from_its_store(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = federate(*TOY)
    trained = count_fits(monkeypatch)
    break_off(federate, 3, "aggregate_train", *TOY, "run_name=replayed")
    resumed, _ = federate(*TOY, "run_name=replayed", "resume=true")
    assert resumed["model_sha256"] == whole["model_sha256"]
    assert sorted(trained) == [(str(client), number) for client in range(3) for number in range(1, 5)]


@pytest.mark.parametrize("setting", ["checkpoint.replay=false", "checkpoint=off"])
def test_without_replay_a_client_trains_again_to_the_same_bytes(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    whole, _ = federate(*TOY, setting)
    trained = count_fits(monkeypatch)
    break_off(federate, 2, "aggregate_train", *TOY, setting, f"run_name={setting.replace('=', '-')}")
    resumed, _ = federate(*TOY, setting, f"run_name={setting.replace('=', '-')}", "resume=true")
    assert resumed["model_sha256"] == whole["model_sha256"]
    assert [client for client, number in trained if number == 2] == ["0", "1", "2"] * 2


def test_a_client_whose_data_or_store_changed_trains_anew(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, data_home: Path
) -> None:
    whole, _ = federate(*TOY)
    break_off(federate, 3, "aggregate_train", *TOY, "run_name=spoiled")
    trained = count_fits(monkeypatch)
    stores = data_home / "checkpoints" / "spoiled"
    (stores / "client_0" / "client_0_chunks.db").write_bytes(b"not a database, but long enough to be read as one")
    (stores / "client_1" / "client_1_chunks.db").unlink()
    with sqlite3.connect(stores / "client_2" / "client_2_chunks.db") as database:
        database.execute("UPDATE rounds SET input_digest = 'another model'")
    resumed, _ = federate(*TOY, "run_name=spoiled", "resume=true")
    assert resumed["model_sha256"] == whole["model_sha256"]
    assert [client for client, number in trained if number == 3] == ["0", "1", "2"]


def test_changed_settings_are_refused_by_name_and_those_that_do_not_matter_are_not(
    federate: Federate,
) -> None:
    break_off(federate, 2, "aggregate_train", *TOY, "run_name=changed")
    with pytest.raises(ConfigError) as caught:
        federate(*TOY, "run_name=changed", "resume=true", "train.lr=0.5", "seed=3")
    assert "other settings (partition.seed was 0, is 3; seed was 0, is 3; train.lr was 0.01, is 0.5)" in str(
        caught.value
    )
    harmless = ("strategy.timeout=60", "checkpoint.keep_rounds=1", "deployment.client_cpus=2")
    assert federate(*TOY, "run_name=changed", "resume=true", *harmless)[0]["status"] == "finished"


def test_a_finished_run_resumed_is_the_same_run(federate: Federate) -> None:
    first, path = federate(*TOY, "run_name=done")
    lines = (path / "metrics.jsonl").read_text()
    again, _ = federate(*TOY, "run_name=done", "resume=true")
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert (path / "metrics.jsonl").read_text() == lines


def test_resuming_what_is_not_there_is_refused_with_the_nearest_name(federate: Federate) -> None:
    federate(*TOY, "run_name=monday")
    with pytest.raises(ConfigError, match=r"resume=true finds no run mondey in .*did you mean monday\?"):
        federate(*TOY, "run_name=mondey", "resume=true")


def test_a_run_that_lost_its_store_is_refused_and_left_as_it_was(federate: Federate) -> None:
    _, path = federate(*TOY, "run_name=robbed")
    before = {name: (path / name).read_bytes() for name in ("metrics.json", "metrics.jsonl", "config.yaml")}
    (path / "server_chunks.db").unlink()
    with pytest.raises(ConfigError, match=r"ends with round 0, metrics.jsonl with round \d: bring the right"):
        federate(*TOY, "run_name=robbed", "resume=true")
    assert {name: (path / name).read_bytes() for name in before} == before
    (path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="is not a run directory: .* has no config.yaml"):
        federate(*TOY, "run_name=robbed", "resume=true")


def test_lines_of_a_round_that_was_not_completed_are_dropped(federate: Federate, data_home: Path) -> None:
    whole, whole_path = federate(*TOY)
    break_off(federate, 3, "facts", *TOY, "run_name=torn")
    with (data_home / "runs" / "torn" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "round": 3, "ti')
    resumed, path = federate(*TOY, "run_name=torn", "resume=true")
    losses = [[line["loss"] for line in read_lines(p, "evaluate")] for p in (path, whole_path)]
    assert losses[0] == losses[1]
    assert resumed["bytes_up"] == whole["bytes_up"]


def test_the_server_keeps_the_global_model_of_the_last_rounds(federate: Federate) -> None:
    summary, path = federate(*TOY, "checkpoint=recent", "checkpoint.chunk_num=null", "checkpoint.keep_rounds=2")
    with ChunkManager(path / "server_chunks.db", create=False) as store:
        assert [kept.round for kept in store.rounds()] == [3, 4]
        assert store.rounds()[-1].metrics["accepted"] == {}  # nobody keeps private tensors
        assert (
            save_tensors(
                store.reconstruct_model_from_chunks(4),
                path / "again.safetensors",
                model="linear",
                shape=(10,),
                classes=0,
            )
            == summary["model_sha256"]
        )


def test_ten_chunks_a_round_leave_fifty_metadata_rows_a_client_after_five_rounds(
    federate: Federate, data_home: Path
) -> None:
    federate("experiment=toy_regression", "run_name=fifty")
    for client in range(3):
        path = data_home / "checkpoints" / "fifty" / f"client_{client}" / f"client_{client}_chunks.db"
        with sqlite3.connect(path) as database:
            assert database.execute("SELECT count(*) FROM chunk_metadata").fetchone() == (50,)


def start(overrides: list[str]) -> None:
    """Run a federation in this process (the target of processes to be killed)."""
    torch.set_num_threads(1)
    settings = compose(overrides)
    run_config = {"config-json": to_json(settings)}
    nodes = [{"partition-id": i, "num-partitions": settings.clients} for i in range(settings.clients)]
    server_app.app(LocalGrid(run_config, nodes), Context(1, 1, {}, RecordDict(), run_config))


def run_until_killed(overrides: list[str], seconds: float | None) -> bool:
    """Run a federation in a process of its own; kill -9 it after `seconds`; say whether it came to its end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.federation.test_resume", "torchvision"])
    process = context.Process(target=start, args=(overrides,))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return False
    assert process.exitcode == 0
    return True


def kill_and_resume(home: Path, kills: int, seed: int) -> None:
    """Kill runs `kills` times at random moments, resume each time, and compare with an undisturbed run."""
    draw = random.Random(seed)
    settings = [f"home={home}", *MOMENTUM]
    run_until_killed([*settings, "run_name=warm"], None)
    began = time.monotonic()
    assert run_until_killed([*settings, "run_name=whole"], None)
    duration = time.monotonic() - began
    expected = json.loads((home / "runs" / "whole" / "metrics.json").read_text())
    killed, run = 0, 0
    while killed < kills:
        run += 1
        name = f"run_name=killed-{run}"
        folder = home / "runs" / f"killed-{run}"
        finished = False
        while not finished and killed < kills:
            overrides = [*settings, name, f"resume={str(folder.exists()).lower()}"]
            finished = run_until_killed(overrides, draw.uniform(0.0, 0.6 * duration))
            killed += not finished
        if not finished:
            assert run_until_killed([*settings, name, f"resume={str(folder.exists()).lower()}"], None)
        found = json.loads((folder / "metrics.json").read_text())
        assert found["model_sha256"] == expected["model_sha256"]
        for key in ("rounds", "accuracy", "loss", "bytes_up", "bytes_down"):
            assert found[key] == expected[key]


def test_runs_killed_at_random_moments_and_resumed_end_in_the_same_bytes(data_home: Path, federate: Federate) -> None:
    federate("model=linear", "clients=2", "num_rounds=1")  # prepares the digits
    kill_and_resume(data_home, kills=4, seed=1)
