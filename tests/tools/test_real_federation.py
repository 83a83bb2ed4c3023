"""A real federation on this machine: whom its ports serve, and what happens when its processes are killed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.commands import finish, left_running, start_tool
from tests.support.strangers import as_stranger, get, listening, needs_root
from tests.support.waiting import WAIT_SECONDS, wait_for
from tools import federation, runs
from tools.deployment.processes import HOST, Processes
from tools.deployment.supervisor import UP, Program, read_federation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a home with a federation of two clients that runs, without TLS."""
    home = tmp_path_factory.mktemp("real")
    status, said, error = finish(start_tool(home, "federation", "up", "--clients", "2"))
    assert status == 0, error
    assert "2 of 2 SuperNodes online" in said
    yield home
    Processes(read_federation(home / "federation").token).stop()


@needs_root
def test_no_port_of_a_federation_without_tls_serves_another_user(home: Path) -> None:
    ports = listening(left_running(home))
    assert len(ports) == 3  # the SuperLink's and the SuperNodes'
    assert {host for host, _ in ports} == {HOST}
    assert {as_stranger(get, port)[0] for _, port in ports} == {403}
    assert {get(port)[0] for _, port in ports} == {404}


def test_what_is_killed_in_a_federation_is_not_online_and_ends_with_its_supervisor(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = home / "federation"

    def look() -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        status = federation.main(["status", "--json", "--folder", str(folder)])
        return status, json.loads(capsys.readouterr().out)

    def has_said_its_id() -> bool:
        seen = federation.read_seen(folder)
        return seen is not None and seen.ready and not federation.find_silent(folder, seen)

    def supernodes(restarts: int) -> list[psutil.Process]:
        def programs() -> list[Program]:
            seen = federation.read_seen(folder)
            assert seen is not None
            return [seen.programs[name] for name in ("client_0", "client_1")]

        wait_for(lambda: all(program.restarts == restarts for program in programs()))
        wait_for(lambda: has_said_its_id() and look()[0] == 0)
        return [psutil.Process(program.pid) for program in programs()]

    processes = Processes(read_federation(folder).token)
    supervisor = federation.find_supervisor(folder)
    assert supervisor is not None
    other, victim = supernodes(restarts=0)
    supervisor.suspend()  # or the SuperNode is back before anybody can look
    victim.kill()
    status, facts = look()
    (superexec,) = (child for child in other.children() if "superexec" in child.cmdline())
    superexec.kill()  # whose SuperNode ends with it
    supervisor.resume()
    assert (status, facts["online"], facts["missing"]) == (1, 1, ["client_1"])
    psutil.wait_procs([other, victim], WAIT_SECONDS)
    supernodes(restarts=1)  # other nodes: Flower lists the dead ones for up to a minute
    words = ("experiment=toy_regression", "deployment=local", "clients=1", "num_rounds=1000", "run_name=shared")
    run = start_tool(home, "run", *words)
    metrics = home / "runs" / "shared" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"kind": "round"' in metrics.read_text())
    run.kill()
    run.communicate()
    assert runs.main(["stop", "shared", "--home", str(home)]) == 0
    assert look()[0] == 0
    supervisor.kill()
    wait_for(lambda: not processes.running())
    assert federation.main(["status", "--folder", str(folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"was killed and its programs have been stopped: {UP}")
    assert federation.main(["down", "--folder", str(folder)]) == 0
    assert capsys.readouterr().out == "nothing was running\n"
