"""CPU and wall time per round, and peak memory, of a command and of all processes that it starts."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from tools.deployment.processes import KILL_SECONDS, last_line

ROOT = Path(__file__).resolve().parents[2]  # commands start here, so that they import this checkout
LOOK_SECONDS, SAMPLE_SECONDS, PSS_SECONDS = 0.02, 0.5, 2.0


class CommandError(RuntimeError):
    """A measured command failed, took too long, or had too few rounds; the message is one line."""


@dataclass(frozen=True)
class Usage:
    """The cost of a run: `start` seconds from the command to the end of its first round; cpu and wall seconds a round.

    pss is the peak proportional set size of all processes together, in bytes.
    """

    start: float
    cpu: float
    wall: float
    pss: int


class ProcessTree:
    """A process and its descendants; once seen, a process counts even after it ends or loses its parent."""

    def __init__(self, pid: int) -> None:
        self.seconds: dict[psutil.Process, float] = {psutil.Process(pid): 0.0}

    def cpu(self) -> float:
        """Return the CPU seconds of all processes so far; those that have ended count as last seen."""
        self._find()
        for process in self.seconds:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self.seconds[process] = times.user + times.system
        return sum(self.seconds.values())

    def pss(self) -> int:
        """Return the proportional set size of all running processes, in bytes: shared pages count once."""
        total = 0
        for process in self.seconds:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total

    def kill(self) -> None:
        self._find()
        for process in self.seconds:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _find(self) -> None:
        parents: dict[psutil.Process, int] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                parents[process] = process.ppid()
        known = {process.pid for process in self.seconds if process in parents}
        while found := {p for p, parent in parents.items() if parent in known and p not in self.seconds}:
            self.seconds |= dict.fromkeys(found, 0.0)
            known |= {process.pid for process in found}


def count_lines(path: Path, mark: bytes) -> int:
    """Return the number of whole lines with the mark; 0 while the file does not exist."""
    return sum(mark in line for line in path.read_bytes().split(b"\n")[:-1]) if path.exists() else 0


def watch(command: Sequence[str], path: Path, mark: bytes, rounds: int, limit: float) -> Usage:
    """Run a command that writes a line with `mark` to `path` at the end of each of its `rounds`, and measure it.

    The first round warms up and the last may end with an evaluation, so cpu and wall are the mean of those in between.
    The command runs to its end, for at most `limit` seconds. Raises CommandError.
    """
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # may be another checkout
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        tree = ProcessTree(process.pid)
        try:
            moments, pss = follow(process, tree, partial(count_lines, path, mark), (1, rounds - 1), limit)
        finally:
            end(process, tree)
        if process.returncode or len(moments) < 2:
            log.seek(0)
            said = last_line(log.read().decode(errors="replace"))
            raise CommandError(f"it was to finish {rounds} rounds, but ended with status {process.returncode}: {said}")
    (first, before), (last, after) = moments
    if first == last:
        raise CommandError(f"rounds 1 to {rounds - 1} ended between two looks: ask for more rounds")
    counted = rounds - 2
    return Usage(first - started, (after - before) / counted, (last - first) / counted, pss)


def follow(
    process: "subprocess.Popen[bytes]", tree: ProcessTree, done: Callable[[], int], at: Sequence[int], limit: float
) -> tuple[list[tuple[float, float]], int]:
    """Follow a process to its end; return the time and its CPU seconds when `at` rounds are done, and its peak PSS."""
    moments: list[tuple[float, float]] = []
    sampled, measured, pss = 0.0, 0.0, 0
    began = time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        reached = done()
        if now > began + limit:
            rounds = at[-1] + 1
            raise CommandError(
                f"the command had finished {reached} of {rounds} rounds after {limit:g} s: raise LIMIT_SECONDS"
            )
        while len(moments) < len(at) and reached >= at[len(moments)]:
            moments.append((now, tree.cpu()))
        if now > sampled + SAMPLE_SECONDS:  # so that processes that end meanwhile are known
            tree.cpu()
            sampled = now
        if now > measured + PSS_SECONDS:
            pss, measured = max(pss, tree.pss()), now
        time.sleep(LOOK_SECONDS)
    return moments, pss


def end(process: "subprocess.Popen[bytes]", tree: ProcessTree) -> None:
    """End a command and everything it started: interrupt it first, so that it cleans up, then kill the rest."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_SECONDS)
    tree.kill()
    process.wait()
