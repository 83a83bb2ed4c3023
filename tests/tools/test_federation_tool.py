"""tools.federation: its checks, the commands that it would start, and how it restarts programs."""

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flapp.data.shards.manifest import Manifest
from flapp.files import write_json
from tests.support.waiting import Stopped, wait_for
from tests.tools.conftest import Refusal
from tools import federation
from tools.deployment import supervisor
from tools.deployment.processes import TOKEN, Processes, SuperLinkError, answers, free_port
from tools.deployment.supervisor import (
    FACTS,
    LOG,
    SEEN,
    SUPERLINK,
    Federation,
    Program,
    Seen,
    Supervisor,
    read_federation,
    supernode_command,
)

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
LISTEN = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(600)"


def described(**changes: Any) -> Federation:
    """Return a federation of two clients, with changes."""
    facts = {"token": secrets.token_hex(16), "address": f"127.0.0.1:{free_port()}", "tls": False, "clients": ("0", "1")}
    return Federation(**facts | {"shards": None, "homes": False, "threads": 1} | changes)


def test_what_cannot_be_brought_up_is_refused_in_one_line(shards: Manifest, tmp_path: Path, refusal: Refusal) -> None:
    up = ("up", "--folder", str(tmp_path / "f"))
    assert refusal(federation.main, *up) == "error: how many clients? give --clients N, or --shards DIR"
    assert "make it with python -m tools.prepare_data" in refusal(federation.main, *up, "--shards", str(tmp_path))
    for command in ("down", "status"):
        assert refusal(federation.main, command, *up[1:]).startswith(f"error: {tmp_path}/f has no federation")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refusal(federation.main, *up, "--clients", "1", "--port", port)
    assert line == f"error: --port {port} is in use on 127.0.0.1: choose another, or leave it out for a free one"
    folder = shards.path.parent
    up += ("--shards", str(folder))
    assert refusal(federation.main, *up, "--clients", "5").endswith("holds 3: leave --clients out")
    file = folder / "client_1" / "train.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "client 1" in refusal(federation.main, *up)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shards": ...}, "shards: Field required"),
        ({"token": ""}, "token: String should"),  # every process would carry it
        ({"clients": ["../0"]}, "clients.0: String should"),
        ({"more": 1}, "more: Extra inputs"),
    ],
)
def test_a_federation_that_another_version_described_is_named(
    tmp_path: Path, refusal: Refusal, changes: dict[str, Any], said: str
) -> None:
    facts = described().model_dump() | changes
    write_json(tmp_path / FACTS, {key: value for key, value in facts.items() if value is not ...})
    line = refusal(federation.main, "status", "--folder", str(tmp_path))
    assert line.startswith(f"error: {tmp_path}/{FACTS} is not what this flapp writes ({said}")


def test_a_site_is_told_only_what_is_its_own(tmp_path: Path) -> None:
    plain = " ".join(supernode_command(tmp_path, described(), "1"))
    assert '--node-config client-id="1" ' in plain
    assert "--insecure" in plain
    assert "/supernode.py " in plain
    assert "/owner_only.py supernode " in " ".join(supernode_command(tmp_path, described(plain=True), "1"))
    rich = described(tls=True, shards="/data/shards", homes=True)
    secure = " ".join(supernode_command(tmp_path, rich, "1"))
    assert f'client-id="1" shard-path="/data/shards/client_1" home="{tmp_path}/client_1/home"' in secure
    assert f"--root-certificates {tmp_path}/ca.crt --auth-supernode-private-key {tmp_path}/client_1/site.key" in secure
    assert "--insecure" not in secure
    assert "client_0" not in secure


# The supervisor, over programs that stand in for Flower's


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Supervisor:
    """Return a supervisor that must not start a SuperNode before the SuperLink answers."""
    write_json(tmp_path / FACTS, described(**getattr(request, "param", {})).model_dump())

    def superlink(_: Path, which: Federation) -> list[str]:
        return [sys.executable, "-c", LISTEN, which.address.rpartition(":")[2]]

    def supernode(_: Path, which: Federation, client_id: str) -> list[str]:
        assert answers(which.address)
        return SLEEP

    monkeypatch.setattr(supervisor, "superlink_command", superlink)
    monkeypatch.setattr(supervisor, "supernode_command", supernode)
    return Supervisor(tmp_path)


def play(watched: Supervisor, scenario: Callable[[], object]) -> None:
    """Run the supervisor, with a scenario beside it, until it is stopped by a signal."""

    async def both() -> None:
        running = asyncio.create_task(watched.run())
        try:
            await asyncio.to_thread(scenario)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            await running

    asyncio.run(both())
    assert Processes(watched.federation.token).running() == []


def wait_for_starts(watched: Supervisor, *restarts: int) -> list[int]:
    """Wait until all programs run, after so many restarts, and return their pids."""

    def pids() -> list[int | None]:
        seen = federation.read_seen(watched.folder)
        programs = list(seen.programs.values()) if seen and seen.ready else []
        are_those = [program.restarts for program in programs] == list(restarts)
        return [program.pid for program in programs] if are_those and all(each.pid for each in programs) else []

    return list(wait_for(pids))


def test_killed_programs_come_back_and_a_stop_leaves_none(watched: Supervisor) -> None:
    def scenario() -> None:
        superlink, _, victim = wait_for_starts(watched, 0, 0, 0)
        os.kill(victim, signal.SIGKILL)
        os.kill(superlink, signal.SIGKILL)
        wait_for_starts(watched, 1, 0, 1)
        assert len(Processes(watched.federation.token).running()) == 3
        assert answers(watched.federation.address)

    play(watched, scenario)


@pytest.mark.parametrize("watched", [{"tls": True}], indirect=True)
def test_a_superlink_that_fails_a_command_is_asked_again(
    watched: Supervisor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []

    def flwr(_: object, *words: str) -> None:
        asked.append(words)
        if len(asked) == 1:
            raise SuperLinkError("flwr list failed")

    monkeypatch.setattr(supervisor.SuperLink, "flwr", flwr)
    play(watched, lambda: wait_for_starts(watched, 0, 0, 0))
    assert "flwr list failed" in capsys.readouterr().out
    keys = {(words[2], words[4]) for words in asked if "register" in words}
    assert keys == {(f"{watched.folder}/client_{i}/site.pub", f"client_{i}") for i in range(2)}


def test_a_supervisor_that_fails_stops_its_programs(watched: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "write_json", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        supervisor.supervise(watched.folder)
    assert Processes(watched.federation.token).running() == []


def test_pauses_before_a_start_double_until_a_program_has_run_for_long(
    watched: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, lifetimes, pauses = 0.0, [*[0.0] * 8, 3600.0, 0.0], list[float]()

    def command() -> list[str]:
        nonlocal now
        now += lifetimes[len(pauses)]
        return ["sh", "-c", "exit 3"]

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == len(lifetimes):
            raise Stopped

    monkeypatch.setattr(supervisor, "monotonic", lambda: now)
    monkeypatch.setattr(supervisor.asyncio, "sleep", sleep)
    watched.ready.set()
    with pytest.raises(Stopped):
        asyncio.run(watched.keep("client_0", command))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 1, 2]
    assert watched.seen.programs["client_0"] == Program(restarts=9)


@pytest.mark.parametrize(
    ("tls", "ends", "pause"),
    [(True, "kill -9 $$", 70), (False, "kill -9 $$", 1), (True, "kill -15 $$", 1), (True, "exit 137", 1)],
)
def test_a_killed_site_rests_until_the_superlink_has_noticed_unless_it_returns_as_a_new_node(
    watched: Supervisor, monkeypatch: pytest.MonkeyPatch, tls: bool, ends: str, pause: float
) -> None:
    async def sleep(seconds: float) -> None:
        assert seconds == pause
        raise Stopped

    watched.federation = watched.federation.model_copy(update={"tls": tls})
    monkeypatch.setattr(supervisor.asyncio, "sleep", sleep)
    watched.ready.set()
    with pytest.raises(Stopped):
        asyncio.run(watched.keep("client_0", lambda: ["sh", "-c", ends]))


@pytest.mark.slow
def test_a_supervisor_in_the_foreground_is_found_and_stopped(tmp_path: Path, refusal: Refusal) -> None:
    words = ["up", "--folder", str(tmp_path), "--clients", "1", "--foreground"]
    command = [sys.executable, "-m", "tools.federation", *words]
    attached = subprocess.Popen(command, cwd=federation.APP, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for((tmp_path / SEEN).exists)
        assert "has a federation that runs" in refusal(federation.main, *words[:-1])
        assert federation.main(["down", "--folder", str(tmp_path)]) == 0
        assert attached.wait(30) == 0
    finally:
        attached.kill()
    assert Processes(read_federation(tmp_path).token).running() == []


# What a federation is said to be


def test_down_finds_what_a_killed_supervisor_has_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = described()
    write_json(tmp_path / FACTS, facts.model_dump())
    tokens = (facts.token, "another")
    orphan, stranger = (subprocess.Popen(SLEEP, env={TOKEN: token}, start_new_session=True) for token in tokens)
    try:
        for said in ("stopped 1 processes\n", "nothing was running\n"):
            assert federation.main(["down", "--folder", str(tmp_path)]) == 0
            assert capsys.readouterr().out == said
        assert not psutil.pid_exists(orphan.pid)
        assert stranger.poll() is None
    finally:
        for process in (orphan, stranger):
            process.kill()
            process.wait()


@pytest.fixture
def started(tmp_path: Path) -> Seen:
    """Return the state of a federation of one client, whose SuperNode has started for a second time as node 8."""
    write_json(tmp_path / FACTS, described(clients=("0",)).model_dump())
    (tmp_path / "client_0").mkdir()
    first = "INFO: SuperNode ID: 7\n"
    (tmp_path / "client_0" / LOG).write_text(f"{first}INFO: SuperNode ID: 8\n")
    node = Program(pid=os.getpid(), restarts=1, log_start=len(first))
    seen = Seen(pid=os.getpid(), ready=True, programs={SUPERLINK: Program(pid=os.getpid()), "client_0": node})
    write_json(tmp_path / SEEN, seen.model_dump())
    return seen


@pytest.mark.parametrize(
    ("pid", "online", "healthy"),
    [
        (os.getpid(), {"7", "8"}, True),
        (os.getpid(), {"7"}, False),  # Flower has not noticed yet that the first one is dead
        (None, {"7", "8"}, False),
        (1 << 22, {"7", "8"}, False),
    ],
    ids=["online", "its successor is not online yet", "ended", "killed"],
)
def test_a_supernode_counts_as_online_by_its_present_living_process_only(
    started: Seen,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pid: int | None,
    online: set[str],
    healthy: bool,
) -> None:
    started.programs["client_0"].pid = pid
    write_json(tmp_path / SEEN, started.model_dump())
    monkeypatch.setattr(federation, "online_nodes", lambda *_: online)
    monkeypatch.setattr(federation, "find_supervisor", lambda _: psutil.Process())
    assert federation.main(["status", "--folder", str(tmp_path)]) == int(not healthy)
    out = capsys.readouterr().out
    assert f"{int(healthy)} of 1 SuperNodes online" in out
    assert ("(not online)" in out) == (not healthy and pid is not None)


def test_a_federation_says_whether_it_was_taken_down_or_its_supervisor_killed(
    started: Seen, tmp_path: Path, refusal: Refusal
) -> None:
    status = ("status", "--folder", str(tmp_path))
    killed = f"error: the supervisor of {tmp_path} (pid {os.getpid()}) was killed and its programs have been stopped"
    assert refusal(federation.main, *status) == f"{killed}: {supervisor.UP}"
    token = read_federation(tmp_path).token
    left = subprocess.Popen(SLEEP, env={TOKEN: token})
    wait_for(Processes(token).running)
    said = f"is gone, and 1 of its processes still run (pids {left.pid}): take the federation down"
    assert said in refusal(federation.main, *status)
    left.kill()
    left.wait()
    (tmp_path / SEEN).unlink()
    assert refusal(federation.main, *status) == f"error: the federation of {tmp_path} is down: {supervisor.UP}"
