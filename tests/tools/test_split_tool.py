"""Runs that end with their model stored split, and python -m tools.split_model for those that did not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flapp.model.split.factory import ModelFactory
from flapp.model.split.files import COMPONENTS, StorageManager, read_metadata
from flapp.server.roster import Roster
from tests.conftest import Federate
from tests.support.split_models import write_vit, write_vit_run
from tests.tools.conftest import Refusal
from tools import split_model

ONE_ROUND = ("clients=2", "num_rounds=1", "train.steps=2", "evaluate.personal_epochs=0", "model.dropout=0.1")
LORA = ("strategy=fedlora", "lora=default", "lora.rank=4", "strategy.aggregation=fedit")


def auto(folder: Path) -> tuple[str, ...]:
    return ("split=auto", f"split.model_storage_dir={folder}", "split.split_config=1-2")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what the tool reads of a finished run."""
    return write_vit_run(tmp_path_factory.mktemp("runs") / "mine", of_an_older_version=True)


@pytest.mark.parametrize("settings", [ONE_ROUND, ONE_ROUND + LORA], ids=["fedavg", "fedlora"])
def test_a_run_with_auto_save_ends_with_its_model_stored_split(
    federate: Federate, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    summary, path = federate(*settings, *auto(tmp_path / "split"))
    whole = load_file(path / "model.safetensors")
    models = ModelFactory.load_split_models(tmp_path / "split", path.name)
    stored = {key: tensor for model in models for key, tensor in model.state_dict().items()}
    assert stored.keys() == whole.keys()
    assert all(torch.equal(stored[key], tensor) for key, tensor in whole.items())
    assert {model.part.model_sha256 for model in models} == {summary["model_sha256"]}
    assert models[0].part.config["dropout"] == 0.1
    without, _ = federate(*settings)
    assert without["model_sha256"] == summary["model_sha256"]


def test_a_run_whose_model_could_not_be_stored_fails_before_round_one(
    federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Roster, "wait", lambda *_: pytest.fail("the run began"))
    (tmp_path / "split").write_text("in the way")
    with pytest.raises(ValueError, match="split is not a folder: name another storage folder"):
        federate(*ONE_ROUND, *auto(tmp_path / "split"))
    (tmp_path / "other/top").mkdir(parents=True)
    name = "in_the_way"
    (tmp_path / f"other/top/{name}_1-2_top.safetensors").write_text("of another run")
    for resume in ([], ["resume=true"]):
        with pytest.raises(ValueError, match=f"{name}_1-2_top.safetensors exists already"):
            federate(*ONE_ROUND, *auto(tmp_path / "other"), f"run_name={name}", *resume)


def test_a_run_that_broke_off_while_its_model_was_stored_is_resumed(
    federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "broken_off"
    place = (tmp_path / "split", name, 1, 2, "bottom")
    bottom = StorageManager.get_split_model_path(*place)
    bottom.parent.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(ModelFactory, "create_split_models", lambda *_, **__: bottom.write_text("half") and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            federate(*ONE_ROUND, *auto(tmp_path / "split"), f"run_name={name}")
    summary, _ = federate(*ONE_ROUND, *auto(tmp_path / "split"), f"run_name={name}", "resume=true")
    assert read_metadata(bottom).model_sha256 == summary["model_sha256"]


def test_the_tool_splits_a_finished_run_and_checks_it(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: Refusal
) -> None:
    arguments = [str(run_dir), "--points", "1", "2", "--out", str(tmp_path), "--check"]
    assert split_model.main(arguments) == 0
    out, err = capsys.readouterr()
    for component in COMPONENTS:
        path = StorageManager.get_split_model_path(tmp_path, "sweep-0", 1, 2, component)
        assert str(path) in out
        assert read_metadata(path).config["dropout"] == 0.1
    assert "checked: top(trunk(bottom(x))) is the whole model's output, bit for bit" in out
    assert err == ""
    assert "sweep-0_1-2_bottom.safetensors exists already" in refusal(split_model.main, *arguments)
    assert split_model.main([*arguments, "--overwrite"]) == 0


def test_the_check_finds_components_that_are_not_the_model(
    run_dir: Path, tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_vit(tmp_path / "other.safetensors", seed=1)
    monkeypatch.setattr(split_model, "load_model", lambda *_: whole)
    error = refusal(split_model.main, run_dir, "--points", 1, 2, "--out", tmp_path, "--check")
    assert "the components do not give the whole model's output" in error


def test_the_tool_refuses_in_one_line(run_dir: Path, tmp_path: Path, refusal: Refusal) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "run")
    no_run = "is not the directory of a finished run"
    other = json.dumps({"status": "finished", "model_sha256": "0" * 64})
    for run, points, file, text, message in (
        (run_dir, "2 3", None, "", "split points 2 and 3 of a model of 3 layers are not possible"),
        (tmp_path / "nowhere", "1 2", None, "", f"nowhere {no_run}"),
        (copy, "1 2", "metrics.json", '{"status": "failed"}', "(status failed): resume it with resume=true"),
        (copy, "1 2", "metrics.json", other, "metrics.json says 000000000000: restore it from a copy"),
        (copy, "1 2", "metrics.json", "", no_run),
        (copy, "1 2", "metrics.json", "[]", "config.yaml or metrics.json is damaged"),
        *((copy, "1 2", "config.yaml", text, no_run) for text in ("a: [", "a: 1", "[]", "")),
    ):
        if file:
            (run / file).write_text(text)
        assert message in refusal(split_model.main, run, "--points", *points.split(), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
