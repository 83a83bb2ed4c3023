"""Processes that are killed in the middle of their work."""

import os
import signal
from collections.abc import Callable
from multiprocessing import get_context

import torch


def die(*_: object) -> None:
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
