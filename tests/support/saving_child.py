"""Processes that save rounds until they are done or killed: python -m tests.support.saving_child

For each line of standard input, a JSON list of {path, rounds, keep, size}, it forks one process per entry, which
starts at once since torch is imported already. It prints `child PID` for each, then what they print (`saved N` when
save_model_chunks has returned, `error ...`), and `gone` when all have ended.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flapp.checkpoint import store
from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from tests.support.checkpoint_rounds import save_rounds


def say(line: str) -> None:
    """Print a line at once, never mixed with the lines of other processes."""
    os.write(1, f"{line}\n".encode())


def save(path: str, rounds: list[int], keep: int | None, size: int) -> None:
    try:
        with ChunkManager(path, keep_rounds=keep, chunk_bytes=6000) as manager:
            for number in rounds:
                save_rounds(manager, number, size=size)
                say(f"saved {number}")
    except CheckpointError as error:
        say(f"error {error}")


def serve() -> None:
    store.WRITEBACK_BYTES = 10_000
    for line in sys.stdin:
        children = []
        for order in json.loads(line):
            child = os.fork()
            if child == 0:
                save(**order)
                os._exit(0)
            children.append(child)
            say(f"child {child}")
        for child in children:
            os.waitpid(child, 0)
        say("gone")


class Nursery:
    """Start saving processes, and read what they print."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def start(self, *orders: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(orders) + "\n")
        self.process.stdin.flush()

    def hear(self) -> tuple[str, str]:
        """Return the next line's first word and the rest."""
        assert self.process.stdout is not None
        word, _, rest = self.process.stdout.readline().strip().partition(" ")
        assert word, "the saving processes have ended by themselves"
        return word, rest

    def hear_until_gone(self) -> list[tuple[str, str]]:
        return list(iter(self.hear, ("gone", "")))


@contextmanager
def nursery() -> Iterator[Nursery]:
    """Yield a Nursery, and stop it at the end."""
    command = [sys.executable, "-m", "tests.support.saving_child"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Nursery(process)
        assert process.stdin is not None
        process.stdin.close()


if __name__ == "__main__":
    serve()
