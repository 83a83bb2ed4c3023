"""Run our tools as a user does: as commands, from a folder outside the checkout."""

import getpass
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tools import run as tools_run
from tools.deployment.submit import APP
from tools.running.progress import FORMAT

SECONDS = 400  # generous, for a busy machine
PYTORCHS = {f"torchinductor_{getpass.getuser()}"}  # PyTorch's cache folder, which it makes in every temporary folder


class Terminal(io.StringIO):
    """What bars and questions take for a terminal."""

    def isatty(self) -> bool:
        return True


def start_tool(home: Path, module: str, *words: str, **settings: Any) -> "subprocess.Popen[str]":
    """Start a tool with this home; if the home has a folder `tmp`, temporary files go there."""
    env = os.environ | {"FLAPP_HOME": str(home), "PYTHONPATH": str(APP)}
    if (home / "tmp").is_dir():
        env["TMPDIR"] = str((home / "tmp").resolve())
    command = [sys.executable, "-m", f"tools.{module}", *words]
    usual: dict[str, Any] = {"cwd": home, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, **usual | settings)


@contextmanager
def starting_runs(home: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Yield a function that starts tools.run with its own temporary folder; kill the runs at the end.

    The folder is home/tmp, a link to one with a short path, because the path of a socket has at most 107 bytes.
    """
    temporary = Path(tempfile.mkdtemp(prefix="flapp-test-"))
    (home / "tmp").symlink_to(temporary)
    started = []

    def start(*words: str, **settings: Any) -> "subprocess.Popen[str]":
        started.append(start_tool(home, "run", *words, **settings))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.communicate()
        shutil.rmtree(temporary)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Wait for a tool and return its exit status and what it wrote to stdout and stderr."""
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def run(home: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run tools.run to its end."""
    process = start_tool(home, "run", *words)
    return subprocess.CompletedProcess(process.args, *finish(process))


def run_here(*words: str, argv0: str = "/checkout/tools/run.py") -> int:
    """Run tools.run in this process, without its effects on signals and logs, and return its exit status."""
    level = logging.root.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools_run.signal, "signal", lambda *_: None)
        patch.setenv(FORMAT, "text")
        patch.setattr(sys, "argv", [argv0, *words])
        try:
            return tools_run.main()
        finally:
            logging.root.setLevel(level)
            for name in logging.root.manager.loggerDict:
                logging.getLogger(name).disabled = False


def left_running(home: Path) -> list[psutil.Process]:
    """List the processes that were started with this home."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLAPP_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def in_shared_memory(processes: list[psutil.Process]) -> set[str]:
    """Return the names in /dev/shm that processes have mapped."""
    names = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            names |= {Path(each.path).name for each in process.memory_maps() if "/shm/" in each.path}
    return names
