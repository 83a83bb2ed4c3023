"""Sweeps: collect the outcomes of all jobs of one command, and write them as a table and as sweep.json.

A launcher may run jobs in its own processes, several at a time, and kill them. FLAPP_SWEEP names a folder that all of
them know. A job writes <number>.json there when it begins, and replaces it when it ends. If a job starts a SuperLink,
the name of the SuperLink's folder begins with the name of that folder, so that the SuperLink can be stopped even if the
job was killed.

sweep.json in the sweep's folder is a list with one object per job, in their order: job (number), overrides, status
(finished or failed), and either objective, objective_metric (the name of that figure), accuracy, personal_accuracy,
bytes_up, bytes_down, aggregation_error (null if there is none) and run_dir, or error.
"""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import psutil
from hydra.conf import HydraConf
from hydra.types import RunMode

from flapp.config.schema import VALIDATION_FRACTION, Config, ConfigError
from flapp.files import write_json
from flapp.server.run_names import taken
from flapp.server.summary import in_words
from tools.cli import table
from tools.deployment.processes import OWNER, SWEEP, Processes, available_cpus, note_process
from tools.deployment.submit import is_here
from tools.running.guard import guarded
from tools.running.progress import is_json

COLUMNS = {  # of the table
    "objective": ("objective", "{:.4f}"),
    "accuracy": ("accuracy", "{:.4f}"),
    "personal_accuracy": ("personal accuracy", "{:.4f}"),
    "bytes_up": ("total bytes up", "{:,}"),
    "bytes_down": ("total bytes down", "{:,}"),
    "aggregation_error": ("aggregation error", "{:.1e}"),
}
SUMMARY = "sweep.json"
INTERRUPTED, INTERRUPT_SECONDS = "interrupted", 60
Outcome = dict[str, Any]


@contextlib.contextmanager
def gathered(outcomes: list[Outcome]) -> Iterator[None]:
    """Collect the outcomes of jobs, in this process or in others that it starts, and fill `outcomes` in their order.

    Stops what killed jobs have left running. If this process itself is killed, its guard does so.
    """
    folder = Path(tempfile.mkdtemp(prefix="flapp-"))
    with guarded(SWEEP, str(folder), folder):
        note_process(folder / OWNER)
        os.environ[SWEEP] = str(folder)
        try:
            yield
        finally:
            Processes(str(folder)).stop()
            reports = sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
            outcomes += [json.loads(path.read_text()) for path in reports]
            for left in folder.parent.glob(f"{folder.name}*"):
                shutil.rmtree(left, ignore_errors=True)
            del os.environ[SWEEP]


@contextlib.contextmanager
def reported(hydra_config: HydraConf) -> Iterator[Outcome]:
    """Yield a job's outcome to fill in (failed unless the job changes it), and write it for `gathered`."""
    number = job_number(hydra_config)
    path = Path(os.environ[SWEEP]) / f"{number}.json"
    outcome: Outcome = {"job": number, "overrides": list(hydra_config.overrides.task), "status": "failed"}
    outcome["folder"] = hydra_config.sweep.dir if is_sweep(hydra_config) else None
    outcome["resumable"] = None  # run name and folder, once the job has started
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # in a launcher's process: see interrupt_jobs
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        for each in (signal.SIGINT, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
    if (path.parent / INTERRUPTED).exists():
        raise KeyboardInterrupt
    write_json(path, outcome | {"error": "its process was killed", "pid": os.getpid()})  # replaced when the job ends
    try:
        with _own_lines(hydra_config):
            yield outcome
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        outcome["error"] = INTERRUPTED if interrupted else f"{type(error).__name__}: {error}"
        raise
    finally:
        write_json(path, outcome)


def interrupt_jobs() -> None:
    """Interrupt the jobs in other processes, which a launcher would kill, and wait until they have cleaned up."""
    if SWEEP not in os.environ:
        return
    folder = Path(os.environ[SWEEP])
    (folder / INTERRUPTED).touch()  # launchers still hand out jobs, which stop when they see this file
    for process in _job_processes(folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    end = time.monotonic() + INTERRUPT_SECONDS
    while _job_processes(folder) and time.monotonic() < end:
        time.sleep(0.1)


def _job_processes(folder: Path) -> list[psutil.Process]:
    """List the children of this process in which jobs run: the report of a job that has ended names no process."""
    pids = [json.loads(path.read_text()).get("pid") for path in folder.glob("*.json")]
    return [child for child in psutil.Process().children() if child.pid in pids]


def is_sweep(hydra_config: HydraConf) -> bool:
    """Return whether a job is one of several."""
    return bool(hydra_config.mode == RunMode.MULTIRUN)


def job_number(hydra_config: HydraConf) -> int:
    """Return a job's number in its sweep, 0 of a single run."""
    return int(hydra_config.job.num) if is_sweep(hydra_config) else 0


def as_job(config: Config, hydra_config: HydraConf) -> Config:
    """Give a job its own run directory below the sweep's, and its share of the processors if several run at once.

    A resumed sweep starts the jobs that have not begun. A sweeper such as Optuna chooses
    settings by the objective, so its jobs hold out validation samples. Raises ConfigError when the sweep is over and
    not resumed.
    """
    if not is_here(config):
        raise ConfigError(
            f"a sweep reads its runs' folders, which the server at {config.deployment.address} keeps: start the sweep "
            "on its machine"
        )
    path = Path(hydra_config.sweep.dir) / str(job_number(hydra_config))
    if (path.parent / SUMMARY).exists() and not config.resume:
        raise ConfigError(taken(config))
    deployment = config.deployment
    if (jobs := jobs_at_once(hydra_config)) > 1 and deployment.total_cpus is None:
        deployment = replace(deployment, total_cpus=max(available_cpus() // jobs, deployment.client_cpus))
    run_name = os.path.relpath(path, config.runs_dir)
    config = replace(config, run_name=run_name, deployment=deployment)
    if not str(hydra_config.sweeper["_target_"]).endswith(".BasicSweeper"):  # it chooses settings by the objective
        config = validated(config)
    return config if path.exists() else replace(config, resume=False, resume_from=None, resume_anyway=False)


def validated(config: Config) -> Config:
    """Return the config with validation samples for the objective; raises ConfigError when it forbids them."""
    if config.validates:
        return config
    if (fraction := config.evaluate.validation_fraction) is not None:
        raise ConfigError(
            "this sweeper chooses by the objective, which needs validation samples, and "
            f"evaluate.validation_fraction={fraction:g} gives none: remove this setting (its default here is "
            f"{VALIDATION_FRACTION:g}) or set another fraction"
        )
    return replace(config, evaluate=replace(config.evaluate, validation_fraction=VALIDATION_FRACTION))


def jobs_at_once(hydra_config: HydraConf) -> int:
    """Return how many jobs the launcher may run at once: n_jobs of joblib's launcher (-1: all processors), or 1."""
    jobs = int(hydra_config.launcher.get("n_jobs") or 1) if is_sweep(hydra_config) else 1
    return jobs if jobs > 0 else max(1, available_cpus() + 1 + jobs)


@contextlib.contextmanager
def _own_lines(hydra_config: HydraConf) -> Iterator[None]:
    """Mark the lines of a job with its number while others run beside it; progress bars see no terminal then."""
    if jobs_at_once(hydra_config) == 1:
        yield
        return
    mark = f"[job {job_number(hydra_config)}] "
    out, err = _MarkedLines(sys.stdout, "" if is_json() else mark), _MarkedLines(sys.stderr, mark)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


def mark_of(hydra_config: HydraConf) -> str:
    """Return the mark for a line of a job whose lines are not marked already; empty for a single run."""
    is_marked = not is_sweep(hydra_config) or jobs_at_once(hydra_config) > 1
    return "" if is_marked else f"[job {job_number(hydra_config)}] "


class _MarkedLines(io.TextIOBase):
    """Write whole lines to a stream, each after a mark, so that lines of several processes are never mixed."""

    def __init__(self, stream: TextIO, mark: str) -> None:
        self.stream, self.mark, self.begun = stream, mark, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        self.stream.write("".join(f"{self.mark}{line}\n" for line in lines))
        self.stream.flush()
        return len(text)


def objective_of(outcome: Outcome) -> float | None:
    """Return the objective of a job for the sweeper; None if it failed, which Optuna counts as a failed trial."""
    objective = outcome.get("objective")
    return None if objective is None or math.isnan(objective) else float(objective)


def conclude(outcomes: list[Outcome]) -> str:
    """Write sweep.json into the folder of the sweep and return its table; a single run has neither.

    If no job finished, the sweep.json of an earlier sweep stays. If no run has begun, the folder is removed.
    """
    folders = {Path(folder) for outcome in outcomes if (folder := outcome.pop("folder"))}
    for outcome in outcomes:
        for key in ("resumable", "pid"):
            outcome.pop(key, None)
    is_finished = any(outcome["status"] == "finished" for outcome in outcomes)
    rows = [outcome | {"overrides": " ".join(outcome["overrides"])} for outcome in outcomes]
    for folder in folders:  # one, unless the jobs differ in experiment or home
        if (folder / "config.yaml").exists():
            continue  # this folder belongs to a single run, so every job was refused
        if is_finished or (list(folder.glob("*/config.yaml")) and not (folder / SUMMARY).exists()):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / SUMMARY, rows)
        elif folder.is_dir() and {path.name for path in folder.iterdir()} <= {"multirun.yaml"}:  # Hydra's own file
            shutil.rmtree(folder)
    return sweep_table(outcomes) if folders else ""


def sweep_table(outcomes: list[Outcome]) -> str:
    """Return the table of a sweep: one line per job with its settings, its figures, and its folder or error.

    If two or more jobs have an objective, all of the same metric, a last line names the best job.
    """
    common = set.intersection(*(set(outcome["overrides"]) for outcome in outcomes)) if len(outcomes) > 1 else set()
    metrics = {metric for outcome in outcomes if (metric := outcome.get("objective_metric"))}
    metric = metrics.pop() if len(metrics) == 1 else None
    shown = [key for key in COLUMNS if key != metric and any(outcome.get(key) is not None for outcome in outcomes)]
    heads = ["job", "overrides", *(COLUMNS[key][0] for key in shown), "run"]
    if metric and shown[:1] == ["objective"]:
        heads[2] = f"objective ({in_words(metric)})"
    rows = []
    for outcome in outcomes:
        figures = ["" if outcome.get(key) is None else COLUMNS[key][1].format(outcome[key]) for key in shown]
        end = outcome["run_dir"] if outcome["status"] == "finished" else f"failed: {outcome['error']}"
        own = " ".join(word for word in outcome["overrides"] if word not in common)
        rows.append([str(outcome["job"]), own, *figures, end])
    lines = table(heads, rows)
    compared = [outcome for outcome in outcomes if objective_of(outcome) is not None]
    if metric and len(compared) > 1:
        best = (min if metric.endswith("loss") else max)(compared, key=lambda outcome: float(outcome["objective"]))
        lines.append(f"best: job {best['job']}, {in_words(metric)} {best['objective']:.4f}")
    return "\n".join(lines) + "\n"
