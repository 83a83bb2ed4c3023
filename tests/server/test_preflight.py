"""What is known to be wrong before a run starts is said in one line with the fix, and leaves nothing behind."""

import fcntl
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flapp.config.load import compose
from flapp.config.schema import Config, ConfigError
from flapp.data.shards.manifest import Manifest
from flapp.listing import by_reason, list_names
from flapp.messages import MessageError
from flapp.model import weight_files
from flapp.model.build import build_model
from flapp.model.files import save_tensors
from flapp.partitions import open_partition
from flapp.server import preflight
from flapp.server.preflight import check_run
from flapp.server.roster import FederationError
from flapp.server.run_dir import RunDirectory
from flapp.server.run_names import is_failed_start
from flapp.strategy.phase import Phase
from tests.conftest import Broken, Federate, LocalGrid, break_off, run_app
from tests.support.federations import nodes
from tools import run
from tools.deployment import submit
from tools.running import inline

TOY = ("experiment=toy_regression", "clients=2", "num_rounds=2")
LORA = ("strategy=fedlora", "lora=default")


def settings(home: Path, *words: str) -> Config:
    return compose([f"home={home}", "run_name=checked", *words])


def check(home: Path, *words: str, clients_here: bool = True) -> None:
    check_run(settings(home, *words), clients_here, quick=True)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["dataset=cifar10"], r"dataset cifar10 is not prepared: .* python -m tools.prepare_data dataset=cifar10"),
        (["dataset.shape=[8,8,1]"], r"shape \[32, 32, 1\] in 10 classes, .* set dataset.shape=\[32,32,1\]"),
        (["dataset.classes=9"], r"settings say \[32, 32, 1\] in 9: set .* dataset.classes=10"),
        (["clients=500"], r"cannot give each of clients=500 partition.min_size=10 of 1437 .* to at most 143"),
        (["partition=pathological", "partition.classes_per_client=11"], "set partition.classes_per_client between"),
        (["partition=natural"], r"partition=natural has no .*: make it with python -m tools.prepare_data"),
        (["experiment=femnist_fedavg", "distributed_data.manifest=/none"], "no manifest at .*: make the shards with"),
        (["deployment.client_gpus=99"], r"deployment.client_gpus=99 is more than the \d GPUs there are: lower it"),
        (["deployment=local", "deployment.client_keys=/none"], "deployment.client_keys=/none: .* give a folder of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_reported_with_the_fix_and_leaves_no_run(data_home: Path, words: list[str], line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        check(data_home, *words)
    assert "\n" not in str(caught.value)
    assert not (data_home / "runs" / "checked").exists()


SPLIT = ("split=auto", "split.split_config=1-2", "results.tensorboard=true")


@pytest.mark.parametrize("words", [[], TOY, LORA, ["model=vit_b_16", "dataset.augment=true"], SPLIT])
def test_a_run_that_can_start_is_let_through_with_its_partition_made(data_home: Path, words: Sequence[str]) -> None:
    check(data_home, *words)
    assert not (data_home / "runs" / "checked").exists()
    assert not (data_home / "split_models").exists()
    assert list((data_home / "data").glob("*/partitions/*.safetensors"))


def test_the_base_of_the_digits_comes_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["experiment=digits_fedlora"]
    said = r"digits_base/model.safetensors is not a file: make it first with python -m tools.run run_name=digits_base"
    with pytest.raises(ConfigError, match=rf"{said} home={tmp_path}$"):
        check(tmp_path, *words)
    monkeypatch.setenv("FLAPP_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=rf"{said}$"):
        check(tmp_path, *words)
    (tmp_path / "runs" / "digits_base").mkdir(parents=True)
    (tmp_path / "runs" / "digits_base" / "config.yaml").touch()
    with pytest.raises(ConfigError, match="finish that run, with its settings and run_name=digits_base resume=true"):
        check(tmp_path, *words)
    with pytest.raises(ConfigError, match="there is no run other; make it first, or give the path"):
        check(tmp_path, f"model.pretrained={tmp_path}/runs/other/model.safetensors")
    with pytest.raises(ConfigError, match=r"model.pretrained=/none.pth is not a file: give the path of one that exist"):
        check(tmp_path, "model.pretrained=/none.pth")
    with pytest.raises(ConfigError, match=r"lora.adapter=/none is not a folder: give the path of one that exists"):
        check(tmp_path, *LORA, "lora.adapter=/none")
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_weights_and_adapters_that_do_not_fit_are_refused_by_name(data_home: Path, federate: Federate) -> None:
    words = (*LORA, "num_rounds=1", "clients=2", "train.steps=1", "evaluate.personal_epochs=0")
    _, path = federate(*words)
    check(data_home, *words, f"lora.adapter={path}/adapter")
    check(data_home, f"model.pretrained={path}/model.safetensors")
    with pytest.raises(ValueError, match="set lora.rank and lora.alpha to the adapter's"):
        check(data_home, *words, "lora.rank=4", f"lora.adapter={path}/adapter")
    with pytest.raises(ValueError, match=r"does not fit this ViT with its lora.targets: \d+ missing"):
        check(data_home, *words, "lora.targets=[qkv,proj,mlp.0]", f"lora.adapter={path}/adapter")
    with pytest.raises(ValueError, match="adapter_config.json is missing"):
        check(data_home, *words, f"lora.adapter={path}")
    with pytest.raises(ValueError, match="ViT has no adapters to start from .*: set lora=default"):
        check(data_home, f"lora.adapter={path}/adapter")
    with pytest.raises(ValueError, match=r"model.safetensors does not fit this Linear: 2 missing.*; give weights of"):
        check(data_home, "model=linear", f"model.pretrained={path}/model.safetensors")


def test_of_large_weights_only_names_and_shapes_are_read(
    data_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "linear.pth"
    torch.save(build_model("linear", (32, 32, 1), 10).state_dict(), path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    words = ("model=linear", f"model.pretrained={path}")
    with pytest.raises(ValueError, match="is damaged"):
        check(data_home, *words)
    monkeypatch.setattr(weight_files, "CHECKED_BYTES", 0)
    check(data_home, *words)
    save_tensors({"fc.weight": torch.zeros(10, 4), "fc.bias": torch.zeros(10)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"misshapen, first fc.weight \(10, 4\) where the model has \(10, 1024\)"):
        check(data_home, "model=linear", f"model.pretrained={tmp_path}/other.safetensors")


def test_shards_are_compared_with_their_manifest_and_a_run_without_any_shard_is_refused(
    shards: Manifest, tmp_path: Path
) -> None:
    words = ("experiment=femnist_fedavg", f"distributed_data.shard_path={shards.folder}")
    good = (*words, "clients=3", "partition=round_robin")
    check(tmp_path, *good)
    with pytest.raises(ValueError, match="lists 3 clients: set clients=3"):
        check(tmp_path, *words, "partition=round_robin")
    with pytest.raises(ValueError, match="is of shards cut by partition=round_robin: set partition=round_robin"):
        check(tmp_path, *words, "clients=3")
    shutil.rmtree(shards.folder / "client_0")
    check(tmp_path, *good)  # the others run without it
    shutil.rmtree(shards.folder / "client_1")
    shutil.rmtree(shards.folder / "client_2")
    with pytest.raises(ValueError, match=r"no shard at .*client_0 .*: make it with python -m tools.prepare_data"):
        check(tmp_path, *good)
    check(tmp_path, *good, clients_here=False)  # sites have shards of their own


def test_what_only_the_sites_have_is_not_asked_for_here(tmp_path: Path, no_compiler: None) -> None:
    device = "cpu" if torch.cuda.is_available() else "cuda"
    elsewhere = ("dataset=cifar10", "deployment=local", f"train.device={device}", "train.compile=true")
    check(tmp_path, *elsewhere, clients_here=False)
    with pytest.raises(ValueError, match="dataset cifar10 is not prepared"):
        check(tmp_path, *elsewhere, "evaluate.central=true", clients_here=False)
    assert not (tmp_path / "data" / "cifar10").exists()


def test_a_device_compiler_or_package_that_is_not_there_is_refused(
    data_home: Path, no_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="train.device=cuda, but .* no CUDA device here: set train.device=auto"):
            check(data_home, "train.device=cuda")
    with pytest.raises(ConfigError, match="train.compile=true needs a C.. compiler, .* or set train.compile=false"):
        check(data_home, "train.compile=true", "train.device=cpu")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[tensorboard\]", or set results.tensorboard=false'):
        check(data_home, "results.tensorboard=true")


def test_a_home_that_cannot_hold_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"home={tmp_path}/file/home cannot be used: .*/file is not a folder"):
        check(tmp_path / "file" / "home")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=rf"{tmp_path} is not writable; set home to a folder that you may write"):
        check(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_split_that_could_not_be_stored_is_refused_without_a_folder(data_home: Path, tmp_path: Path) -> None:
    words = ("split=auto", "split.split_config=1-2", f"split.model_storage_dir={tmp_path}/split")
    check(data_home, *words)
    assert not (tmp_path / "split").exists()
    taken = tmp_path / "split" / "bottom" / "checked_1-2_bottom.safetensors"
    taken.parent.mkdir(parents=True)
    taken.touch()
    with pytest.raises(ValueError, match=r"checked_1-2_bottom.safetensors exists already: .* give another name"):
        check(data_home, *words)


def test_what_would_take_long_is_left_to_the_clients(data_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(data_home)
    asked: list[Config] = []
    monkeypatch.setattr(preflight, "open_partition", asked.append)
    monkeypatch.setattr(preflight, "QUICK_SHARES", 99)
    check(data_home)
    assert asked == []
    with pytest.raises(ValueError, match="cannot give each of clients=500"):
        check(data_home, "clients=500")
    check_run(settings(data_home), clients_here=True)
    assert len(asked) == 1
    monkeypatch.undo()
    monkeypatch.setattr(preflight, "QUICK_BYTES", 0)
    check(data_home)  # its images have been compared
    assert open_partition(settings(data_home))


def test_tools_run_checks_before_it_starts_anything(data_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(_: Config) -> Any:
        raise AssertionError("a SuperLink was chosen")

    monkeypatch.setattr(submit, "choose_superlink", started)
    with pytest.raises(ValueError, match="cannot give each of clients=500"):
        submit.run_once(settings(data_home, "deployment=simulation", "clients=500"))
    with pytest.raises(AssertionError, match="was chosen"):
        submit.run_once(settings(data_home, "deployment=simulation"))
    far = ("deployment=local", "deployment.address=fl.example.org:8000", "clients=500")
    with pytest.raises(AssertionError, match="was chosen"):
        submit.run_once(settings(data_home, *far))


def test_the_server_of_a_simulation_checks_before_it_asks_anyone(
    tmp_path: Path, data_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = LocalGrid({}, nodes(1))
    grid.clients_here = True
    with pytest.raises(ValueError, match="cannot give each of clients=500"):
        run_app(settings(tmp_path, "clients=500"), grid)
    assert grid.sent == []
    assert not (tmp_path / "runs").exists()
    assert 'summary of the run: {"status": "failed", "error": "partition=dirichlet cannot give' in caplog.text


def test_a_failed_start_does_not_keep_its_name(federate: Federate, data_home: Path) -> None:
    path = data_home / "runs" / "fails_first"
    with pytest.raises(FederationError, match="lower train.lr"):
        federate(*TOY, "run_name=fails_first", "train.lr=1e30", "train.steps=50")
    (path / "log.txt").write_text("of the failed start\n")
    (path / "progress.json").write_text("{}")
    assert is_failed_start(path)
    summary, _ = federate(*TOY, "run_name=fails_first")
    assert summary["model_sha256"] == federate(*TOY)[0]["model_sha256"]
    assert (path / "log.txt").read_text() == "of the failed start\n"
    assert [line["round"] for line in map(json.loads, (path / "clients.jsonl").open())] == [0, 0]
    assert not list((data_home / "runs").glob(".*"))
    with pytest.raises(ConfigError, match=r"run_name=fails_first is taken: .*set resume=true to continue it"):
        federate(*TOY, "run_name=fails_first")


def test_a_failed_start_is_resumed_from_the_beginning_with_any_settings_unless_its_store_is_damaged(
    federate: Federate, data_home: Path
) -> None:
    break_off(federate, 1, "aggregate_train", *TOY, "run_name=restarted")
    store = data_home / "runs" / "restarted" / "server_chunks.db"
    sound = store.read_bytes()
    store.write_bytes(b"not a database, but long enough to be read as one" * 100)
    assert not is_failed_start(store.parent)
    store.write_bytes(sound)
    summary, path = federate(*TOY, "run_name=restarted", "resume=true", "train.lr=0.02")
    assert summary["model_sha256"] == federate(*TOY, "train.lr=0.02")[0]["model_sha256"]
    assert "lr: 0.02" in (path / "config.yaml").read_text()


def test_a_run_with_a_complete_round_is_never_replaced_whatever_of_it_is_lost(
    federate: Federate, data_home: Path
) -> None:
    break_off(federate, 2, "aggregate_train", *TOY, "run_name=kept")
    path = data_home / "runs" / "kept"
    metrics = (path / "metrics.jsonl").read_text()
    lines = metrics.splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["round"] == 0))
    assert not is_failed_start(path)  # only the store has its round
    (path / "metrics.jsonl").write_text(metrics)
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.suffix != ".db"}
    for lost in (None, "metrics.json", "server_chunks.db"):
        if lost:
            (path / lost).unlink()
            before.pop(lost, None)
        assert not is_failed_start(path)
        with pytest.raises(ConfigError, match="run_name=kept is taken"):
            federate(*TOY, "run_name=kept")
        assert {name: (path / name).read_bytes() for name in before} == before


def test_a_run_that_is_still_running_is_not_replaced(federate: Federate, data_home: Path) -> None:
    running = RunDirectory.create(settings(data_home, *TOY, "run_name=busy"))
    assert not is_failed_start(running.path)
    with pytest.raises(ConfigError, match="run_name=busy is taken"):
        federate(*TOY, "run_name=busy")
    with pytest.raises(ConfigError, match="run_name=busy is still running"):
        federate(*TOY, "run_name=busy", "resume=true", "checkpoint.keep_rounds=7")
    assert "keep_rounds: 7" not in (running.path / "config.yaml").read_text()
    running.fail(Broken("stopped"))
    with (running.path / "metrics.jsonl").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert not is_failed_start(running.path)
    assert is_failed_start(running.path)


def test_a_start_that_loses_its_name_while_it_is_made_leaves_no_folder(
    data_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(data_home, *TOY, "run_name=rival")
    rival = RunDirectory.create(config)
    monkeypatch.setattr("flapp.server.run_dir.check_new", lambda config: config.runs_dir / config.run_name)
    with pytest.raises(ConfigError, match="run_name=rival is taken"):
        RunDirectory.create(config)
    rival.close()
    assert not list((data_home / "runs").glob(".*"))


def test_an_error_begins_with_its_reasons_each_once_and_short(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise ConfigError("its disk is full: make room")

    monkeypatch.setattr("flapp.client.task.open_client_data", refuse)
    with pytest.raises(FederationError) as caught:
        federate("model=linear", "clients=40")
    said = "the run cannot start: clients 0 to 39: its disk is full: make room (0 of 40 clients joined)"
    assert str(caught.value) == said
    summary = {"error": str(caught.value), "refused": {"0": "its disk is full: make room"}, "refused_count": 40}
    assert str(submit.failure(summary)) == str(caught.value)
    assert list_names(["0", "2", "3", "4", "9", "10", "site"]) == "0, 2 to 4, 9, 10, site"
    assert list_names([str(i) for i in range(0, 40, 2)], most=3) == "0, 2, 4 and 17 more"
    assert list_names(["9" * 5000, "9" * 5001]) == f"{'9' * 5000}, {'9' * 5001}"  # int() takes 4,300 digits
    reasons = {str(i): "rare" if i == 0 else "common" for i in range(5)} | {"5": "odd"}
    assert by_reason(reasons) == "client 0: rare; clients 1 to 4: common; client 5: odd"
    assert by_reason(reasons, most=1) == "clients 1 to 4: common; and 2 more reasons"


def test_a_round_without_replies_says_why_first(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise MessageError("is odd")

    monkeypatch.setattr(Phase, "_accept", refuse)
    with pytest.raises(FederationError, match=r"^round 1: clients 0, 1: is odd \(0 of 2 clients gave a valid train"):
        federate(*TOY)


def test_mistakes_of_a_sweep_give_a_one_line_error_per_job_and_leave_no_run(
    data_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging, "root", logging.RootLogger(logging.WARNING))  # Hydra configures it
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    monkeypatch.setattr(inline, "run_inline", lambda *_: pytest.fail("a run was started"))
    words = [f"home={data_home}", "-m", "clients=500", "seed=0,1", "run_name=no"]
    monkeypatch.setattr(sys, "argv", ["tools/run.py", *words])
    assert run.main() == 1
    line = "error: partition=dirichlet cannot give each of clients=500"
    said = capsys.readouterr().err
    assert [text.startswith(line) for text in said.splitlines()] == [True, True], said
    assert not (data_home / "runs" / "no").exists()
    assert not list((data_home / "runs").glob(".*"))
