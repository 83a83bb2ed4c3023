"""A guard: a small process that cleans up after a program that was killed.

    python -m tools.running.guard PID NAME VALUE [FOLDER ...]      started by `guarded`, never by hand

The guard reads from a pipe that the program, process PID, holds open. The system closes the pipe when the program ends,
however it ends. If the program has not sent GOODBYE by then, the guard stops all processes with NAME=VALUE in their
environment. It also removes each FOLDER, and folders next to it whose names begin with its name. The guard has its own
session, so that neither Ctrl-C nor a closed terminal ends it together with the program.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

APP = Path(__file__).resolve().parents[2]
GOODBYE = b"goodbye"


@contextlib.contextmanager
def guarded(name: str, value: str, *folders: Path) -> Iterator[None]:
    """Guard this process while the block runs. The guard itself does not have the variable."""
    command = [sys.executable, "-m", "tools.running.guard", str(os.getpid()), name, value, *map(str, folders)]
    env = {key: text for key, text in os.environ.items() if key != name}
    guard = subprocess.Popen(
        command, cwd=APP, env=env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        guard.communicate(GOODBYE)


def main(pid: str, name: str, value: str, *folders: str) -> None:
    """Wait until the program ends, and clean up unless it has sent GOODBYE."""
    if sys.stdin.buffer.read(len(GOODBYE)) == GOODBYE:
        return
    from tools.deployment.processes import Processes  # here, because most guards never need it

    processes = Processes(value, name)
    stopped = len(processes.running())
    processes.stop()
    for folder in map(Path, folders):
        for left in folder.parent.glob(f"{folder.name}*"):
            shutil.rmtree(left, ignore_errors=True)
    with contextlib.suppress(OSError):  # if the terminal is gone
        print(f"pid {pid} was killed; its guard stopped the {stopped} processes it left running", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
