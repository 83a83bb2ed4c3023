"""A private SuperLink: started for one run from a neutral folder, with its own home and port, and stopped for good.

The SuperLink that `flwr run` starts by itself is a daemon that keeps the folder, environment and code of its first
launch; ours belongs to one run. Everything it starts (SuperExec, the simulation, Ray) carries a token in its
environment, by which it is found and stopped to the last process, whoever its parent has become.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

HOST = "127.0.0.1"
TOKEN = "FLAPP_SUPERLINK"
START_SECONDS, STOP_SECONDS, KILL_SECONDS = 60, 5, 30
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SuperLinkError(RuntimeError):
    """A SuperLink, or a command to it, that did not do its work, said in one line."""


class PrivateSuperLink:
    """Run a simulation SuperLink as a context manager; port None takes a free one."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port if port is not None else _free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="flapp-"))  # short, because Ray puts sockets below it
        self.token = secrets.token_hex(16)
        self.process: subprocess.Popen[bytes] | None = None
        self.known: dict[int, psutil.Process] = {}
        self.env = _environment(self.folder) | {TOKEN: self.token}

    def __enter__(self) -> "PrivateSuperLink":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run `flwr ARGUMENTS --format json` against this SuperLink and return its answer."""
        command = [_program("flwr"), *arguments, "--format", "json"]
        done = subprocess.run(command, env=self.env, cwd=self.folder, capture_output=True, text=True, check=False)
        try:
            answer = json.loads(done.stdout)
        except json.JSONDecodeError:
            raise SuperLinkError(f"flwr {arguments[0]} failed: {_last_line(done.stderr or done.stdout)}") from None
        if not answer.get("success"):
            raise SuperLinkError(f"flwr {arguments[0]} failed: {_last_line(answer.get('error-message', ''))}")
        return answer

    def status(self, run_id: str) -> tuple[str, str]:
        """Return Flower's status of a run, such as finished:completed, and its details."""
        run = self.flwr("list", "--run-id", run_id)["runs"][0]
        return str(run["status"]), str(run["status-details"])

    def save_log(self, run_id: str, path: Path) -> None:
        """Add what the apps of a run printed to `path`."""
        command = [_program("flwr"), "log", run_id, "--show"]
        with path.open("ab") as file:
            subprocess.run(command, env=self.env, cwd=self.folder, stdout=file, stderr=subprocess.STDOUT, check=False)

    def check_alive(self) -> None:
        """Raise SuperLinkError if the SuperLink has ended by itself."""
        if self.process is None or self.process.poll() is not None:
            raise SuperLinkError(f"the SuperLink ended by itself: {_last_line(self._log())}")

    def stop(self) -> None:
        """Stop every process this SuperLink has started, first kindly, and remove its folder; signals wait."""
        before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS} if _in_main_thread() else {}
        try:
            self._stop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        for end_process, seconds in ((psutil.Process.terminate, STOP_SECONDS), (psutil.Process.kill, KILL_SECONDS)):
            end = time.monotonic() + seconds
            while (left := self._processes()) and time.monotonic() < end:
                for process in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        end_process(process)
                psutil.wait_procs(left, timeout=1)
        if self.process is not None:
            self.process.wait(KILL_SECONDS)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        if not _is_free(self.port):
            raise SuperLinkError(
                f"deployment.port={self.port} is in use on {HOST}: choose another, or set it to null for a free one"
            )
        home = self.folder / "flwr"
        home.mkdir()
        config = (
            f'[superlink]\ndefault = "private"\n[superlink.private]\naddress = "{HOST}:{self.port}"\ninsecure = true\n'
        )
        (home / "config.toml").write_text(config)
        command = [_program("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
        command += ["--host", HOST, "--port", str(self.port), "--disable-runtime-dependency-installation"]
        with (self.folder / "superlink.log").open("wb") as log:
            self.process = subprocess.Popen(
                command, env=self.env, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + START_SECONDS
        while not _answers(self.port):
            self.check_alive()
            if time.monotonic() > end:
                raise SuperLinkError(f"the SuperLink did not answer in {START_SECONDS} s: {_last_line(self._log())}")
            time.sleep(0.1)
        self.check_alive()  # or it was another server that answered

    def _log(self) -> str:
        path = self.folder / "superlink.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _processes(self) -> list[psutil.Process]:
        """Find what still runs: by token, and below it, since Ray's workers overwrite their environment."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(TOKEN) == self.token:
                    found |= {each.pid: each for each in (process, *process.children(recursive=True))}
        self.known |= found
        return [process for process in self.known.values() if _is_running(process)]


def available_cpus() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _environment(folder: Path) -> dict[str, str]:
    """Return an environment that keeps Flower and Ray to this folder and off the network."""
    programs = str(Path(sys.executable).parent)
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return kept | {
        "PATH": programs + os.pathsep + kept.get("PATH", ""),
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
    }


def _program(name: str) -> str:
    """Return the path of a program of this Python's environment, activated or not."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise SuperLinkError(f"{path} is missing: install flapp into this environment (pip install -e .)")
    return str(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
