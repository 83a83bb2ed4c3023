"""Act as another user of this machine, and find the ports that processes listen on."""

import contextlib
import ctypes
import encodings.idna  # noqa: F401
import multiprocessing
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

# Imported here, because sockets, grpc and httpx import these on first use, and another user may be unable to read them.
import grpc._channel  # noqa: F401
import httpcore  # noqa: F401
import psutil
import pytest

from tests.support.waiting import WAIT_SECONDS
from tools.deployment.processes import HOST

STRANGER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acting as another user takes root")


def as_stranger(action: Callable[..., Any], *arguments: Any, network: str = "", user: int = STRANGER) -> Any:
    """Return what an action of another user of this machine returns, or the text of its error.

    network: the file of a network namespace in which the action runs, as on another machine; empty for this one's.
    """
    here, there = multiprocessing.Pipe()

    def act() -> None:
        if network:
            with open(network) as namespace:
                assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        try:
            there.send(action(*arguments))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test wants to see it
            there.send(f"{type(error).__name__}: {error}")

    process = multiprocessing.get_context("fork").Process(target=act)
    process.start()
    process.join(WAIT_SECONDS)
    assert here.poll()
    return here.recv()


def listening(processes: list[psutil.Process]) -> dict[tuple[str, int], str]:
    """Return the addresses that processes listen on, and the name of each process."""
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for each in process.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN:
                    found[tuple(each.laddr)] = process.name()
    return found


def get(port: int) -> tuple[int, str]:
    """Return the status and text of a server's answer."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def send_and_leave(port: int) -> None:
    """Send a whole request and disconnect without reading the answer."""
    with socket.create_connection((HOST, port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
