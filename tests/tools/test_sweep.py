"""Sweeps: jobs in sequence and in parallel, their table and sweep.json, and no process left behind."""

import contextlib
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from flapp.config.load import compose, to_yaml
from flapp.config.schema import ConfigError
from tests.conftest import Federate
from tests.federation.test_run import TOY
from tests.support.commands import finish, left_running, run, run_here, start_tool
from tests.support.waiting import wait_for
from tools.deployment.processes import SWEEP, TOKEN, listens, reserve_port
from tools.deployment.submit import APP
from tools.running import sweep

TWO_AT_A_TIME = ("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
EXTRA = "pip install -e '.[sweep]'"
needs_joblib = pytest.mark.skipif(not importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher"), reason=EXTRA)
needs_optuna = pytest.mark.skipif(not importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper"), reason=EXTRA)


def of_job(number: int, folder: Path = Path("/sweep"), **launcher: Any) -> Any:
    """Return what Hydra tells a job of a sweep about itself."""
    facts = {"mode": RunMode.MULTIRUN, "job": {"num": number}, "sweep": {"dir": str(folder)}, "launcher": launcher}
    sweeper = {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"}
    return OmegaConf.create(facts | {"overrides": {"task": [f"seed={number}"]}, "sweeper": sweeper})


@contextlib.contextmanager
def child(work: Callable[[], None]) -> Iterator[int]:
    """Run a function in a process of its own."""
    if (pid := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def finished_run(path: Path, objective: float, *overrides: str) -> None:
    """Make the folder of a run that is over, which a resumed sweep takes as it is."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(compose(list(overrides))))
    summary = {"status": "finished", "rounds": 5, "seconds": 1.0, "loss": objective, "model_sha256": "ab"}
    (path / "metrics.json").write_text(json.dumps(summary | {"objective": objective, "run_dir": str(path)}))


def table(done: subprocess.CompletedProcess[str]) -> list[str]:
    return done.stdout[done.stdout.index("job  overrides") :].splitlines()


def test_the_table_has_one_line_per_job_with_the_settings_that_differ() -> None:
    finished = {"job": 0, "overrides": ["model=cnn", "seed=0"], "status": "finished", "objective": 0.5}
    failed = {"job": 1, "overrides": ["model=cnn", "seed=10"], "status": "failed", "error": "why"}
    lines = sweep.sweep_table([finished | {"bytes_up": 12345, "run_dir": "/r/0"}, failed]).splitlines()
    assert lines == [
        "job  overrides  objective  total bytes up  run",
        "0    seed=0     0.5000     12,345          /r/0",
        "1    seed=10                               failed: why",
    ]


@pytest.mark.parametrize(("metric", "words", "best"), [("val_accuracy", "validation accuracy", 1), ("loss", "loss", 0)])
def test_the_table_says_what_the_objective_is_and_which_job_is_best(metric: str, words: str, best: int) -> None:
    job = {"status": "finished", "objective_metric": metric, "run_dir": "/r"}
    outcomes = [job | {"job": n, "overrides": [f"seed={n}"], "objective": n / 2, metric: n / 2} for n in range(2)]
    failed = {"job": 2, "overrides": ["seed=2"], "status": "failed", "error": "why"}
    lines = sweep.sweep_table([*outcomes, failed]).splitlines()
    assert lines[0].split("  ")[2:] == [f"objective ({words})", "run"]
    assert lines[-1] == f"best: job {best}, {words} {best / 2:.4f}"
    assert not sweep.sweep_table([outcomes[0], failed]).splitlines()[-1].startswith("best")


def test_outcomes_are_in_the_order_of_the_jobs_and_tell_of_bugs_and_kills() -> None:
    outcomes: list[sweep.Outcome] = []

    def work() -> None:
        with sweep.reported(of_job(4)):
            os.kill(os.getpid(), signal.SIGKILL)

    with sweep.gathered(outcomes):
        for number in (10, 2):
            with sweep.reported(of_job(number)) as outcome:
                outcome["status"] = "finished"
        with child(work) as pid:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(KeyError), sweep.reported(of_job(3)):
            raise KeyError("a bug")
    ends = [(outcome["job"], outcome["status"], outcome.get("error")) for outcome in outcomes]
    bug, killed = (3, "failed", "KeyError: 'a bug'"), (4, "failed", "its process was killed")
    assert ends == [(2, "finished", None), bug, killed, (10, "finished", None)]
    assert SWEEP not in os.environ


def test_a_sweep_in_the_folder_of_a_run_leaves_no_file_there(tmp_path: Path) -> None:
    finished_run(tmp_path / "runs" / "a", 0.5)
    before = sorted((tmp_path / "runs" / "a").iterdir())
    outcomes: list[sweep.Outcome] = []
    with sweep.gathered(outcomes), sweep.reported(of_job(0, tmp_path / "runs" / "a")):
        pass
    outcomes[0]["error"] = "its name is taken"
    assert "failed: its name is taken" in sweep.conclude(outcomes)
    assert sorted((tmp_path / "runs" / "a").iterdir()) == before


def test_what_a_killed_job_leaves_running_is_stopped_and_its_folder_removed() -> None:
    with sweep.gathered([]):
        folder = Path(f"{os.environ[SWEEP]}-superlink")
        folder.mkdir()
        left = subprocess.Popen(["sleep", "60"], env=os.environ | {TOKEN: str(folder)})
        other = subprocess.Popen(["sleep", "60"], env=os.environ | {TOKEN: "/tmp/flapp-another"})
    left.wait(timeout=5)
    assert other.poll() is None
    assert not folder.exists()
    other.kill()
    other.wait()


def test_jobs_in_other_processes_are_interrupted_and_may_clean_up(tmp_path: Path) -> None:
    outcomes: list[sweep.Outcome] = []

    def work() -> None:
        with sweep.reported(of_job(0)):
            try:
                (tmp_path / "runs").touch()
                time.sleep(60)
            finally:
                (tmp_path / "cleaned up").touch()

    with sweep.gathered(outcomes), child(work):
        wait_for((tmp_path / "runs").exists)
        sweep.interrupt_jobs()
        assert (tmp_path / "cleaned up").exists()
        with pytest.raises(KeyboardInterrupt), sweep.reported(of_job(1)):
            pytest.fail("a job began after the interrupt")
    assert [(outcome["job"], outcome["error"]) for outcome in outcomes] == [(0, "interrupted")]


def test_jobs_side_by_side_share_the_processors_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "available_cpus", lambda: 8)
    settings = compose(["home=/h"])

    def cpus(n_jobs: int | None, **values: Any) -> int | None:
        given = replace(settings, deployment=replace(settings.deployment, **values))
        job = of_job(0, Path("/h/runs/s"), **({} if n_jobs is None else {"n_jobs": n_jobs}))
        return sweep.as_job(given, job).deployment.total_cpus

    assert [cpus(n) for n in (None, 1, 2, 3, 8, 100, -1, -7)] == [None, None, 4, 2, 1, 1, 1, 4]
    assert cpus(2, total_cpus=6) == 6
    assert cpus(8, client_cpus=3) == 3


def test_a_sweep_resumes_only_jobs_that_have_begun_and_is_not_run_again_once_finished(tmp_path: Path) -> None:
    settings = compose([f"home={tmp_path}", "run_name=s"])
    folder = tmp_path / "runs" / "s"
    (folder / "0").mkdir(parents=True)
    jobs = [sweep.as_job(replace(settings, resume=True), of_job(number, folder)) for number in range(2)]
    assert [(job.run_name, job.resume) for job in jobs] == [("s/0", True), ("s/1", False)]
    finished = {"job": 0, "folder": str(folder), "overrides": ["seed=0"], "status": "finished", "run_dir": "/r"}
    (folder / "0" / "config.yaml").touch()
    sweep.conclude([finished | {"status": "failed", "error": "why"}])  # it has begun, so the sweep is written down
    assert (folder / "sweep.json").exists()
    sweep.conclude([finished])
    written = (folder / "sweep.json").read_text()
    assert json.loads(written)[0]["overrides"] == "seed=0"
    with pytest.raises(ConfigError, match="run_name=s is taken"):
        sweep.as_job(settings, of_job(0, folder))
    sweep.conclude([finished | {"folder": str(folder), "status": "failed", "error": "taken"}])
    assert (folder / "sweep.json").read_text() == written


def test_lines_of_parallel_jobs_are_whole_and_marked_and_see_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with sweep.gathered([]), sweep.reported(of_job(7, n_jobs=2)):
        assert not sys.stderr.isatty()
        sys.stderr.write("half a ")
        assert terminal.getvalue() == ""
        sys.stderr.write("line\nand")
    assert terminal.getvalue() == "[job 7] half a line\n"
    with sweep.gathered([]), sweep.reported(of_job(7)):
        assert sys.stderr is terminal


def test_a_reserved_port_is_nobody_elses_until_a_server_listens_there() -> None:
    with reserve_port() as reserved, socket.socket() as server:
        port = reserved.getsockname()[1]
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        assert not listens(os.getpid(), port)
        server.listen()
        assert listens(os.getpid(), port)
        with child(lambda: time.sleep(60)) as pid:
            server.close()
            assert listens(pid, port)  # it has inherited the socket
            assert not listens(os.getpid(), port)


def test_a_sweeper_that_searches_has_its_jobs_hold_out_validation_samples(tmp_path: Path) -> None:
    searched = of_job(0, tmp_path / "runs" / "s")
    searched.sweeper["_target_"] = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
    home = f"home={tmp_path}"
    assert sweep.as_job(compose([home]), searched).held_out == 0.2
    assert sweep.as_job(compose([home, "evaluate.validation_fraction=0.1"]), searched).held_out == 0.1
    assert sweep.as_job(compose([home]), of_job(0, tmp_path / "runs" / "s")).held_out == 0
    shards = sweep.as_job(compose([home, "experiment=femnist_fedavg"]), searched)
    assert shards.evaluate.validation_fraction is None
    with pytest.raises(ConfigError, match=r"validation_fraction=0 gives none: remove this setting"):
        sweep.as_job(compose([home, "evaluate.validation_fraction=0"]), searched)


@needs_optuna
@pytest.mark.parametrize(("limit", "failures"), [(0.01, range(1, 6)), (0.0, [6])], ids=["some fail", "all fail"])
def test_optuna_searches_on_after_failed_trials(tmp_path: Path, limit: float, failures: Any) -> None:
    script = f"""
        import sys
        from tools import run

        def stand_in(config, on_start):
            if config.train.lr > {limit}:
                raise run.RunError("too high")
            assert config.held_out == 0.2, config.held_out
            facts = {{"rounds": 1, "seconds": 1, "model_sha256": "ab", "run_dir": config.run_name}}
            return facts | {{"status": "finished", "objective": config.train.lr}}

        run.run_once = stand_in
        sys.exit(run.main())
    """
    words = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.direction=maximize"]
    words += ["hydra.sweeper.sampler.seed=0", "train.lr=interval(0.0005,0.02)", "run_name=search", f"home={tmp_path}"]
    command = [sys.executable, "-c", textwrap.dedent(script), *words]
    done = subprocess.run(command, cwd=APP, capture_output=True, text=True, timeout=120)
    folder = tmp_path / "runs" / "search"
    assert done.returncode == 1
    assert len(table(done)) == 7
    assert "Traceback" not in done.stderr
    if not limit:
        assert not folder.exists()  # no run has begun
        return
    outcomes = json.loads((folder / "sweep.json").read_text())
    assert sum(outcome["status"] == "failed" for outcome in outcomes) in failures
    if finished := [outcome["objective"] for outcome in outcomes if outcome["status"] == "finished"]:
        assert OmegaConf.load(folder / "optimization_results.yaml").best_value == max(finished)


@pytest.mark.slow
@needs_joblib
def test_of_four_jobs_two_at_a_time_one_fails_and_two_share_a_dataset_and_end_in_the_bytes_of_runs_alone(
    tmp_path: Path, federate: Federate
) -> None:
    settings = ("model=linear", "num_rounds=1", "clients=4", "deployment.workers=0")
    folder = tmp_path / "runs" / "four"
    finished_run(folder / "2", 0.2, *settings, "seed=99")
    finished_run(folder / "3", 0.3, *settings, "seed=3")
    done = run(tmp_path, *TWO_AT_A_TIME, *settings, "seed=range(4)", "run_name=four", "resume=true")
    assert done.returncode == 1
    assert "[job 2] error: run_name=four/2 was run" in done.stderr
    assert "failed: run_name=four/2 was run with other settings (partition.seed was 99, is 2;" in table(done)[3]
    assert len(table(done)) == 6
    outcomes = json.loads((folder / "sweep.json").read_text())
    assert [outcome["status"] for outcome in outcomes] == ["finished", "finished", "failed", "finished"]
    assert outcomes[3]["overrides"] == f"{' '.join(settings)} seed=3 run_name=four resume=True"
    assert (outcomes[3]["objective"], outcomes[3]["run_dir"]) == (0.3, str(folder / "3"))
    for job in range(2):
        expected, _ = federate(*settings, f"seed={job}")
        summary = json.loads((folder / str(job) / "metrics.json").read_text())
        assert summary["model_sha256"] == expected["model_sha256"]
        assert outcomes[job]["objective"] == summary["objective"] == expected["objective"]
        assert table(done)[job + 1].split()[:3] == [str(job), f"seed={job}", f"{expected['objective']:.4f}"]
    assert not list((tmp_path / "data").rglob("*.tmp"))
    assert left_running(tmp_path) == []


@pytest.mark.slow
@needs_joblib
def test_an_interrupted_sweep_leaves_no_process_behind_and_goes_on(tmp_path: Path) -> None:
    words = [TOY, "num_rounds=20", "evaluate.every=20", "seed=0,1", "run_name=stopped"]
    process = start_tool(tmp_path, "run", *TWO_AT_A_TIME, *words, "deployment.workers=1")
    for number in range(2):
        progress = tmp_path / "runs" / "stopped" / str(number) / "progress.json"
        wait_for(lambda progress=progress: progress.exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    status, _, said = finish(process)
    assert status == 130, said
    assert "interrupted: everything that was started has been stopped" in said.splitlines()
    assert left_running(tmp_path) == []
    assert run_here("-m", *words, f"home={tmp_path}", "resume=true", "deployment.workers=0") == 0
    outcomes = json.loads((tmp_path / "runs" / "stopped" / "sweep.json").read_text())
    assert [outcome["status"] for outcome in outcomes] == ["finished"] * 2
