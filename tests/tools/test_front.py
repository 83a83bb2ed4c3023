"""The screen: what runs say when they start and end, help, names of runs, and the command `flapp`."""

import io
import json
import logging
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from flwr.common.logger import console_handler

from flapp import client_app, server_app
from flapp.architecture import build
from flapp.config.load import CONF, compose, name_override
from flapp.config.schema import Config
from flapp.custom import read_source
from flapp.data.sources import ensure_artifacts
from flapp.server.run_names import METRICS
from tests.support.commands import run_here
from tests.support.run_files import add_store, write_run
from tools import cli, run
from tools.cli import as_called
from tools.deployment import superlink
from tools.running.overview import job_line, overview, start_lines
from tools.running.progress import FORMAT

TOY = "experiment=toy_regression"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty home, which commands take unless they are given another."""
    monkeypatch.setenv("FLAPP_HOME", str(tmp_path))
    monkeypatch.setenv(FORMAT, "text")
    return tmp_path


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, home: Path) -> Any:
    """Return a function that runs tools.run with words and a stand-in for run_once."""

    def call(end: Exception | KeyboardInterrupt | dict[str, Any], *words: str, **called: str) -> int:
        def run_once(config: Config, on_start: Any) -> dict[str, Any]:
            on_start()
            if isinstance(end, dict):
                return end | {"status": "finished", "run_dir": str(config.runs_dir / config.run_name)}
            raise end

        monkeypatch.setattr(run, "run_once", run_once)
        return run_here(*words, **called)

    return call


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "digits_fedavg"),
        (["seed=3"], "digits_fedavg"),
        ([TOY], "toy_regression"),
        (["dataset=custom", "dataset.name=mine", "dataset.shape=[8,8,1]", "dataset.classes=3"], "mine"),
        (["dataset=cifar10", "model=cnn"], "cifar10_cnn"),
        (["model=cnn"], "digits_fedavg_cnn"),
        (["experiment=cifar10_fedavg", "model=cnn"], "cifar10_fedavg_cnn"),
        (["experiment=toy_regression", "dataset.name='x y'"], "toy_regression"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_is_named_after_what_the_command_chose(words: list[str], name: str) -> None:
    assert re.fullmatch(rf"{name}-\d{{8}}-\d{{6}}", compose(["home=/nowhere", *words]).run_name)


def test_a_sweep_is_not_named_after_what_it_varies_and_a_given_name_is_kept() -> None:
    labels = {"model=cnn,linear": "${experiment}", "experiment=a,b": "sweep", "experiment=a,b model=cnn": "cnn"}
    for words, label in (labels | {"dataset=digits,digits_turned": "sweep"}).items():
        assert name_override(words.split())[0].startswith(f"run_name='{label}-$")
    assert name_override(["model=cnn", "run_name=mine"]) == []


def test_the_start_counts_the_parameters_that_the_real_model_has_without_drawing_its_weights() -> None:
    for words in (["model=cnn"], [TOY], ["model=vit_tiny"]):
        config = compose(["home=/nowhere", *words])
        real = sum(tensor.numel() for tensor in build(config.model, config.dataset).parameters())
        before = torch.random.get_rng_state()
        assert overview(config)["parameters"] == real
        assert torch.equal(torch.random.get_rng_state(), before)


def test_the_start_says_the_bytes_that_each_rule_sends() -> None:
    def sizes(*words: str) -> tuple[int, int]:
        facts = overview(compose(["home=/nowhere", "experiment=digits_fedlora", *words]))
        return facts["bytes_down"], facts["bytes_up"]

    model = compose(["home=/nowhere"])
    assert overview(model)["bytes_up"] == overview(model)["bytes_down"] == 4 * overview(model)["parameters"]
    down, up = sizes("strategy.aggregation=fedit")
    assert down == up
    assert sizes("strategy.aggregation=flora")[0] > 4 * down
    assert sizes("strategy.aggregation=flora")[1] == up
    only_b = sizes("strategy.aggregation=ffa")[1]
    only_a = sizes("strategy.aggregation=fedsa", "evaluate.objective=personal_accuracy")[1]
    assert only_a < up
    assert only_a != only_b
    assert sizes("strategy.aggregation=rolora") == (down, (only_a + only_b) // 2)


def test_the_bytes_at_the_start_are_those_of_the_messages_but_for_their_headers(federate: Any) -> None:
    _, path = federate(TOY, "num_rounds=1")
    line = next(json.loads(text) for text in (path / METRICS).read_text().splitlines() if '"train"' in text[:20])
    facts = overview(compose(["home=/nowhere", TOY]))
    tensors = 2
    assert line["client_bytes_up"]["0"] == facts["bytes_up"] + 128 * tensors
    assert line["client_bytes_down"]["0"] == facts["bytes_down"] + 128 * tensors


def test_three_lines_say_what_a_run_is_about_to_do_and_one_line_what_a_job_is(tmp_path: Path) -> None:
    ensure_artifacts(tmp_path / "data", "regression")
    config = compose([f"home={tmp_path}", TOY, "run_name=mine", "strategy.fraction_train=0.6"])
    assert start_lines("mine", overview(config)) == [
        f"run mine in {tmp_path}/runs/mine",
        "linear (11 parameters) on regression (300 training and 90 test samples), 3 clients, 2 a round (iid)",
        "fedavg, 5 rounds, evaluated after every round; in a training round a client receives 44 B and sends 44 B",
    ]
    assert overview(config, is_here=False)["samples"] is None
    facts = overview(compose(["home=/nowhere", "experiment=digits_fedlora"]))
    assert job_line(["seed=1", "train.lr=0.1"], facts) == (
        "starting: seed=1 train.lr=0.1; vit_tiny (124,938 parameters, 19,082 trained) on digits_turned, 10 clients; "
        "fedlora (fedit), 20 rounds"
    )


def test_the_start_is_told_on_stderr_or_as_the_first_of_the_json_lines(
    main: Any, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    figures = {"rounds": 5, "seconds": 1.0, "model_sha256": "ab"}
    assert main(figures, TOY, "run_name=j") == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[0] == f"run j in {home}/runs/j"
    assert said.err.splitlines()[3:] == ["starting the server and the clients"]
    failed = run.RunError("all is lost", {"status": "failed"})
    for end, event, status in ((figures, "finished", 0), (failed, "failed", 1)):
        assert main(end, "--format", "json", TOY, "run_name=j") == status
        said = capsys.readouterr()
        assert said.err.startswith("error: all is lost\n" * status)
        started, ended = map(json.loads, said.out.splitlines())
        wanted = {"event": "started", "run_name": "j", "rounds": 5, "parameters": 11, "bytes_up": 44, "clients": 3}
        assert wanted.items() <= started.items()
        assert (ended["event"], ended["run_name"], ended["summary"]["status"]) == (event, "j", event)


def test_a_missing_launcher_is_reported_with_the_command_that_installs_it(
    main: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main({}, "-m", "hydra/launcher=ray", "seed=0,1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: hydra/launcher=ray is not installed: pip install -e '.[sweep]'")


def test_a_run_that_did_not_finish_says_the_command_that_continues_it(
    main: Any, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    def last_lines(end: Exception | KeyboardInterrupt, *words: str, status: int = 1, **options: str) -> list[str]:
        assert main(end, *words, **options) == status
        return capsys.readouterr().err.splitlines()[-2:]

    failed, stopped = ["error: all is lost"], ["interrupted: everything that was started has been stopped"]
    lost = run.RunError("all is lost")
    said = "no round was complete; run_name=early can be used again once that is fixed"
    assert last_lines(lost, TOY, "run_name=early") == [*failed, said]
    said = f"no round was complete; to start again: python -m tools.run {TOY} run_name=early"
    assert last_lines(KeyboardInterrupt(), TOY, "run_name=early", status=130) == [*stopped, said]
    add_store(write_run(home / "runs" / "mine", status=None) / "server_chunks.db", rounds=3)
    words = [TOY, "train.lr=0.01", "lora.targets=[qkv,proj]", "run_name=mine", "resume=false"]
    said = f"flapp run {TOY} train.lr=0.01 'lora.targets=[qkv,proj]' run_name=mine resume=true"
    kept = f"rounds 1 to 3 are kept; once that is fixed, resume with: {said}"
    assert last_lines(lost, *words, argv0="/venv/bin/flapp run") == [*failed, kept]


def test_a_sweep_that_did_not_finish_says_the_command_that_continues_it_unless_nothing_was_reached(
    main: Any, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    main(run.RunError("all is lost"), "-m", TOY, "run_name=toys", "seed=0,1")
    assert not re.search("resume|start again", capsys.readouterr().err)
    write_run(home / "runs" / "toys" / "0", status=None)  # the job that is interrupted has begun
    assert main(KeyboardInterrupt(), "-m", TOY, "run_name=toys", "seed=0,1") == 130
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"[job 0] starting: {TOY} run_name=toys seed=0; linear (11 parameters)")
    assert said[-1] == f"resume the sweep with: python -m tools.run -m {TOY} seed=0,1 run_name=toys resume=true"
    assert "resumable" not in json.loads((home / "runs" / "toys" / "sweep.json").read_text())[0]


def test_hints_name_commands_as_the_user_called_this_one(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    called = "/venv/bin/flapp run"
    main({}, "seed=0,1", argv0=called)
    main(run.RunError("no base: make it first with python -m tools.run run_name=base"), TOY, argv0=called)
    said = capsys.readouterr().err
    assert "add -m for a sweep, a run with each of them (flapp run -m seed=0,1)\n" in said
    assert "make it first with flapp run run_name=base\n" in said
    assert "python -m tools" not in said


def test_flapp_names_every_module_by_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/venv/bin/flapp"])
    for name, (module, _) in cli.COMMANDS.items():
        assert as_called(f"use python -m tools.{module} x") == f"use flapp {name} x"
    assert as_called("python -m tools.supernode") == "python -m tools.supernode"


@pytest.mark.parametrize("error", ["lost sight of the run: go on with it by run_name=mine resume=true", ""])
def test_an_error_that_says_how_to_continue_is_not_followed_by_another_hint(
    main: Any, capsys: pytest.CaptureFixture[str], error: str
) -> None:
    end = run.RunError(error) if error else {"rounds": 5, "seconds": 1.0, "model_sha256": "ab"}
    main(end, TOY, "run_name=mine")
    assert not re.search("resume with|start again", capsys.readouterr().err)


def test_help_explains_runs_with_examples_groups_and_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/venv/bin/flapp run", "seed=1", "-h"])
    assert run.main() == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"^  flapp run ", text, re.MULTILINE)) == 5
    for folder in (path for path in CONF.iterdir() if path.is_dir()):
        choices = text.partition(f"  {folder.name}=")[2]
        assert all(path.stem in choices for path in folder.glob("*.yaml"))
    for words in ("--cfg job", "--multirun", "FLAPP_HOME", "Exit status: 0", "130 if interrupted", str(CONF)):
        assert words in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_saved_log_has_no_codes_of_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coloured = r"\033[92mINFO 2026-11-21 10:00:00,123\033[0m:      [ROUND 1/2]\n\033[1A\033[2Kplain \u2514\n"
    stand_in = tmp_path / "flwr"
    stand_in.write_text(f"#!{sys.executable}\nimport sys\nsys.stdout.buffer.write('{coloured}'.encode())\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(superlink, "program", lambda name: str(tmp_path / name))
    (tmp_path / "log.txt").write_text("before\n")
    link = superlink.SuperLink("127.0.0.1:1")
    try:
        link.save_log("1", tmp_path / "log.txt")
    finally:
        link.stop()
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert text == "before\nINFO 2026-11-21 10:00:00,123:      [ROUND 1/2]\nplain \u2514\n"


@pytest.mark.parametrize("module", [server_app, client_app], ids=lambda module: str(module.__name__))
def test_the_apps_log_with_timestamps(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(console_handler, "timestamps", False)
    monkeypatch.setattr(console_handler, "stream", stream)
    runpy.run_path(str(module.__file__))  # as a new process imports it
    console_handler.emit(logging.makeLogRecord({"levelname": "INFO", "msg": "hello"}))
    assert re.search(r"INFO \d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}.*hello", stream.getvalue())


def test_the_log_says_how_many_clients_train_in_percent(federate: Any, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    try:
        federate(TOY, "num_rounds=1", "strategy.fraction_evaluate=0.5")
    finally:
        logger.removeHandler(caplog.handler)
    assert "100 % of the clients train, 50 % evaluate" in caplog.text


@pytest.fixture
def flapp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that calls flapp and returns its exit status, output and errors."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/venv/bin/flapp", *words])
        monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # a closed pipe must not end pytest
        try:
            status = cli.main()
        except SystemExit as end:  # argparse's
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return call


def test_flapp_lists_its_commands_which_explain_themselves_and_refuses_others(flapp: Any, tmp_path: Path) -> None:
    status, text, _ = flapp("--help")
    assert (status, flapp()[:2]) == (0, (2, text))
    for name in cli.COMMANDS:
        assert len(re.findall(rf"^  {name} +\w", text, re.MULTILINE)) == 1
        status, explained, _ = flapp(name, "--help")
        assert status == 0
        assert len(explained) > 100, name
    assert re.fullmatch(r"flapp \d+\.\d+\.\d+\n", flapp("--version")[1])
    status, _, error = flapp("sweep")
    assert status == 2
    assert error.startswith("error: sweep is not a command of flapp: choose one of new, run, runs, report")
    status, _, error = flapp("checkpoints", "list", str(tmp_path))
    assert status == 1
    assert "holds no *_chunks.db" in error


def test_the_console_script_is_declared_and_its_help_imports_neither_pytorch_nor_hydra() -> None:
    project = tomllib.loads((superlink.APP / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"flapp": "tools.cli:main"}
    code = (
        "import sys; from tools import cli; sys.argv = ['flapp', '--help']; cli.main(); "
        "print([name for name in ('torch', 'hydra', 'flwr', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=superlink.APP, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_installed_wheel_makes_the_app_of_its_own_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with superlink.app_folder() as folder:
        assert folder == superlink.APP
    package = tmp_path / "site-packages" / "flapp"
    for name, content in read_source().items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_bytes(content)
    (package / "__pycache__").mkdir()
    for name in superlink.SHIPPED:
        (package / name).write_bytes((superlink.APP / name).read_bytes())
    (package / "conf").mkdir()
    (package / "conf" / "config.yaml").write_text("seed: 0\n")
    monkeypatch.setattr(superlink, "PACKAGE", package)
    monkeypatch.setattr(superlink, "CONF", package / "conf")
    with superlink.app_folder() as folder:
        assert {path.name for path in folder.iterdir()} == {"flapp", "conf", *superlink.SHIPPED}
        made = {str(path.relative_to(folder / "flapp")): path.read_bytes() for path in folder.rglob("flapp/**/*.py")}
        assert made == read_source()
        assert (folder / "conf" / "config.yaml").exists()
        assert not list((folder / "flapp").rglob("__pycache__"))
    assert not folder.exists()
