"""A run goes back to an earlier round that it still holds, and ends in the bytes of one that was never disturbed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flapp.checkpoint.manager import ChunkManager
from flapp.config.load import compose
from flapp.config.schema import ConfigError
from flapp.messages import pack, views
from flapp.server import journals
from flapp.server.roster import FederationError
from flapp.strategy.fedavg import FedAvg
from tests.conftest import Federate, break_off, read_lines
from tools.deployment import submit
from tools.running import inline

TOY = ("experiment=toy_regression", "clients=2", "num_rounds=5", "checkpoint.keep_rounds=3")
FEDSA = (
    *("dataset=digits", "strategy=fedlora", "strategy.aggregation=fedsa", "evaluate.objective=personal_accuracy"),
    *("model=linear", "lora=default", "lora.targets=[fc]", "lora.rank=2", "clients=2"),
    *("num_rounds=4", "train.steps=2", "evaluate.every=4", "checkpoint.keep_rounds=3"),
)


def rounds_of(path: Path, kind: str) -> list[int]:
    return [line["round"] for line in read_lines(path, kind)]


def held(path: Path) -> list[int]:
    with ChunkManager(path / "server_chunks.db", create=False) as store:
        return [kept.round for kept in store.rounds()]


def test_a_run_that_saved_a_poisoned_round_goes_on_from_the_round_before_to_the_undisturbed_bytes(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*TOY, "evaluate.every=5")
    whole, whole_path = federate(*settings)
    real = FedAvg.combine_sum

    def poisoned(strategy: FedAvg, *args: Any) -> Any:
        arrays, found = real(strategy, *args)
        if strategy.phase.server_round == 3:
            for key, values in views(arrays).items():
                arrays[key] = pack(np.full_like(values, 1.7e19))  # just small enough to be taken
        return arrays, found

    with monkeypatch.context() as patch:
        patch.setattr(FedAvg, "combine_sum", poisoned)
        with pytest.raises(FederationError, match="round 4: .*0 of 2 clients gave a valid train reply"):
            federate(*settings, "run_name=poisoned")
    with pytest.raises(FederationError, match=r"round 4: .*0 of 2 clients"):
        federate(*settings, "run_name=poisoned", "resume=true")
    summary, path = federate(*settings, "run_name=poisoned", "resume=true", "resume_from=2")
    same = ("model_sha256", "loss", "objective", "rounds", "bytes_up", "bytes_down", "best_round")
    assert {key: summary[key] for key in same} == {key: whole[key] for key in same}
    for kind in ("train", "evaluate", "round"):
        assert rounds_of(path, kind) == rounds_of(whole_path, kind)


@pytest.mark.slow
def test_a_finished_run_goes_back_to_a_round_that_it_holds_and_comes_to_its_end_again(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, data_home: Path
) -> None:
    settings = (*TOY, "run_name=again", "resume=true")
    whole, path = federate(*settings[:-1])
    before = (path / "metrics.jsonl").read_text()
    for number in (2, 9):
        with pytest.raises(ConfigError) as caught:
            federate(*settings, f"resume_from={number}")
        said = f"resume_from={number} is not among the rounds that {path / 'server_chunks.db'} holds: "
        assert str(caught.value) == said + "choose one of 3, 4, 5"
    assert (path / "metrics.jsonl").read_text() == before
    assert held(path) == [3, 4, 5]

    class Started(Exception):
        """A federation would begin."""

    def start(config: Any, *rest: Any) -> Any:
        raise Started

    monkeypatch.setattr(inline, "run_inline", start)
    words = [*settings, f"home={data_home}"]
    assert submit.run_once(compose(words)) == whole
    with pytest.raises(Started):
        submit.run_once(compose([*words, "resume_from=3"]))
    with pytest.raises(ConfigError, match="resume_from=1 is not among the rounds"):
        submit.run_once(compose([*words, "resume_from=1"]))

    summary, _ = federate(*settings, "resume_from=3")
    assert {**summary, "seconds": 0} == {**whole, "seconds": 0}
    assert rounds_of(path, "roster") == [0, 3]
    assert held(path) == [3, 4, 5]
    break_off(federate, 4, "aggregate_train", *settings, "resume_from=3")  # later rounds are dropped before all else
    assert held(path) == [3]
    assert rounds_of(path, "round") == [1, 2, 3]
    assert federate(*settings)[0]["status"] == "finished"


def test_a_round_without_its_lines_is_refused_and_nothing_is_dropped(federate: Federate) -> None:
    _, path = federate(*TOY, "run_name=lineless")
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["round"] < 4))
    with pytest.raises(ConfigError, match=r"with round 3: .* use resume_from with a round that both have"):
        federate(*TOY, "run_name=lineless", "resume=true", "resume_from=4")
    assert held(path) == [3, 4, 5]
    assert federate(*TOY, "run_name=lineless", "resume=true", "resume_from=3")[0]["status"] == "finished"


def test_a_damaged_journal_of_clients_is_refused_and_nothing_is_dropped(federate: Federate) -> None:
    _, path = federate(*TOY, "run_name=damaged-clients")
    clients = (path / "clients.jsonl").read_text()
    (path / "clients.jsonl").write_text("damaged\n" + clients)
    before = (path / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"clients\.jsonl is damaged .*: restore a copy, or remove it"):
        federate(*TOY, "run_name=damaged-clients", "resume=true", "resume_from=4")
    assert (path / "metrics.jsonl").read_text() == before
    assert held(path) == [3, 4, 5]


def test_going_back_is_refused_if_the_best_round_is_gone_and_select_is_best(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*TOY, "evaluate.select=best", "run_name=best")
    summary, path = federate(*settings)
    assert summary["selected_round"] == 5
    edited = [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]
    for line in edited:
        if line["kind"] == "evaluate":
            line["val_loss"] = abs(line["round"] - 2)  # the best until round 5 was 2, which is no longer held
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in edited))
    with pytest.raises(ConfigError, match=r"resume_from=4: the best round until then was 2, which .* no longer holds"):
        federate(*settings, "resume=true", "resume_from=4")
    assert held(path) == [3, 4, 5]


def test_clients_that_kept_later_rounds_keep_their_own_tensors_of_the_round_that_is_gone_back_to(
    federate: Federate,
) -> None:
    whole, path = federate(*FEDSA, "run_name=private")
    assert held(path) == [2, 3, 4]
    again, _ = federate(*FEDSA, "run_name=private", "resume=true", "resume_from=2")
    assert again["model_sha256"] == whole["model_sha256"]
    assert again["personal_accuracy"] == whole["personal_accuracy"]
    settings = ("checkpoint.replay=false", "run_name=private", "resume=true", "resume_from=2")
    assert federate(*FEDSA, *settings)[0]["model_sha256"] == whole["model_sha256"]
    assert rounds_of(path, "roster") == [0, 2]
    assert not any(line["failures"] for line in read_lines(path, "train"))


@pytest.mark.slow
def test_going_back_to_before_a_source_change_compares_with_the_old_source(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*TOY, "run_name=mixed", "resume=true")
    whole, _ = federate(*TOY)
    break_off(federate, 4, "aggregate_train", *settings[:-1])
    with monkeypatch.context() as patch:
        patch.setattr(journals, "whole_digest", lambda config: "f" * 64)
        mixed, _ = federate(*settings, "resume_anyway=true")
        assert [note["round"] for note in mixed["resumed_anyway"]] == [3]
        with pytest.raises(ConfigError, match="last ran with other source"):
            federate(*settings, "resume_from=3")
    with pytest.raises(ConfigError, match="last ran with other source"):
        federate(*settings, "resume_from=4")
    again, _ = federate(*settings, "resume_from=3")
    assert "resumed_anyway" not in again
    assert again["model_sha256"] == whole["model_sha256"]
