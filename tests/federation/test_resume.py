"""A run that breaks off at any moment and is resumed ends in the bytes of one that did not."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from flapp.checkpoint.manager import ChunkManager
from flapp.config.schema import ConfigError
from flapp.model.files import save_tensors
from tests.conftest import Federate, break_and_resume, break_off, read_lines

TOY = ("experiment=toy_regression", "num_rounds=4", "evaluate.central=true")


@pytest.fixture(scope="module")
def whole(federate: Federate) -> tuple[dict[str, Any], Path]:
    """Return the summary and the folder of an undisturbed run."""
    return federate(*TOY, "run_name=whole")


@pytest.mark.parametrize("place", ["aggregate_train", "aggregate_evaluate", "configure_evaluate", "facts"])
def test_a_run_that_broke_off_in_any_phase_is_resumed_to_the_same_bytes_and_figures(
    federate: Federate,
    data_home: Path,
    whole: tuple[dict[str, Any], Path],
    place: str,
    trained: list[tuple[str, int]],
) -> None:
    """Clients that have trained the round answer from their stores; lines of a round not completed are dropped."""
    name = f"broken-{place}"
    break_off(federate, 3, place, *TOY, f"run_name={name}")
    with (data_home / "runs" / name / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "round": 3, "ti')
    resumed, path = federate(*TOY, f"run_name={name}", "resume=true")
    same = ("status", "model_sha256", "rounds", "loss", "objective", "bytes_up", "bytes_down")
    assert {key: resumed[key] for key in same} == {key: whole[0][key] for key in same}
    for kind in ("train", "evaluate", "central"):
        found, expected = ([(line["round"], line["loss"]) for line in read_lines(p, kind)] for p in (path, whole[1]))
        assert found == expected
    assert [line["round"] for line in read_lines(path, "roster")] == [0, 2]
    assert sorted(trained) == [(str(client), number) for client in range(3) for number in range(1, 5)]


@pytest.mark.parametrize("setting", ["checkpoint.replay=false", "checkpoint=off"])
def test_without_replay_a_client_trains_again_to_the_same_bytes(
    federate: Federate, whole: tuple[dict[str, Any], Path], trained: list[tuple[str, int]], setting: str
) -> None:
    settings = (*TOY, setting, f"run_name={setting.replace('=', '-')}")
    resumed, _ = break_and_resume(federate, 2, "aggregate_train", *settings)
    assert resumed["model_sha256"] == whole[0]["model_sha256"]
    assert [client for client, number in trained if number == 2] == ["0", "1", "2"] * 2


def test_a_client_whose_data_or_store_changed_trains_anew(
    federate: Federate, data_home: Path, whole: tuple[dict[str, Any], Path], trained: list[tuple[str, int]]
) -> None:
    break_off(federate, 3, "aggregate_train", *TOY, "run_name=spoiled")
    trained.clear()
    stores = [data_home / "checkpoints" / "spoiled" / f"client_{i}" / f"client_{i}_chunks.db" for i in range(3)]
    stores[0].write_bytes(b"not a database, but long enough to be read as one")
    stores[1].unlink()
    with sqlite3.connect(stores[2]) as database:
        database.execute("UPDATE rounds SET input_digest = 'another model'")
    resumed, _ = federate(*TOY, "run_name=spoiled", "resume=true")
    assert resumed["model_sha256"] == whole[0]["model_sha256"]
    assert [client for client, number in trained if number == 3] == ["0", "1", "2"]


def test_changed_settings_are_refused_by_name_and_those_that_do_not_matter_are_not(federate: Federate) -> None:
    break_off(federate, 2, "aggregate_train", *TOY, "run_name=changed")
    found = r"other settings \(partition.seed was 0, is 3; seed was 0, is 3; train.lr was 0.01, is 0.5\)"
    with pytest.raises(ConfigError, match=found):
        federate(*TOY, "run_name=changed", "resume=true", "train.lr=0.5", "seed=3")
    harmless = ("strategy.timeout=60", "checkpoint.keep_rounds=1", "deployment.client_cpus=2")
    assert federate(*TOY, "run_name=changed", "resume=true", *harmless)[0]["status"] == "finished"


def test_a_finished_run_resumed_is_the_same_run_and_another_name_is_refused(
    federate: Federate, whole: tuple[dict[str, Any], Path]
) -> None:
    first, path = whole
    lines = (path / "metrics.jsonl").read_text()
    again, _ = federate(*TOY, "run_name=whole", "resume=true")
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert (path / "metrics.jsonl").read_text() == lines
    with pytest.raises(ConfigError, match=r"resume=true finds no run whale in .*did you mean whole\?"):
        federate(*TOY, "run_name=whale", "resume=true")


def test_a_run_that_lost_its_store_is_refused_and_left_as_it_was(federate: Federate) -> None:
    _, path = federate(*TOY, "run_name=robbed")
    before = {name: (path / name).read_bytes() for name in ("metrics.json", "metrics.jsonl", "config.yaml")}
    (path / "server_chunks.db").unlink()
    with pytest.raises(ConfigError, match=r"ends with round 0, metrics.jsonl ends with round \d: restore both"):
        federate(*TOY, "run_name=robbed", "resume=true")
    assert {name: (path / name).read_bytes() for name in before} == before
    (path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="is not a run directory: .* has no config.yaml"):
        federate(*TOY, "run_name=robbed", "resume=true")


def test_the_server_keeps_the_global_model_of_the_last_rounds(federate: Federate) -> None:
    summary, path = federate(*TOY, "checkpoint=recent", "checkpoint.chunk_num=null", "checkpoint.keep_rounds=2")
    with ChunkManager(path / "server_chunks.db", create=False) as store:
        assert [kept.round for kept in store.rounds()] == [3, 4]
        assert store.rounds()[-1].metrics["accepted"] == {}  # nobody keeps private tensors
        last = store.reconstruct_model_from_chunks(4)
    digest = save_tensors(last, path / "again.safetensors", model="linear", shape=(10,), classes=0)
    assert digest == summary["model_sha256"]


def test_ten_chunks_a_round_leave_fifty_metadata_rows_a_client_after_five_rounds(
    federate: Federate, data_home: Path
) -> None:
    federate("experiment=toy_regression", "run_name=fifty")
    for client in range(3):
        path = data_home / "checkpoints" / "fifty" / f"client_{client}" / f"client_{client}_chunks.db"
        with sqlite3.connect(path) as database:
            assert database.execute("SELECT count(*) FROM chunk_metadata").fetchone() == (50,)
