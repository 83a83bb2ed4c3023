"""tools.supernode: Flower's SuperNode with shorter waits and with clients that are forks."""

import importlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.waiting import Stopped
from tools import supernode
from tools.supernode import CLIENT, INSTALL, NODE, Launcher, Pauses, replace_names

ROOT = Path(supernode.__file__).parents[1]


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list of the pauses made, none of which is really made."""
    pauses: list[float] = []
    monkeypatch.setattr(supernode, "time", SimpleNamespace(sleep=pauses.append))
    return pauses


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return Flower's module with the loop, which is put back afterwards."""
    module = importlib.import_module(NODE)
    monkeypatch.setattr(module, "time", module.time)
    monkeypatch.setattr(module, "subprocess", module.subprocess)
    return module


def test_pauses_grow_up_to_what_is_asked_for_and_another_kind_of_wait_starts_short(slept: list[float]) -> None:
    pauses = Pauses()
    for seconds in (*[3.0] * 80, 0.5, 3.0, 0.001):
        pauses.sleep(seconds)
    assert slept[:80] == sorted(slept[:80])
    assert slept[79:] == [3, supernode.FIRST_PAUSE, supernode.FIRST_PAUSE, 0.001]


def test_flowers_own_loop_waits_with_our_pauses_and_shortly_again_after_work(
    node: Any, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled = iter([None, None, 1, None])
    waits = iter([[], [], []])

    @contextmanager
    def connection(**_: Any) -> Iterator[tuple[Any, ...]]:
        yield (7, *[None] * 7)

    def pull(**_: Any) -> int | None:
        return next(pulled)

    def replies(is_reply: bool) -> list[Any]:
        if (found := next(waits, None)) is None:
            raise Stopped
        return found

    state = SimpleNamespace(set_node_id=lambda _: None, get_messages_legacy=replies)
    factory = SimpleNamespace(state=lambda: state, objectstore_factory=SimpleNamespace(store=lambda: None))
    monkeypatch.setattr(node, "_init_connection", connection)
    monkeypatch.setattr(node, "_pull_and_store_message", pull)
    monkeypatch.setattr(node, "register_signal_handlers", lambda **_: None)
    replace_names(NODE, time=Pauses())
    with pytest.raises(Stopped):
        node.start_client_internal(
            state_factory=factory, server_address="127.0.0.1:1", node_config={}, isolation="process"
        )
    first, second = supernode.FIRST_PAUSE, supernode.FIRST_PAUSE * supernode.GROWTH
    assert slept == pytest.approx([first, second, first, second, second * supernode.GROWTH])


@pytest.mark.parametrize("change", [lambda m: delattr(m, "time"), lambda m: setattr(m, "time", print)])
def test_a_flower_of_another_build_is_refused_in_one_line(node: Any, change: Any) -> None:
    change(node)
    with pytest.raises(SystemExit, match=r"^error: .*start_client_internal has no `time`: use .*--plain.*$"):
        replace_names(NODE, time=Pauses())


def test_flower_still_calls_what_we_replace() -> None:
    calls = {NODE: ["time.sleep(", '["flower-superexec"]'], supernode.EXEC: ["time.sleep("]}
    for name, found in (calls | {supernode.LAUNCH: ["subprocess.Popen("]}).items():
        source = Path(importlib.import_module(name).__file__ or "").read_text()
        assert all(call in source for call in found), name


def test_clients_are_forked_and_other_programs_are_started_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def popen(command: list[str], **_: Any) -> Any:
        """Start a server of forks that notes what it is asked for."""
        started.append(SimpleNamespace(command=command, stdin=io.StringIO(), poll=lambda: None))
        return started[-1]

    def asked(server: Any) -> list[str]:
        return [json.loads(line)[-1] for line in server.stdin.getvalue().splitlines()]

    monkeypatch.setattr(supernode, "subprocess", SimpleNamespace(Popen=popen, PIPE=-1))
    pauses = Pauses()
    pauses.pause = 9.0
    launcher = Launcher(pauses)
    launcher.start([CLIENT, "--token", "one"])
    launcher.start([CLIENT, "--token", "two"])
    launcher.start(["flwr-model"])
    launcher.start([CLIENT, INSTALL])
    assert pauses.pause == supernode.FIRST_PAUSE
    assert asked(started[0]) == ["one", "two"]
    started[0].poll = lambda: -9
    launcher.start([CLIENT, "--token", "three"])
    assert [server.command[-1] for server in started] == ["clients", "flwr-model", INSTALL, "clients"]
    assert asked(started[-1]) == ["three"]


FORKS = """
import os, sys, types
import numpy as np
from flapp.privacy import perturb
from tools import supernode

def flwr_clientapp():
    zero = {"w": np.zeros(1)}
    noise = perturb(zero, zero, clipping_norm=1.0, sigma=1.0)["w"][0]
    os.write(1, f"{sys.argv[1]} {os.getpid()} {noise}\\n".encode())
    sys.exit(3)

sys.modules["flwr.supernode.cli"] = types.SimpleNamespace(flwr_clientapp=flwr_clientapp)
supernode.NEEDED = ("numpy.random",)
supernode.run_clients()
"""


def test_every_client_is_a_process_of_its_own_and_draws_noise_of_its_own() -> None:
    asked = "".join(json.dumps([CLIENT, name]) + "\n" for name in "abc")
    done = subprocess.run(
        [sys.executable, "-c", FORKS], input=asked, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    clients, processes, noise = zip(*[line.split() for line in done.stdout.splitlines()], strict=True)
    assert sorted(clients) == ["a", "b", "c"]
    assert len(set(processes)) == len(set(noise)) == 3
