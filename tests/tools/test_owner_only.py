"""tools.deployment.owner_only: a server that answers only the user who started it."""

import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import uvicorn

from tests.support.strangers import as_stranger, get, needs_root, send_and_leave
from tests.support.waiting import wait_for
from tools.deployment import owner_only
from tools.deployment.owner_only import OwnerOnly, find_user, protect
from tools.deployment.processes import HOST


@pytest.fixture
def server() -> Iterator[tuple[int, list[str]]]:
    """Return the port of a server that answers this user only, and the list of the requests it has served."""
    served: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        served.append(scope["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"welcome"})

    with socket.create_server((HOST, 0)) as listener:
        running = uvicorn.Server(uvicorn.Config(app, http=OwnerOnly, lifespan="off", log_level="critical"))
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        wait_for(lambda: running.started)
        yield listener.getsockname()[1], served
        running.should_exit = True
        thread.join()


def ask(connection: socket.socket) -> bytes:
    """Send a request and return the start of the answer, up to its status."""
    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    return connection.recv(12)


def test_a_server_answers_its_owner(server: tuple[int, list[str]]) -> None:
    port, served = server
    assert get(port) == (200, "welcome")
    with socket.socket(socket.AF_INET6) as mapped:  # such a connection stands in /proc/net/tcp6
        mapped.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        mapped.connect((f"::ffff:{HOST}", port))
        assert ask(mapped) == b"HTTP/1.1 200"
    assert served == ["http", "http"]


@needs_root
def test_a_server_refuses_another_user_and_says_why(server: tuple[int, list[str]]) -> None:
    port, served = server
    status, text = as_stranger(get, port)
    assert status == 403
    assert text == "only the user who started this server (uid 0) may use it: start one of your own\n"
    assert served == []


@needs_root
def test_a_stranger_who_is_gone_before_the_look_up_is_not_taken_for_root() -> None:
    with socket.create_server((HOST, 0)) as listener:  # nothing looks before the stranger has left
        port = listener.getsockname()[1]
        assert as_stranger(send_and_leave, port) is None
        with listener.accept()[0] as connection:
            assert connection.recv(100).startswith(b"GET")
            assert find_user(connection) is None


def test_a_server_that_cannot_look_up_a_user_refuses(
    server: tuple[int, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, served = server

    def fail(_: int) -> int:
        raise OSError("too many open files")

    monkeypatch.setattr(os, "dup", fail)
    with socket.create_connection((HOST, port), timeout=10) as connection:
        assert ask(connection) == b"HTTP/1.1 403"
    assert served == []


@needs_root
def test_a_port_that_another_user_takes_over_is_looked_up_again(server: tuple[int, list[str]]) -> None:
    port, served = server

    def request(source: int) -> bytes:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # no waiting after close
            connection.bind((HOST, source))
            connection.connect((HOST, port))
            return ask(connection)

    with socket.create_server((HOST, 0)) as probe:
        source = probe.getsockname()[1]
    assert request(source) == b"HTTP/1.1 200"
    assert as_stranger(request, source) == b"HTTP/1.1 403"
    assert served == ["http"]


def test_a_connection_from_another_machine_has_no_user_here() -> None:
    assert owner_only.look_up(("198.51.100.1", 40000), (HOST, 8000)) is None


def test_another_flower_and_another_system_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "flwr.other", ModuleType("flwr.other"))
    with pytest.raises(SystemExit, match="whose flwr.other does not use uvicorn: install the version of Flower"):
        protect("flwr.other")
    monkeypatch.setattr(owner_only, "TCP", tmp_path / "tcp")
    with pytest.raises(SystemExit, match="has no .*/tcp, so other users cannot be kept out of .*: use Linux"):
        protect(owner_only.PROGRAMS["superlink"])
