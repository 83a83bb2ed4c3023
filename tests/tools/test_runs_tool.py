"""flapp runs: what it lists, shows and removes, and what it refuses to remove."""

import fcntl
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flapp.config.load import compose, to_yaml
from tests.support.commands import Terminal
from tests.support.run_files import add_store, write_run
from tests.tools.conftest import Refusal
from tools import runs
from tools.running.run_entries import size_of

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home with a finished, a failed and an interrupted run, and a sweep of eleven jobs."""
    home = tmp_path / "home"
    monkeypatch.setenv("FLAPP_HOME", str(home))
    monkeypatch.setattr(sys, "argv", ["/venv/bin/flapp runs"])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for name, status in (("done", "finished"), ("bad", "failed"), ("cut", None)):
        write_run(home / "runs" / name, status=status)
        store(home, name)
    for job in range(11):
        write_run(home / "runs" / "sweep" / str(job), rounds=1)
        store(home, f"sweep/{job}")
    for name in ("sweep.json", "multirun.yaml"):
        (home / "runs" / "sweep" / name).write_text("[]")
    return home


@pytest.fixture
def flapp_runs(capsys: pytest.CaptureFixture[str]) -> Command:
    """Return what runs the tool and gives its exit status, output and errors."""

    def call(*words: str) -> tuple[int, str, str]:
        status = runs.main(words)
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def store(home: Path, name: str) -> Path:
    """Write a client's store of 5,000 bytes."""
    path = home / "checkpoints" / name / "client_0" / "client_0_chunks.db"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(5000))
    return path


def write_real_run(home: Path, name: str, *words: str, rounds: int = 2) -> Path:
    """Write an interrupted run with every setting in its config.yaml."""
    path = write_run(home / "runs" / name, status=None)
    (path / "config.yaml").write_text(to_yaml(compose([f"home={home}", f"run_name={name}", *words])))
    if rounds:
        add_store(path / "server_chunks.db", rounds)
    return path


def files_in(home: Path) -> list[Path]:
    return sorted(home.rglob("*"))


def test_the_list_says_how_every_run_stands_and_what_it_takes_and_jobs_stand_below_their_sweep(
    home: Path, flapp_runs: Command
) -> None:
    with (home / "runs" / "cut" / "metrics.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, running, _ = flapp_runs("list")
    assert status == 0
    assert re.search(r"^cut +running ", running, re.MULTILINE)
    head, *rows, end = flapp_runs("list")[1].splitlines()
    lines = {line.split()[0]: line.split() for line in rows}
    assert " ".join(head.split()) == "run status rounds accuracy loss started folder client stores"
    assert lines["done"][1:5] == ["finished", "4/4", "0.9000", "0.2000"]
    assert lines["bad"][1:5] == ["failed", "4/4", "-", "-"]
    assert lines["cut"][1:5] == ["interrupted", "4/4", "-", "-"]
    assert lines["done"][-2:] == ["5.0", "kB"]
    assert end.startswith("14 runs, ")
    jobs = rows[rows.index("sweep/") + 1 :]
    assert [line.split()[0] for line in jobs] == [str(job) for job in range(11)]
    assert all(line.startswith("  ") for line in jobs)
    assert flapp_runs("list", "--home", str(home / "none")) == (0, "no runs\n", "")


def test_json_gives_sizes_in_bytes_with_split_models(home: Path, flapp_runs: Command) -> None:
    write_real_run(home, "split_one", "split=auto", "split.split_config=1-2", rounds=0)
    for name, size in (("split_one_1-2_top", 70), ("split_one_1-2_bottom", 30), ("split_one_b_1-2_top", 1000)):
        path = home / "split_models" / name.rpartition("_")[2] / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    entries = {run["name"]: run for run in json.loads(flapp_runs("list", "--json")[1])["runs"]}
    assert entries["split_one"]["split_bytes"] == 100
    assert entries["done"]["split_bytes"] == 0
    assert entries["done"]["store_bytes"] == 5000
    assert entries["done"]["run_bytes"] == sum(path.stat().st_size for path in (home / "runs" / "done").iterdir())


def test_show_says_which_settings_differ_and_how_to_resume(home: Path, flapp_runs: Command) -> None:
    path = write_real_run(home, "mine", "experiment=toy_regression", "num_rounds=9", "train.clip_norm=2.5")
    lines = [f"INFO 2026-11-21 10:00:00,00{i}:      line {i}\nINFO 2026-11-21 10:00:00,123:      \n" for i in range(9)]
    (path / "log.txt").write_text("".join(lines) + "INFO 2026-11-21 10:00:00,009: " + "word " * 50 + "\n")
    status, out, _ = flapp_runs("show", "mine")
    words = "experiment=toy_regression num_rounds=9 train.clip_norm=2.5"
    assert status == 0
    assert out.startswith("mine: interrupted, 4 of 9 rounds\n")
    assert f"  settings           {words}\n" in out
    assert out.endswith(
        "last lines of log.txt:\n"
        + "".join(f"  INFO 2026-11-21 10:00:00,00{i}: line {i}\n" for i in range(5, 9))
        + "  INFO 2026-11-21 10:00:00,009: "
        + "word " * 23
        + "...\n"
        + f"resume with: flapp run {words} run_name=mine resume=true\n"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["model=cnn", "strategy.server_optimizer=fedadam", "evaluate.central=true"],
        ["dataset=custom", r"dataset.name='it\'s a\b'", "dataset.shape=[8,8,1]", "dataset.classes=3", "seed=4"],
        ["experiment=cifar10_fedlora", "model.pretrained=/my files/w.pth", "lora.targets=[qkv,proj]"],
        ["experiment=digits_hetlora", "lora.rank_by_client=[2,8]", "deployment=local", "deployment.client_keys=null"],
    ],
    ids=lambda words: words[0],
)
def test_the_shown_settings_make_the_same_run_again(home: Path, flapp_runs: Command, words: list[str]) -> None:
    write_real_run(home, "mine", *words)
    changed = json.loads(flapp_runs("show", "mine", "--json")[1])["changed"]
    assert compose([f"home={home}", "run_name=mine", *changed]) == compose([f"home={home}", "run_name=mine", *words])


def test_a_run_is_resumed_in_its_own_home_if_it_has_a_complete_round(
    home: Path, flapp_runs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_real_run(home, "early", "experiment=toy_regression", rounds=0)
    assert json.loads(flapp_runs("show", "early", "--json")[1])["resume"] is None
    write_real_run(home, "mine", "experiment=toy_regression")
    monkeypatch.setenv("FLAPP_HOME", str(home.parent / "other"))
    out = flapp_runs("show", "mine", "--home", str(home))[1]
    assert f"resume with: flapp run experiment=toy_regression home={home} run_name=mine resume=true" in out


def test_show_writes_the_figures_with_their_units(home: Path, flapp_runs: Command) -> None:
    path = write_real_run(home, "mine", "experiment=toy_regression")
    figures = {"accuracy": 0.91234567, "loss": 0.2, "bytes_up": 2700, "seconds": 74.4, "model_sha256": "ab"}
    (path / "metrics.json").write_text(json.dumps({"status": "finished", "rounds": 4, **figures}))
    said = [" ".join(line.split()) for line in flapp_runs("show", "mine")[1].splitlines()]
    size = "2.7 kB in all, evaluation and headers included"
    assert {"accuracy 0.9123", "loss 0.2000", f"sent by clients {size}", "time 74 s", "model sha256 ab"} <= set(said)


@pytest.mark.parametrize("command", ["show", "stop"])
def test_a_sweep_is_refused_with_the_name_of_one_of_its_runs(home: Path, refusal: Refusal, command: str) -> None:
    assert refusal(runs.main, command, "sweep") == "error: sweep is a sweep: name one of its runs, such as sweep/0"


def test_remove_takes_the_run_and_its_stores_and_nothing_else(home: Path, flapp_runs: Command) -> None:
    kept = [path for path in files_in(home) if "done" not in path.parts]
    freed = size_of(home / "runs" / "done") + 5000
    status, out, _ = flapp_runs("remove", "done", "--yes", "--json")
    assert (status, json.loads(out)) == (0, {"removed": ["done"], "freed_bytes": freed, "kept_split_bytes": 0})
    assert files_in(home) == kept


def test_remove_of_a_sweep_takes_its_jobs_and_its_files_but_not_what_else_its_folder_holds(
    home: Path, flapp_runs: Command
) -> None:
    sweep, notes = home / "runs" / "sweep", home / "runs" / "sweep" / "notes.txt"
    assert flapp_runs("remove", "sweep/3", "--yes")[0] == 0
    assert (sweep / "sweep.json").exists()
    notes.write_text("mine")
    status, out, _ = flapp_runs("remove", "sweep/", "--yes")
    assert status == 0
    assert out.startswith("removed sweep/0, sweep/1, sweep/2, sweep/4")
    assert {path.name for path in sweep.iterdir()} == {"notes.txt", "sweep.json", "multirun.yaml"}
    assert not (home / "checkpoints" / "sweep").exists()
    notes.unlink()
    write_run(sweep / "0", rounds=1)
    assert flapp_runs("remove", "sweep", "--yes")[0] == 0
    assert not sweep.exists()
    assert (home / "runs" / "done").exists()


@pytest.mark.parametrize("answer", ["y\n", "\n", "no\n"])
def test_remove_asks_on_a_terminal(
    home: Path, flapp_runs: Command, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    status, _, error = flapp_runs("remove", "done", "cut")
    assert error.startswith("Remove 2 runs (done, cut) and their client stores, ")
    assert status == (answer != "y\n")
    assert (home / "runs" / "done").exists() == (answer != "y\n")


def test_remove_wants_yes_without_a_terminal_and_no_run_that_is_running(home: Path, refusal: Refusal) -> None:
    before = files_in(home)
    assert refusal(runs.main, "remove", "done").endswith("no terminal to ask on: add --yes to remove done")
    with (home / "runs" / "sweep" / "7" / "metrics.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        error = refusal(runs.main, "remove", "done", "sweep", "--yes")
    assert error == "error: sweep/7 is running: stop it first with `flapp runs stop sweep/7`"
    assert files_in(home) == before


@pytest.mark.parametrize("name", ["", ".", "..", "../data", "done/../../data", "/etc", "/", "~/x", "./../runs/done"])
def test_a_name_that_leads_out_of_the_runs_is_refused(home: Path, refusal: Refusal, name: str) -> None:
    write_run(home / "data")  # looks like a run, and lies elsewhere
    before = files_in(home)
    for command in (["remove", "--yes"], ["stop"], ["show"]):
        refusal(runs.main, *command, name.replace("/etc", str(home / "data")))
    assert files_in(home) == before


@pytest.mark.parametrize("place", ["runs", "checkpoints"])
def test_a_symbolic_link_is_not_followed(home: Path, refusal: Refusal, place: str) -> None:
    moved = home.parent / "moved"
    shutil.move(home / place / "done", moved)
    (home / place / "done").symlink_to(moved)
    error = refusal(runs.main, "remove", "done", "--yes")
    assert error == f"error: {home}/{place}/done is a symbolic link: remove the link and its target by hand"
    assert any(moved.iterdir())
    assert (home / "checkpoints" / "done").exists()
    assert (home / "runs" / "done").exists()


@pytest.mark.parametrize("command", ["show", "stop", "remove"])
def test_what_is_not_a_run_is_refused(home: Path, refusal: Refusal, command: str) -> None:
    (home / "runs" / "photos").mkdir()
    (home / "runs" / "photos" / "one.jpg").write_text("x")
    error = refusal(runs.main, command, "photos", *["--yes"] * (command == "remove"))
    assert error == f"error: photos is not a run in {home}/runs: see the names with `flapp runs list`"
    assert (home / "runs" / "photos" / "one.jpg").exists()


def test_an_odd_run_directory_does_not_keep_the_list_from_the_others(home: Path, flapp_runs: Command) -> None:
    (home / "runs" / "cut" / "metrics.jsonl").write_text('{"kind": "round", "round": 1')
    (home / "runs" / "bad" / "config.yaml").write_text("[: no yaml")
    (home / "runs" / "done" / "metrics.json").write_text("torn {")
    lines = {line.split()[0]: line.split() for line in flapp_runs("list")[1].splitlines()}
    assert lines["cut"][2] == "0/4"
    assert lines["bad"][2] == "4/0"
    assert lines["done"][1] == "interrupted"
    assert flapp_runs("show", "bad")[2].startswith(f"error: {home}/runs/bad: config.yaml cannot be read")
