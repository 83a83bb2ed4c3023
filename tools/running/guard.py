"""A guard: a small process that cleans up after a program that was killed and could not do so itself.

    python -m tools.running.guard PID NAME VALUE [FOLDER ...]      started by `guarded`, never by hand

The program, process PID, holds the other end of the guard's standard input, which the system closes when the program
ends, however it ends. If the program has not sent GOODBYE by then, the guard stops all processes that carry the
variable NAME=VALUE in their environment, and removes each FOLDER and the folders next to it whose names begin with its
name. The guard has a session of its own, so that neither Ctrl-C nor a closed terminal ends it with the program.
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
    """Guard this process while the block runs; what carries the variable and does not belong to it must be gone then.

    The guard itself does not carry the variable.
    """
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
    """Wait until the program ends, and clean up unless it says that it has done so."""
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
