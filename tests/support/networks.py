"""Network namespaces, which stand for machines that see each other and nothing else."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

import psutil
import pytest


def ip(*words: str, check: bool = True) -> str:
    """Run the ip command and return its output."""
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True).stdout


@contextlib.contextmanager
def two_machines(first: str, second: str, is_routed: bool = False) -> Iterator[tuple[str, str]]:
    """Make two network namespaces with these addresses, yield their names, and end what runs in them.

    is_routed: each has a default route to the other. Skips the test where namespaces are not permitted.
    """
    if shutil.which("ip") is None:
        pytest.skip("ip is not installed")
    names = (f"flapp{os.getpid()}a", f"flapp{os.getpid()}b")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted: {error.stderr.strip()}")
        for name, own, other in ((names[0], first, second), (names[1], second, first)):
            ip("-n", name, "address", "add", f"{own}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
            if is_routed:
                ip("-n", name, "route", "add", "default", "via", other)
        yield names
    finally:
        left = [psutil.Process(int(pid)) for name in names for pid in ip("netns", "pids", name, check=False).split()]
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    end(process)
            _, left = psutil.wait_procs(left, timeout=10)
        for name in names:
            ip("netns", "delete", name, check=False)
