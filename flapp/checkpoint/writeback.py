"""Starting the disk on a file's dirty pages while more are still to come, so that the last fsync finds little to do."""

import ctypes
import functools
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SYNC_FILE_RANGE_WRITE = 2  # of <fcntl.h>


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None) if os.name == "posix" else None
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def writeback_of(path: Path) -> Callable[[], object]:
    """Return a function that starts writing the dirty pages of the open file `path`; it does nothing but on Linux.

    It borrows the descriptor that SQLite has open. One of its own could never be closed: that would drop every lock
    this process holds on the file (https://sqlite.org/howtocorrupt.html, "POSIX advisory locks").
    """
    function, descriptor = _sync_file_range(), _open_descriptor(path)
    if function is None or descriptor is None:
        return lambda: None
    return lambda: function(descriptor, 0, 0, SYNC_FILE_RANGE_WRITE)


def _open_descriptor(path: Path) -> int | None:
    with suppress(OSError):
        wanted = path.stat()
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # listdir's own is closed by now
                if os.path.samestat(os.fstat(int(name)), wanted):
                    return int(name)
    return None
