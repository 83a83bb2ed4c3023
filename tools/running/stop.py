"""Stop a run, whether the command that started it still waits for it or was killed."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil

from flapp.config.load import from_dict, read_yaml
from flapp.server.run_names import METRICS, find_holder
from tools.deployment.processes import OWNER, SWEEP, TOKEN, Processes, SuperLinkError, noted_process
from tools.deployment.submit import LEAVE_SECONDS, choose_superlink, wait_until_left
from tools.running.run_entries import RunsError


def stop_run(path: Path) -> list[int] | None:
    """Stop the run in a folder; return the pids of the processes that were stopped here, or None if it did not run.

    Raises RunsError, or the errors of choose_superlink and SuperLink.
    """
    path = path.resolve()
    if (holder := find_holder(path)) is None:
        return None
    values = read_yaml(path / "config.yaml")
    kind = values["deployment"]["kind"]
    stopped = stop_submitted(values, holder) if kind == "superlink" else stop_command(path, kind, holder)
    if not wait_until_left(path):
        pid = holder.get("pid")
        raise RunsError(f"{path.name} still runs after {LEAVE_SECONDS} s (pid {pid}): end that process with kill -9")
    return stopped


def stop_command(path: Path, kind: str, holder: dict[str, Any]) -> list[int]:
    """Interrupt the command that started a run, which for a job of a sweep is the whole sweep, and wait for its end.

    Then stop everything that the private SuperLink of a simulation started. Both are found in the environment of the
    process that has the run's metrics.jsonl open.
    """
    env = environment_of_writer(path, holder)
    owner = noted_process(Path(env.get(SWEEP, os.devnull)) / OWNER)
    if kind == "inline":
        owner = owner or psutil.Process(holder["pid"])
        processes, started = None, owner.children(recursive=True)
    else:
        token = env.get(TOKEN, "")
        if not Path(token).is_absolute():  # a private SuperLink's token is the path of its folder
            raise RunsError(f"the run was not started by flapp: stop it with `flwr stop {holder['run_id']}`")
        processes = Processes(token)
        started = processes.running()
    pids = [process.pid for process in (owner, *started) if process is not None]
    if owner is not None:
        owner.send_signal(signal.SIGTERM)
        owner.send_signal(signal.SIGCONT)  # in case it was suspended
        psutil.wait_procs([owner], timeout=LEAVE_SECONDS)
    if processes is not None:
        processes.stop()
        shutil.rmtree(processes.token, ignore_errors=True)
    return pids


def environment_of_writer(path: Path, holder: dict[str, Any]) -> dict[str, str]:
    """Return the environment of the process that writes a run; raises RunsError if running.json names another."""
    try:
        process = psutil.Process(holder["pid"])
        if any(Path(each.path) == path / METRICS for each in process.open_files()):
            return process.environ()
        fault = f"process {process.pid}, named in running.json, does not have it open"
    except (KeyError, psutil.Error) as error:
        fault = f"its process cannot be looked at ({error})"
    raise RunsError(f"{path / METRICS} is in use, but {fault}: find its user with `fuser {path / METRICS}`")


def stop_submitted(values: dict[str, Any], holder: dict[str, Any]) -> list[int]:
    """Ask the SuperLink of a run to stop it; raises RunsError."""
    run_id = holder.get("run_id")
    if run_id is None:
        raise RunsError("the run is still starting: try again in a moment")
    _, superlink = choose_superlink(from_dict(values))
    with superlink:
        try:
            superlink.flwr("stop", str(run_id))
        except SuperLinkError as error:
            raise RunsError(f"{error} (asked the SuperLink at {superlink.address} for run {run_id})") from error
    return [holder["pid"]]
