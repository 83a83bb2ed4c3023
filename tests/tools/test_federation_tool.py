"""tools.federation without Flower: its checks, the commands that it would start, and how it restarts programs."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flapp.data.shards.manifest import Manifest
from flapp.files import write_json
from tests.support.waiting import wait_for
from tools import federation
from tools.deployment import supervisor
from tools.deployment.processes import Processes, SuperLinkError, answers, free_port
from tools.deployment.supervisor import FACTS, Child, Federation, Supervisor, supernode_command


def described(**changes: object) -> Federation:
    """Return a federation of two clients, with changes."""
    facts = {"token": "t" * 32, "address": f"127.0.0.1:{free_port()}", "tls": False, "clients": ("0", "1")}
    return Federation(**facts | {"shards": None, "homes": False, "threads": 1} | changes)  # type: ignore[arg-type]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the line with which the tool refuses."""
    assert federation.main(list(arguments)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_brought_up_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    up = ("up", "--folder", str(tmp_path / "f"))
    assert refusal(capsys, *up) == "error: how many clients? give --clients N, or --shards DIR"
    assert "make it with python -m tools.prepare_data" in refusal(capsys, *up, "--shards", str(tmp_path))
    assert refusal(capsys, "down", *up[1:]).startswith(f"error: {tmp_path}/f has no federation")
    assert refusal(capsys, "status", *up[1:]).startswith(f"error: {tmp_path}/f has no federation")
    assert not (tmp_path / "f").exists()


def test_a_port_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refusal(capsys, "up", "--folder", str(tmp_path), "--clients", "1", "--port", port)
    assert line == f"error: --port {port} is in use on 127.0.0.1: choose another, or leave it out for a free one"


def test_damaged_or_miscounted_shards_are_refused_before_anything_starts(
    shards: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shards.path.parent
    up = ("up", "--folder", str(tmp_path / "f"), "--shards", str(folder))
    assert refusal(capsys, *up, "--clients", "5").endswith("holds 3: leave --clients out")
    file = folder / "client_1" / "train.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "client 1" in refusal(capsys, *up)
    assert not (tmp_path / "f").exists()


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


def test_a_program_that_ends_at_once_is_started_again_after_pauses_that_double(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    child = Child(tmp_path / "site")
    pauses = []
    for _ in range(8):
        child.start([sys.executable, "-c", "raise SystemExit(3)"], {})
        assert child.process is not None
        child.process.wait()
        assert child.has_ended()
        assert not child.has_ended()
        assert not child.is_due()
        pauses.append(child.next_start - now)
        now = child.next_start
        assert child.is_due()
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert child.facts() == {"pid": None, "restarts": 7, "log_start": 0}


def test_a_program_that_ran_for_long_is_started_again_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    child = Child(tmp_path / "site")
    child.pause = 32.0
    child.start([sys.executable, "-c", ""], {})
    assert child.process is not None
    child.process.wait()
    now += 3600
    assert child.has_ended()
    assert child.next_start == now + 1


LISTEN = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(600)"


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    """Return a supervisor over programs that stand in for Flower's."""
    facts = described()
    write_json(tmp_path / FACTS, facts.__dict__)

    def superlink(folder: Path, which: Federation) -> list[str]:
        return [sys.executable, "-c", LISTEN, str(which.port)]

    def supernode(folder: Path, which: Federation, client_id: str) -> list[str]:
        return [sys.executable, "-c", "import time; time.sleep(600)"]

    monkeypatch.setattr(supervisor, "superlink_command", superlink)
    monkeypatch.setattr(supervisor, "supernode_command", supernode)
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.1)
    return Supervisor(tmp_path)


def look_until(watched: Supervisor, running: int) -> None:
    def has_come() -> bool:
        watched.look()
        return watched.ready and len(Processes(watched.federation.token).running()) == running

    wait_for(has_come)


def test_killed_programs_come_back_and_stop_leaves_none(watched: Supervisor) -> None:
    try:
        watched.look()
        assert [node.process for node in watched.nodes.values()] == [None, None]  # the SuperLink comes first
        look_until(watched, 3)
        victims = [watched.nodes["1"].process, watched.superlink.process]
        for victim in victims:
            assert victim is not None
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        look_until(watched, 3)
        seen = json.loads((watched.folder / "supervisor.json").read_text())["programs"]
        assert {name: facts["restarts"] for name, facts in seen.items()} == {
            "superlink": 1,
            "client_0": 0,
            "client_1": 1,
        }
        assert answers(watched.federation.port)
    finally:
        watched.stop()
    assert Processes(watched.federation.token).running() == []


def test_down_finds_what_a_killed_supervisor_has_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = described()
    write_json(tmp_path / FACTS, facts.__dict__)
    orphan = subprocess.Popen(["sleep", "600"], env={"FLAPP_SUPERLINK": facts.token}, start_new_session=True)
    stranger = subprocess.Popen(["sleep", "600"], env={"FLAPP_SUPERLINK": "another"}, start_new_session=True)
    try:
        assert federation.main(["down", "--folder", str(tmp_path)]) == 0
        assert capsys.readouterr().out == "stopped 1 processes\n"
        assert not psutil.pid_exists(orphan.pid)
        assert stranger.poll() is None
    finally:
        for process in (orphan, stranger):
            process.kill()
            process.wait()
    assert federation.main(["down", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "nothing was running\n"


def test_a_supervisor_in_the_foreground_is_found_and_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["up", "--folder", str(tmp_path), "--clients", "1", "--foreground"]
    command = [sys.executable, "-m", "tools.federation", *words]
    attached = subprocess.Popen(command, cwd=federation.APP, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: federation.find_supervisor(tmp_path))
        assert "has a federation that runs" in refusal(capsys, "up", "--folder", str(tmp_path), "--clients", "1")
        assert federation.main(["down", "--folder", str(tmp_path)]) == 0
        assert attached.wait(30) == 0
    finally:
        attached.kill()
    assert Processes(supervisor.read_federation(tmp_path).token).running() == []


def test_a_superlink_that_fails_a_command_is_asked_again(
    watched: Supervisor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched.federation = described(tls=True, address=watched.federation.address)

    def fail(*_: str) -> None:
        raise SuperLinkError("flwr list failed")

    monkeypatch.setattr(supervisor, "answers", lambda port: True)
    monkeypatch.setattr(supervisor.SuperLink, "flwr", fail)
    watched.superlink.process = subprocess.Popen(["sleep", "60"])
    watched.look()
    assert not watched.ready
    assert "flwr list failed" in capsys.readouterr().out
    watched.stop()


def test_a_supervisor_that_fails_stops_its_programs(watched: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(supervisor, "write_json", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        supervisor.supervise(watched.folder)
    assert Processes(watched.federation.token).running() == []


def test_a_federation_that_another_version_described_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FACTS).write_text('{"token": "x"}')
    assert refusal(capsys, "status", "--folder", str(tmp_path)).startswith(
        f"error: {tmp_path}/{FACTS} is not what this"
    )
