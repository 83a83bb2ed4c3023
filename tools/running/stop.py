"""Stop a run, whether the command that started it still waits for it or was killed."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from flapp.config.load import from_dict, read_yaml
from flapp.server.run_names import METRICS, find_holder
from tools.deployment.processes import OWNER, SWEEP, TOKEN, Processes, SuperLinkError, noted_process
from tools.deployment.submit import choose_superlink

LEAVE_SECONDS, LOOK_SECONDS = 60, 0.2


class StopError(RuntimeError):
    """A run cannot be stopped; the message is one line."""


def stop_run(runs_dir: Path, run_name: str) -> list[int] | None:
    """Stop a run; return the pids of the processes that were stopped here, or None if it was not running.

    Raises StopError, or the errors of choose_superlink and SuperLink.
    """
    path = find_run(runs_dir, run_name)
    if (holder := find_holder(path)) is None:
        return None
    values = read_yaml(path / "config.yaml")
    if values["deployment"]["kind"] == "inline":
        stopped = stop_inline(path, holder)
    elif values["deployment"]["kind"] == "simulation":
        stopped = stop_private(path, holder)
    else:
        stopped = stop_submitted(values, holder)
    end = time.monotonic() + LEAVE_SECONDS
    while find_holder(path) is not None:
        if time.monotonic() > end:
            pid = holder.get("pid")
            raise StopError(f"{run_name} still runs after {LEAVE_SECONDS} s (pid {pid}): end that process with kill -9")
        time.sleep(LOOK_SECONDS)
    return stopped


def find_run(runs_dir: Path, run_name: str) -> Path:
    """Return the folder of a run; raises StopError for a name outside runs_dir, or not of a run."""
    path = (runs_dir / run_name).resolve()
    if not path.is_relative_to(runs_dir.resolve()) or not (path / "config.yaml").is_file():
        raise StopError(f"{runs_dir} has no run {run_name}: give the run_name that it was started with")
    return path


def stop_inline(path: Path, holder: dict[str, Any]) -> list[int]:
    """Interrupt the command that runs it, which ends its workers too; for a job of a sweep, this is the whole sweep."""
    env = environment_of_writer(path, holder)
    owner = noted_process(Path(env.get(SWEEP, os.devnull)) / OWNER) or psutil.Process(holder["pid"])
    pids = [owner.pid, *(child.pid for child in owner.children(recursive=True))]
    interrupt(owner)
    return pids


def interrupt(process: psutil.Process) -> None:
    """Interrupt a command, and wait until it has cleaned up."""
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)  # in case it was suspended
    psutil.wait_procs([process], timeout=LEAVE_SECONDS)


def stop_private(path: Path, holder: dict[str, Any]) -> list[int]:
    """Interrupt the command that started a run, if it still runs, and stop everything its private SuperLink started.

    Both are found in the environment of the process that has the run's metrics.jsonl open.
    """
    env = environment_of_writer(path, holder)
    token = Path(env.get(TOKEN, ""))
    if not token.is_absolute():  # a folder is the token of a private SuperLink
        raise StopError(f"the run was not started by flapp: stop it with `flwr stop {holder['run_id']}`")
    processes = Processes(str(token))
    pids = [process.pid for process in processes.running()]
    if owner := noted_process(Path(env.get(SWEEP, os.devnull)) / OWNER):
        pids.insert(0, owner.pid)
        interrupt(owner)
    processes.stop()
    shutil.rmtree(token, ignore_errors=True)
    return pids


def environment_of_writer(path: Path, holder: dict[str, Any]) -> dict[str, str]:
    """Return the environment of the process that writes a run; raises StopError if running.json names another."""
    try:
        process = psutil.Process(holder["pid"])
        if any(Path(each.path) == path / METRICS for each in process.open_files()):
            return process.environ()
        fault = f"process {process.pid}, named in running.json, does not have it open"
    except (KeyError, psutil.Error) as error:
        fault = f"its process cannot be looked at ({error})"
    raise StopError(f"{path / METRICS} is in use, but {fault}: find its user with `fuser {path / METRICS}`")


def stop_submitted(values: dict[str, Any], holder: dict[str, Any]) -> list[int]:
    """Ask the SuperLink of a run to stop it; raises StopError."""
    run_id = holder.get("run_id")
    if run_id is None:
        raise StopError("the run is still starting: try again in a moment")
    _, superlink = choose_superlink(from_dict(values))
    with superlink:
        try:
            superlink.flwr("stop", str(run_id))
        except SuperLinkError as error:
            raise StopError(f"{error} (asked the SuperLink at {superlink.address} for run {run_id})") from error
    return [holder["pid"]]
