"""Wait for other processes, and end loops."""

import time
from collections.abc import Callable
from typing import Any

from tools.deployment.superlink import SuperLink

WAIT_SECONDS = 240


class Stopped(Exception):
    """What ends a loop that has no end."""


def wait_for(condition: Callable[[], Any], seconds: float = WAIT_SECONDS) -> Any:
    """Wait until `condition` returns something true, and return that."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def wait_for_end(superlink: SuperLink, run_id: str) -> str:
    """Follow the log of a run to its end, which takes one command of Flower's, and return its status."""
    for _ in superlink.read_log(run_id):
        pass
    return str(wait_for(lambda: (status := superlink.status(run_id)[0]).startswith("finished") and status))
