"""Waiting for what other processes do."""

import time
from collections.abc import Callable
from typing import Any

WAIT_SECONDS = 240


def wait_for(condition: Callable[[], Any], seconds: float = WAIT_SECONDS) -> Any:
    """Wait until a condition holds, and return what it is."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found
