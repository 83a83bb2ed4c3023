"""Flower's SuperNode with shorter waits between messages and a faster start of clients.

    python -m tools.supernode ARGUMENTS        the arguments of flower-supernode

Flower's SuperNode asks for a message every 3 s and for its client's reply every 0.5 s, its SuperExec looks for work
every second, and each message starts a new Python, which imports PyTorch. Here, all of these intervals start short and
then grow to Flower's own. Each client process is forked from a process that has imported what clients need and has done
nothing else. All messages and results stay byte-identical. If its SuperExec dies, this SuperNode ends too; Flower's own
would stay online without answering.

Flower has no settings for this, so this program replaces names in four of Flower's modules. It refuses versions of
Flower without these names; `tools.federation up --plain` runs Flower's own SuperNode. There are three processes: this
one, then `superexec`, which it starts, and `clients`, which `superexec` starts and whose forks are the clients'
processes.
"""

import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

FIRST_PAUSE, GROWTH = 0.05, 1.15  # seconds; each pause is about a seventh of the time waited so far
OWNER_ONLY = Path(__file__).with_name("deployment") / "owner_only.py"
COMMAND = "flwr.supernode.cli.flower_supernode"
NODE, EXEC = "flwr.supernode.start_client_internal", "flwr.supercore.superexec.run_superexec"
LAUNCH = "flwr.supercore.superexec.executor.subprocess_executor"
NEEDED = ("flwr.supernode.cli", "safetensors.numpy", "sqlite3", "torch", "pydantic", "apsw", "blake3")
SUPEREXEC, CLIENT, INSTALL = "flower-superexec", "flwr-clientapp", "--allow-runtime-dependency-installation"


class Pauses:
    """Sleeps that start short and grow to the requested length; a different requested length starts short again."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.pause = FIRST_PAUSE

    def sleep(self, seconds: float) -> None:
        """Sleep for at most `seconds`; if this differs from the last call, start with short pauses again."""
        if seconds != self.longest:
            self.longest = seconds
            self.reset()
        time.sleep(min(self.pause, seconds))
        self.pause = min(self.pause * GROWTH, seconds)

    def reset(self) -> None:
        """Start with short pauses again, because something has happened."""
        self.pause = FIRST_PAUSE


class Launcher:
    """Start the programs of a SuperExec: clients as forks of a process that ends with this one, others as usual."""

    def __init__(self, pauses: Pauses) -> None:
        self.pauses = pauses
        self.server: subprocess.Popen[str] | None = None

    def start(self, command: list[str], **options: Any) -> None:
        """Replace subprocess.Popen; programs that install packages of their own must not inherit ours."""
        self.pauses.reset()
        if command[0] != CLIENT or options or INSTALL in command:
            subprocess.Popen(command, **options)
            return
        if self.server is None or self.server.poll() is not None:
            self.server = subprocess.Popen(own_command("clients"), stdin=subprocess.PIPE, text=True)
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(command) + "\n")
        self.server.stdin.flush()


def own_command(role: str, *arguments: str) -> list[str]:
    """Return the command that starts this program in another role; -P keeps tools/ out of the import path."""
    return [sys.executable, "-P", os.path.abspath(__file__), role, *arguments]


def replace_names(name: str, **stand_ins: Any) -> None:
    """Replace `time` or `subprocess` in a module of Flower; exit if the module does not use them as expected."""
    from flwr.supercore.version import package_version

    module = importlib.import_module(name)
    for key, stand_in in stand_ins.items():
        if not isinstance(original := getattr(module, key, None), ModuleType) or original.__name__ != key:
            sys.exit(
                f"error: {Path(__file__).name} does not fit Flower {package_version}, whose {name} has no `{key}`: "
                "use tools.federation up --plain, which is slower, or the version of Flower that flapp was tested with "
                "(see flwr in pyproject.toml)"
            )
        setattr(module, key, stand_in)


def run_supernode() -> Any:
    """Run Flower's SuperNode with our SuperExec; its port answers only this user."""

    def popen(command: list[str]) -> Any:
        assert command[0] == SUPEREXEC, command
        process = subprocess.Popen(own_command("superexec", *command[1:]))
        threading.Thread(target=end_with, args=(process,), daemon=True).start()
        return process

    replace_names(NODE, time=Pauses(), subprocess=SimpleNamespace(Popen=popen))
    runpy.run_path(str(OWNER_ONLY))["protect"](COMMAND)  # by its path: -P keeps tools/ from being imported
    from flwr.supernode.cli import flower_supernode

    return flower_supernode()


def end_with(process: subprocess.Popen[bytes]) -> None:
    """End this process when `process` does: a SuperNode without its SuperExec is online but answers nothing."""
    process.wait()
    os.kill(os.getpid(), signal.SIGTERM)


def run_superexec() -> Any:
    """Run Flower's SuperExec with clients that are forks."""
    pauses = Pauses()
    replace_names(EXEC, time=pauses)
    replace_names(LAUNCH, subprocess=SimpleNamespace(Popen=Launcher(pauses).start, DEVNULL=subprocess.DEVNULL))
    from flwr.supercore.cli import flower_superexec

    return flower_superexec()


def run_clients() -> Any:
    """Fork a process for every command line read from stdin, until stdin is closed."""
    for name in NEEDED:
        importlib.import_module(name)
    gc.freeze()  # otherwise a fork's first garbage collection would copy all memory
    fork = multiprocessing.get_context("fork")
    for line in sys.stdin:
        fork.Process(target=run_client, args=(json.loads(line),)).start()
    for client in multiprocessing.active_children():  # they see for themselves that their SuperExec is gone
        client.join()
    os._exit(0)  # a normal exit takes a second to unload PyTorch


def run_client(arguments: list[str]) -> None:
    """Act as a client's process, in a fork.

    NumPy's global generator has the state that it had after import. Privacy noise has a generator of its own.
    """
    from flwr.supernode.cli import flwr_clientapp

    sys.argv = arguments
    flwr_clientapp()


if __name__ == "__main__":
    roles = {"superexec": run_superexec, "clients": run_clients}
    sys.exit(roles[sys.argv.pop(1)]() if sys.argv[1:2] and sys.argv[1] in roles else run_supernode())
