"""Find and stop processes. Provide what Flower's programs need to start: environments, ports, paths.

Everything that a SuperLink, a SuperNode or Ray starts inherits a token in its environment. By this token a process is
found even when its parent is gone.
"""

import contextlib
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import psutil

HOST = "127.0.0.1"
TOKEN = "FLAPP_SUPERLINK"
SWEEP, OWNER = "FLAPP_SWEEP", "owner"  # the folder of one command, and a file in it; see running/sweep.py
# The last two make Flower open more ports, which answer everybody.
NOT_PASSED_ON = ("PYTHONPATH", "RAY_ADDRESS", "FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API")
STOP_SECONDS, KILL_SECONDS = 5, 30
CLOCK_SECONDS = 5  # a process's start time may shift by this much when the system's clock is adjusted
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SuperLinkError(RuntimeError):
    """A SuperLink, a SuperNode or a command to one failed; the message is one line."""


class Processes:
    """All other processes whose environment variable starts with this token."""

    def __init__(self, token: str, variable: str = TOKEN) -> None:
        self.token = token
        self.variable = variable
        self.known: dict[int, psutil.Process] = {}

    def running(self) -> list[psutil.Process]:
        """List those that still run, with their children, because Ray's workers overwrite their environment."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(self.variable, "").startswith(self.token):
                    found |= {each.pid: each for each in (process, *process.children(recursive=True))}
        self.known |= found
        return [process for process in self.known.values() if is_running(process)]

    def stop(self) -> None:
        """Stop them all: terminate first, then kill. Signals to this process are ignored meanwhile."""
        may_set = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS if may_set}
        try:
            for end_process, seconds in ((psutil.Process.terminate, STOP_SECONDS), (psutil.Process.kill, KILL_SECONDS)):
                end = time.monotonic() + seconds
                while (left := self.running()) and time.monotonic() < end:
                    for process in left:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            end_process(process)
                    psutil.wait_procs(left, timeout=1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def note_process(path: Path) -> None:
    """Write the pid and start time of this process to a file."""
    path.write_text(json.dumps([os.getpid(), psutil.Process().create_time()]))


def noted_process(path: Path) -> psutil.Process | None:
    """Return the process in a file of note_process, or None if it has ended, even if its pid is in use again."""
    try:
        pid, began = json.loads(path.read_text())
        process = psutil.Process(pid)
        same = abs(process.create_time() - began) < CLOCK_SECONDS
    except (OSError, ValueError, psutil.Error):
        return None
    return process if same and is_running(process) else None


def environment(folder: Path, token: str) -> dict[str, str]:
    """Return an environment in which Flower and Ray write only to this folder and send nothing to their makers."""
    kept = {key: value for key, value in os.environ.items() if key not in NOT_PASSED_ON}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}:{kept.get('PATH', '')}",
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        TOKEN: token,
    }


def program(name: str) -> str:
    """Return the path of a program in this Python's environment, whether it is activated or not."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise SuperLinkError(f"{path} is missing: install flapp into this environment (pip install -e .)")
    return str(path)


def available_cpus() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def free_port() -> int:
    """Return a port that nothing listens on, outside the range from which the system takes outgoing ports."""
    while not is_free(port := random.randrange(20000, 32000)):
        pass
    return port


def reserve_port() -> socket.socket:
    """Reserve a free port: while this socket is open the system gives it to nobody, but a server may listen on it."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((HOST, 0))
    return reserved


def is_free(port: int) -> bool:
    """Return whether a server could listen on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def answers(address: str) -> bool:
    """Return whether something listens at an address, host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1):
            return True
    except OSError:
        return False


def listens(pid: int, port: int) -> bool:
    """Return whether the process with this pid listens on a port of this machine."""
    with contextlib.suppress(psutil.Error):
        sockets = psutil.Process(pid).net_connections("tcp4")
        return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in sockets)
    return False


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def is_running(process: psutil.Process) -> bool:
    """Return whether a process runs; one that has ended and that nobody has waited for does not."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
