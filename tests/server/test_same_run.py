"""A resumed run is the same run: over the same data, by the same source, or it is refused or says so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flapp import server_app
from flapp.config.load import compose
from flapp.config.schema import ConfigError
from flapp.custom import source_digest
from flapp.data.artifact import open_artifact, write_artifact
from flapp.data.shards.build import write_shards
from flapp.data.sources import ensure_artifacts
from flapp.messages import Claim
from flapp.server import journals, run_dir
from flapp.server.journals import ClientLedger
from flapp.server.roster import FederationError
from tests.conftest import Federate, break_off, read_lines
from tests.support.federations import nodes
from tests.support.leaf_files import as_leaf, draw_samples, write_leaf
from tools.run import final_line

TOY = ("experiment=toy_regression", "clients=2", "num_rounds=4")
FIX = "resume=true resume_anyway=true"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a home whose data a test may change."""
    ensure_artifacts(tmp_path / "data", "regression")
    return tmp_path


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that stands for a new start by edited source."""

    def edit() -> None:
        real = journals.read_source()
        monkeypatch.setattr(journals, "read_source", lambda: real | {"training.py": b"lr = 2 * lr", "new.py": b""})
        monkeypatch.setattr(journals, "whole_digest", lambda config: "f" * 64)

    return edit


def prepare_other_data(home: Path) -> None:
    folder = home / "data" / "regression" / "train"
    artifact = open_artifact(folder)
    write_artifact(folder, np.array(artifact.images), np.array(artifact.labels) + 1, [])


def edit_array(home: Path, name: str) -> Path:
    """Change one value of an artifact and leave its meta.json as it is."""
    path = home / "data" / "regression" / "train" / f"{name}.npy"
    array = np.load(path)
    array[7] += 1
    np.save(path, array)
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_a_run_is_not_resumed_over_data_that_was_prepared_anew_unless_it_is_to_go_on_anyway(
    federate: Federate, home: Path, trained: list[tuple[str, int]]
) -> None:
    settings = (*TOY, f"home={home}", "run_name=other-data")
    break_off(federate, 3, "aggregate_train", *settings)
    prepare_other_data(home)
    with pytest.raises(ConfigError) as caught:
        federate(*settings, "resume=true")
    said = str(caught.value)
    assert said.startswith("the run cannot continue: client 0: its data changed since the run began: shard digest was ")
    assert "client 1: its data changed" in said
    assert FIX in said
    assert "\n" not in said
    path = home / "runs" / "other-data"
    assert not [line for line in read_lines(path, "train") if line["round"] > 2]
    with pytest.raises(ConfigError, match="its data changed"):  # a refusal changes nothing
        federate(*settings, "resume=true")
    trained.clear()
    summary, _ = federate(*settings, "resume=true", "resume_anyway=true")
    assert [client for client, number in trained if number == 3] == ["0", "1"]  # nobody answers from its store
    (note,) = summary["resumed_anyway"]
    assert note["round"] == 2
    assert [text.split(":")[0] for text in note["changed"]] == ["client 0", "client 1"]
    assert f"\nresumed anyway after round 2: {note['changed'][0]}; " in final_line(summary)


def test_a_run_that_went_on_anyway_says_so_for_ever_and_goes_on_with_its_new_data(
    federate: Federate, home: Path
) -> None:
    settings = (*TOY, f"home={home}", "run_name=twice")
    break_off(federate, 2, "aggregate_train", *settings)
    prepare_other_data(home)
    break_off(federate, 3, "aggregate_train", *settings, "resume=true", "resume_anyway=true")
    summary, path = federate(*settings, "resume=true")
    assert [note["round"] for note in summary["resumed_anyway"]] == [1]
    assert [(line["client"], line["round"]) for line in lines_of(path / "clients.jsonl")] == [
        *(("0", 0), ("1", 0), ("0", 1), ("1", 1)),
    ]


def test_an_array_that_was_edited_is_refused_by_name_in_a_first_run_and_a_resumed_one(
    federate: Federate, home: Path
) -> None:
    settings = (*TOY, f"home={home}", "run_name=edited-later")
    break_off(federate, 3, "aggregate_train", *settings)
    path = edit_array(home, "images")
    said = rf"clients 0, 1: {path} was changed or damaged .*: delete {path.parent} and prepare it again"
    for words in (("run_name=edited-later", "resume=true"), ("run_name=edited-before",)):
        with pytest.raises(FederationError, match=said):
            federate(*TOY, f"home={home}", *words)
    shutil.rmtree(path.parent)  # as advised: an embedded dataset is prepared again on first use
    whole, _ = federate(*TOY, f"home={home}", "run_name=whole")
    assert federate(*settings, "resume=true")[0]["model_sha256"] == whole["model_sha256"]


def test_a_shard_that_was_made_anew_under_a_run_is_refused(federate: Federate, tmp_path: Path) -> None:
    def shards(seed: int) -> None:
        drawn = draw_samples(30, 25, 20)
        images, labels = drawn[min(drawn)]
        drawn[min(drawn)] = (images ^ seed, labels)
        source = write_leaf(tmp_path / f"raw-{seed}", as_leaf(drawn))
        write_shards(source, tmp_path / "data" / "femnist" / "shards", "natural", 3, overwrite=True)

    settings = ("experiment=femnist_fedavg", "model=linear", "clients=3", "num_rounds=3", "run_name=shards")
    settings = (*settings, f"home={tmp_path}", "evaluate.every=1", "strategy.fraction_train=1.0")
    shards(0)
    break_off(federate, 2, "aggregate_train", *settings)
    shards(1)
    with pytest.raises(ConfigError, match=r"cannot continue: client 0: its data changed since .*; bring its data back"):
        federate(*settings, "resume=true")


def test_what_each_client_had_is_recorded_once_and_those_that_join_later_are_added(
    federate: Federate, home: Path
) -> None:
    late = ("clients=3", "strategy.min_clients=2", "strategy.wait_for_clients=0.1", f"home={home}", "run_name=late")

    def two(*words: str) -> Any:
        return federate(*words, nodes=nodes(3)[:2])

    break_off(two, 3, "aggregate_train", *TOY, *late)
    path = home / "runs" / "late" / "clients.jsonl"
    assert [line["client"] for line in lines_of(path)] == ["0", "1"]
    with path.open("a") as file:
        file.write('{"round": 0, "client": "1", "shard_di')  # the power went while a line was written
    federate(*TOY, *late, "resume=true", nodes=nodes(3))
    assert [(line["client"], line["round"]) for line in lines_of(path)] == [("0", 0), ("1", 0), ("2", 2)]
    assert len({line["shard_digest"] for line in lines_of(path)}) == 3


def test_a_client_that_comes_back_with_other_data_during_a_run_is_refused_by_name(home: Path) -> None:
    run = run_dir.RunDirectory.create(compose([*TOY, f"home={home}", "run_name=back"]))
    ledger = ClientLedger(run)
    ledger.record({name: Claim(name, shard_digest=letter * 64) for name, letter in ("0a", "1b")})
    assert ledger.find_fault("0", "a" * 64) is None
    fault = ledger.find_fault("0", "c" * 64)
    assert fault is not None
    assert fault.startswith(f"its data changed since the run began: shard digest was {'a' * 12}, is {'c' * 12}")
    assert ledger.find_fault("2", "c" * 64) is None  # joins for the first time
    run.close()


def test_edited_source_is_refused_by_both_digests_and_the_names_of_the_files(
    federate: Federate, edited: Callable[[], None]
) -> None:
    break_off(federate, 3, "aggregate_train", *TOY, "run_name=edited-source")
    before = source_digest()[:12]
    edited()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_app, "Run", lambda *_: pytest.fail("the server asked the clients before it compared"))
        with pytest.raises(ConfigError) as caught:
            federate(*TOY, "run_name=edited-source", "resume=true")
    said = f"source digest was {before}, is {'f' * 12}: new.py, training.py changed"
    assert f"run_name=edited-source last ran with other source ({said}): " in str(caught.value)
    assert "resume_anyway=true" in str(caught.value)
    summary, _ = federate(*TOY, "run_name=edited-source", "resume=true", "resume_anyway=true")
    assert summary["resumed_anyway"] == [{"round": 2, "changed": [said]}]
    assert f"resumed anyway after round 2: {said}\n" in final_line(summary)


@pytest.mark.slow
def test_other_versions_or_nothing_recorded_are_a_warning(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, data_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = federate(*TOY)
    break_off(federate, 3, "aggregate_train", *TOY, "run_name=updated")
    shutil.copytree(data_home / "runs" / "updated", data_home / "runs" / "older")
    before = journals.versions()
    with monkeypatch.context() as patch:
        patch.setattr(journals, "versions", lambda: "python=4.0 torch=9")
        summary, path = federate(*TOY, "run_name=updated", "resume=true")
    assert f"the versions were {before}, are python=4.0 torch=9, so the final bytes may differ" in caplog.text
    recorded = [(line["round"], line["versions"]) for line in lines_of(path / "environment.jsonl")]
    assert recorded == [(0, before), (2, "python=4.0 torch=9")]
    assert summary["model_sha256"] == whole["model_sha256"]
    assert "resumed_anyway" not in summary

    for name in ("environment.jsonl", "clients.jsonl"):
        (data_home / "runs" / "older" / name).unlink()
    caplog.clear()
    summary, path = federate(*TOY, "run_name=older", "resume=true")
    assert summary["model_sha256"] == whole["model_sha256"]
    assert "environment.jsonl, so it cannot be checked whether the source is the same" in caplog.text
    assert "clients.jsonl, so it cannot be checked whether the clients' data is the same" in caplog.text
    assert [line["round"] for line in lines_of(path / "clients.jsonl")] == [2, 2]


def test_a_new_run_inside_the_folder_of_another_is_refused_and_so_is_one_around_others(tmp_path: Path) -> None:
    """A run named a/adapter would be deleted when run a leaves its own adapter there."""

    def attempt(name: str) -> Path:
        run = run_dir.RunDirectory.create(compose([*TOY, f"home={tmp_path}", f"run_name={name}"]))
        run.finish("0" * 64)
        return run.path

    for setting in ("resume_anyway=true", "resume_from=2"):
        with pytest.raises(ConfigError, match=f"{setting} has no effect without resume=true: add it"):
            compose([*TOY, setting])
    outer = attempt("a")
    with pytest.raises(ConfigError, match=r"run_name=a/adapter lies inside the folder of run a, .*another name"):
        attempt("a/adapter")
    assert not (outer / "adapter").exists()
    with pytest.raises(ConfigError, match="run_name=a/b/c lies inside the folder of run a,"):
        attempt("a/b/c")
    assert attempt("sweep/0").parent == attempt("sweep/1").parent
    with pytest.raises(ConfigError, match=r"run_name=sweep is taken: .* is not a run .*: choose another name"):
        attempt("sweep")
    with pytest.raises(ConfigError, match=r"run_name=a is taken: .*resume=true"):
        attempt("a")
    attempt("n" * 255)
