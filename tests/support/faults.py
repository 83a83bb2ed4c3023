"""Faults of a machine: a process that is killed in the middle of its work, and a disk that fills up."""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context

import torch


def die(*_: object) -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed(act: Callable[[], object]) -> None:
    """Run a function that calls `die` at some point, in a fork of this process."""

    def work() -> None:
        torch.set_num_threads(1)  # OpenMP's threads are not copied
        act()

    process = get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit each file of this process to `size` bytes: a write beyond that fails."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
