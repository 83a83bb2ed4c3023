"""What a killed command or supervisor leaves running ends by itself, is named until then, and can be stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from flapp.config.load import compose, to_json
from flapp.config.schema import ConfigError
from flapp.messages import describe_error
from flapp.server import run_lock
from flapp.server.roster import Roster
from flapp.server.run_dir import RunDirectory
from tests.conftest import LocalGrid, read_lines
from tests.support.waiting import wait_for
from tools import federation, runs
from tools.deployment.processes import OWNER, SWEEP, TOKEN, Processes, note_process, noted_process
from tools.deployment.submit import APP
from tools.deployment.supervisor import FACTS, LOG, SEEN, SUPERLINK, Federation, write_json
from tools.running.guard import guarded
from tools.running.stop import StopError, stop_run

Federate = Callable[..., tuple[dict[str, Any], Path]]
TOY = ("experiment=toy_regression", "evaluate.every=20", "deployment=simulation")
ROUNDS = "num_rounds=40"  # enough to be killed in the middle of
GONE_SECONDS = 60  # generous, for a busy machine: it takes about 7
SLEEP = ("sleep", "600")
GUARDED = """
import os, subprocess, sys, time
from pathlib import Path
from tools.running.guard import guarded
with guarded("FLAPP_ORPHAN", sys.argv[1], Path(sys.argv[1])):
    env = os.environ | {"FLAPP_ORPHAN": sys.argv[1] + "-superlink"}
    for command in (["sleep", "600"], ["sh", "-c", "trap '' TERM; while true; do sleep 1; done"]):
        subprocess.Popen(command, env=env, start_new_session=True)
    print("ready", flush=True)
    time.sleep(600)
"""


# The guard


def test_a_killed_program_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "flapp-x"
    for each in (folder, tmp_path / "flapp-x-superlink", tmp_path / "another"):
        each.mkdir()
    command = [sys.executable, "-c", GUARDED, str(folder)]
    program = subprocess.Popen(command, cwd=APP, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stranger = subprocess.Popen(SLEEP, env={"FLAPP_ORPHAN": str(tmp_path / "another")})
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        started = Processes(str(folder), "FLAPP_ORPHAN")
        assert len(started.running()) >= 2
        program.kill()
        _, said = program.communicate(timeout=GONE_SECONDS)  # to the guard's last word
        assert started.running() == []
        assert [each.name for each in tmp_path.iterdir()] == ["another"]
        assert said.startswith(f"pid {program.pid} was killed; its guard stopped the ")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
        Processes(str(folder), "FLAPP_ORPHAN").stop()


def test_a_guard_leaves_alone_what_a_program_that_ends_by_itself_leaves(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    with guarded("FLAPP_ORPHAN", str(folder), folder):
        child = subprocess.Popen(SLEEP, env={"FLAPP_ORPHAN": str(folder)})
    assert child.poll() is None
    assert folder.exists()
    child.kill()
    child.wait()


def test_a_guard_does_not_wait_for_a_fork_that_holds_its_input_open(tmp_path: Path) -> None:
    began = time.monotonic()
    with guarded("FLAPP_ORPHAN", str(tmp_path / "x")):
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
            os._exit(0)
    assert time.monotonic() - began < GONE_SECONDS
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# Runs that are still running


@pytest.fixture
def running(data_home: Path, request: pytest.FixtureRequest) -> Iterator[RunDirectory]:
    """Return the directory of a run that this process writes."""
    name = f"run_name=orphan-{request.node.name[:40]}"
    run = RunDirectory.create(compose([f"home={data_home}", *TOY, name]), run_id=17)
    yield run
    run.close()


def test_a_run_that_still_runs_is_named_with_its_process_and_the_command_that_stops_it(running: RunDirectory) -> None:
    fix = f"stop it with `python -m tools.runs stop {running.config.run_name}`"
    with pytest.raises(ConfigError, match=rf"is still running \(pid {os.getpid()}\): wait until it ends, or {fix}"):
        run_lock.lock_run(running.path, running.config.run_name)
    assert run_lock.find_holder(running.path) == {"pid": os.getpid(), "run_id": 17}


def test_who_wrote_a_run_is_forgotten_at_its_end_and_counts_for_nothing_after_a_kill(running: RunDirectory) -> None:
    left = (running.path / run_lock.RUNNING).read_text()
    running.close()
    assert not (running.path / run_lock.RUNNING).exists()
    (running.path / run_lock.RUNNING).write_text(left)
    assert run_lock.find_holder(running.path) is None
    run_lock.lock_run(running.path, "x").close()


def test_a_look_at_a_run_does_not_keep_its_next_start_out(running: RunDirectory) -> None:
    import fcntl
    import threading

    running.close()
    with (running.path / run_lock.METRICS).open() as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        threading.Timer(run_lock.PROBE_SECONDS / 3, lambda: fcntl.flock(looker, fcntl.LOCK_UN)).start()
        run_lock.lock_run(running.path, "x").close()


HOLDER = """
import sys, time
from pathlib import Path
from flapp.server import run_lock
path = Path(sys.argv[1])
file = run_lock.lock_run(path, "x")
run_lock.name_holder(path, 17)
print("ready", flush=True)
time.sleep(600)
"""


def has_ended(pid: int) -> bool:
    """Say whether a process is gone, or waits only for somebody to read its exit status."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def orphan(running: RunDirectory, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Return a function that starts a process which holds a run, with this token in its environment."""
    running.close()
    started = []

    def start(token: str) -> subprocess.Popen[str]:
        env = os.environ | {TOKEN: token, SWEEP: str(tmp_path)}
        command = [sys.executable, "-c", HOLDER, str(running.path)]
        process = subprocess.Popen(command, cwd=APP, env=env, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_stop_ends_an_orphan_with_all_that_carries_its_token_and_says_how_to_continue(
    running: RunDirectory, orphan: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "flapp-x"
    token.mkdir()
    process = orphan(str(token))
    superlink = subprocess.Popen(SLEEP, env={TOKEN: str(token)})
    process.send_signal(signal.SIGSTOP)
    name, home = running.config.run_name, running.config.home
    assert runs.main(["stop", name, "--home", home]) == 0
    stopped, advice = capsys.readouterr().out.splitlines()
    assert stopped.startswith(f"stopped {name} (pids ")
    assert {str(process.pid), str(superlink.pid)} <= set(stopped.rstrip(")").replace(",", "").split())
    assert advice == f"continue it with its settings and run_name={name} resume=true"
    assert (process.wait(5), superlink.wait(5)) != (None, None)
    assert not token.exists()
    assert runs.main(["stop", name, "--home", home]) == 0
    assert capsys.readouterr().out == f"{name} is not running\n"


OWNER_SCRIPT = """
import signal, sys
from pathlib import Path
from tools.deployment.processes import note_process
note = Path(sys.argv[1])
def interrupt(*_):
    note.with_name("interrupted").touch()
    sys.exit()
signal.signal(signal.SIGTERM, interrupt)
note_process(note)
input()
"""


def test_stop_interrupts_the_command_where_it_lives_even_suspended(
    running: RunDirectory, orphan: Callable[..., Any], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", OWNER_SCRIPT, str(tmp_path / OWNER)]
    owner = subprocess.Popen(command, cwd=APP, stdin=subprocess.PIPE)
    wait_for(lambda: noted_process(tmp_path / OWNER), GONE_SECONDS)
    owner.send_signal(signal.SIGSTOP)
    process = orphan(str(tmp_path / "flapp-x"))
    assert stop_run(running.config.runs_dir, running.config.run_name) == [owner.pid, process.pid]
    assert (tmp_path / "interrupted").exists()


def test_stop_kills_nobody_whose_pid_running_json_names_by_mistake(
    running: RunDirectory, orphan: Callable[..., Any], tmp_path: Path
) -> None:
    process = orphan(str(tmp_path / "flapp-x"))
    stranger = subprocess.Popen(SLEEP, env={TOKEN: str(tmp_path / "flapp-x")})
    write_json(running.path / run_lock.RUNNING, {"pid": stranger.pid, "run_id": 17})
    with pytest.raises(StopError, match=rf"process {stranger.pid}, named in running.json, does not .* `fuser "):
        stop_run(running.config.runs_dir, running.config.run_name)
    assert (process.poll(), stranger.poll()) == (None, None)
    stranger.kill()
    stranger.wait()


def test_a_noted_process_of_a_pid_used_again_is_not_it(tmp_path: Path) -> None:
    note_process(tmp_path / "note")
    assert noted_process(tmp_path / "note") == psutil.Process()
    pid, began = json.loads((tmp_path / "note").read_text())
    (tmp_path / "note").write_text(json.dumps([pid, began - 60]))
    assert noted_process(tmp_path / "note") is None
    assert noted_process(tmp_path / "no note") is None


def test_stop_leaves_the_other_processes_of_a_shared_superlink_alone(
    running: RunDirectory, orphan: Callable[..., Any]
) -> None:
    process = orphan("0123456789abcdef" * 2)  # a federation's token
    with pytest.raises(StopError, match="not started by flapp: stop it with `flwr stop 17`"):
        stop_run(running.config.runs_dir, running.config.run_name)
    assert process.poll() is None


@pytest.mark.parametrize("name", ["..", "/etc", "no-such-run", "../elsewhere"])
def test_stop_refuses_names_that_are_not_of_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.yaml").touch()
    assert runs.main(["stop", name, "--home", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said == f"error: {tmp_path}/runs has no run {name}: give the run_name that it was started with\n"


def test_folders_of_starts_killed_long_ago_are_removed_at_the_next(federate: Federate, data_home: Path) -> None:
    left, fresh = data_home / "runs" / ".new-left", data_home / "runs" / ".new-fresh"
    for each in (left, fresh):
        each.mkdir(parents=True)
    os.utime(left, (time.time() - 3600, time.time() - 3600))
    federate("experiment=toy_regression", "num_rounds=1")
    assert not left.exists()
    assert fresh.exists()  # somebody may be making it
    fresh.rmdir()


# Clients that died

DEAD = {
    ErrorCode.NODE_UNAVAILABLE: "its node stopped answering (killed, out of memory, or disconnected)",
    ErrorCode.MESSAGE_UNAVAILABLE: "its node left the federation, or did not answer before the message expired",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its answer expired before it could be read",
    ErrorCode.CLIENT_APP_CRASHED: "its process ended before it answered (killed, or out of memory)",
    ErrorCode.UNKNOWN: "Error: some words of Flower's",
}


def fail_with(code: int, client_id: str, kind: str) -> Callable[[str, Message], Message]:
    """Return a tamper by which Flower itself answers for a client, from no node, with one of its errors."""

    def tamper(asked: str, reply: Message) -> Message:
        if asked != client_id or reply.metadata.message_type != kind:
            return reply
        failed = Message(Error(code, "Error: some words of Flower's"), reply_to=reply)
        failed.metadata.__dict__["_src_node_id"] = 1  # of the SuperLink
        return failed

    return tamper


@pytest.mark.parametrize("name", ["ActorDied", "OutOfMemory", "WorkerCrashed"])
def test_a_worker_of_ray_that_died_is_said_to_be_dead(name: str) -> None:
    reason = f"<class 'ray.exceptions.{name}Error'>:<'The actor died unexpectedly before finishing this task.\n...'>"
    assert describe_error(Error(ErrorCode.UNKNOWN, reason)) == DEAD[ErrorCode.CLIENT_APP_CRASHED]
    assert describe_error(Error(ErrorCode.UNKNOWN, f"no {reason}")).startswith("no <class")


@pytest.mark.parametrize("code", DEAD)
def test_a_client_that_died_in_a_round_is_said_to_be_dead(federate: Federate, code: int) -> None:
    _, path = federate("experiment=toy_regression", "num_rounds=1", tamper=fail_with(code, "1", "train"))
    (line,) = read_lines(path, "train")
    assert line["failures"] == [{"client": "1", "reason": f"failed: {DEAD[code]}"}]


def test_a_node_that_died_before_it_said_who_it_is_is_refused_under_its_own_id(data_home: Path) -> None:
    settings = compose([f"home={data_home}", "experiment=toy_regression", "run_name=joining"])
    nodes = [{"partition-id": i, "num-partitions": 3} for i in range(3)]
    grid = LocalGrid({"config-json": to_json(settings)}, nodes, tamper=fail_with(5, "", "query.attest"))
    dead = next(iter(grid.nodes))
    real = grid.tamper
    assert real is not None
    grid.tamper = lambda asked, reply: real(asked, reply) if reply.metadata.src_node_id == dead else reply
    roster = Roster(_Asking(grid), ["0", "1", "2"], "joining", 0)
    roster.refresh()
    assert roster.refused == {f"node {dead}": DEAD[ErrorCode.NODE_UNAVAILABLE]}
    assert len(roster.members) == 2


class _Asking:
    """What a roster needs of a grid."""

    def __init__(self, grid: LocalGrid) -> None:
        self.get_nodes = grid.get_nodes
        self.grid = grid

    def send_and_receive(self, messages: list[Message], *, timeout: float) -> list[Message]:
        return list(self.grid.pull_messages(self.grid.push_messages(messages)))


# Federations


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """Return the folder of a federation of one client, whose SuperNode has started for a second time as node 8."""
    write_json(tmp_path / FACTS, Federation("t" * 32, "127.0.0.1:1", False, ("0",), None, False, 1).__dict__)
    (tmp_path / "client_0").mkdir()
    first = "INFO: SuperNode ID: 7\n"
    (tmp_path / "client_0" / LOG).write_text(f"{first}INFO: SuperNode ID: 8\n")
    superlink = {"pid": os.getpid(), "restarts": 0, "log_start": 0}
    programs = {SUPERLINK: superlink, "client_0": superlink | {"restarts": 1, "log_start": len(first)}}
    write_json(tmp_path / SEEN, {"pid": os.getpid(), "ready": True, "programs": programs})
    return tmp_path


def status_of(folder: Path, monkeypatch: pytest.MonkeyPatch, online: set[str]) -> int:
    """Ask for the status of a federation whose SuperLink says that these nodes are online."""
    with monkeypatch.context() as patch:
        patch.setattr(federation, "online_nodes", lambda *_: online)
        patch.setattr(federation, "find_supervisor", lambda _: psutil.Process())
        return federation.main(["status", "--folder", str(folder)])


def test_a_supernode_counts_as_online_by_its_present_process_only(
    described: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(described, monkeypatch, {"7", "8"}) == 0
    assert "1 of 1 SuperNodes online" in capsys.readouterr().out
    assert status_of(described, monkeypatch, {"7"}) == 1  # Flower has not noticed yet that the first one is dead
    out = capsys.readouterr().out
    assert "0 of 1 SuperNodes online" in out
    assert f"client_0   pid {os.getpid()} (not online)" in out


@pytest.mark.parametrize("pid", [None, 1 << 22])
def test_a_supernode_whose_process_is_dead_is_not_online_whatever_flower_says(
    described: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pid: int | None
) -> None:
    seen = json.loads((described / SEEN).read_text())
    seen["programs"]["client_0"]["pid"] = pid
    write_json(described / SEEN, seen)
    assert status_of(described, monkeypatch, {"7", "8"}) == 1
    assert "0 of 1 SuperNodes online" in capsys.readouterr().out


def test_a_federation_says_whether_it_was_taken_down_or_its_supervisor_killed(
    described: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal() -> str:
        assert federation.main(["status", "--folder", str(described)]) == 1
        return capsys.readouterr().err.removeprefix("error: ").strip()

    killed = f"the supervisor of {described} (pid {os.getpid()}) was killed and its programs have been stopped"
    assert refusal() == f"{killed}: bring it up"
    left = subprocess.Popen(SLEEP, env={TOKEN: "t" * 32})
    try:
        assert refusal() == (
            f"the supervisor of {described} is gone, and 1 of its processes still run (pids {left.pid}): "
            "take the federation down, then bring it up"
        )
    finally:
        left.kill()
        left.wait()
    (described / SEEN).unlink()
    assert refusal() == f"the federation of {described} is down: bring it up"


# The real thing


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Return a folder for temporary files whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="fo-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def tool(tmp_path: Path, temporary: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts one of our tools over a home of its own."""
    env = os.environ | {"FLAPP_HOME": str(tmp_path), "TMPDIR": str(temporary), "PYTHONPATH": str(APP)}

    def start(module: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"tools.{module}", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=pipe, stderr=pipe, text=True)

    return start


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a tool and return its exit status, and what it said."""
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def reached(path: Path, server_round: int) -> bool:
    """Say whether a run has completed a round."""
    return (path / "metrics.jsonl").exists() and any(
        line["round"] >= server_round for line in read_lines(path, "round")
    )


def check_end(tool: Callable[..., Any], path: Path, federate: Federate, *settings: str) -> None:
    """Run what was killed to its end, and check that it ends as if nothing had happened."""
    resume = ["resume=true"] if path.exists() else []
    status, said, error = finish(tool("run", *settings, f"run_name={path.name}", *resume))
    assert status == 0, error
    assert f"sha256 {federate(*settings)[0]['model_sha256']})\n" in said


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", "running"])
def test_a_killed_run_ends_within_seconds_and_is_resumed_to_the_same_bytes(
    tool: Callable[..., Any], tmp_path: Path, temporary: Path, federate: Federate, moment: str
) -> None:
    path = tmp_path / "runs" / "killed"
    run = tool("run", *TOY, ROUNDS, "run_name=killed")
    wait_for(lambda: list(temporary.glob("flapp-*-*")), 240)  # its SuperLink starts
    if moment == "running":
        wait_for(lambda: reached(path, random.randint(1, 20)), 240)
    else:
        time.sleep(random.uniform(0, 2))
    (folder,) = (each for each in temporary.iterdir() if (each / OWNER).exists())
    run.kill()
    wait_for(lambda: not Processes(str(folder), SWEEP).running() and not list(temporary.glob("flapp-*")), GONE_SECONDS)
    check_end(tool, path, federate, *TOY, ROUNDS)


@pytest.mark.slow
def test_an_orphan_without_a_guard_is_named_and_stopped(
    tool: Callable[..., Any], tmp_path: Path, temporary: Path, federate: Federate
) -> None:
    path = tmp_path / "runs" / "orphan"
    run = tool("run", *TOY, ROUNDS, "run_name=orphan")
    wait_for(lambda: reached(path, 2), 240)
    (guard,) = (child for child in psutil.Process(run.pid).children() if "tools.running.guard" in child.cmdline())
    pid = json.loads((path / run_lock.RUNNING).read_text())["pid"]
    try:
        guard.suspend()
        psutil.Process(pid).suspend()
        run.kill()
        run.wait()
        status, _, error = finish(tool("run", *TOY, ROUNDS, "run_name=orphan", "resume=true"))
        assert status == 1
        assert f"run_name=orphan is still running (pid {pid})" in error
        assert "`python -m tools.runs stop orphan`" in error
        status, said, error = finish(tool("runs", "stop", "orphan"))
        assert status == 0, error
        assert str(pid) in said
        wait_for(lambda: has_ended(pid), 30)
    finally:
        guard.resume()
    guard.wait(GONE_SECONDS)
    assert list(temporary.glob("flapp-*")) == []
    check_end(tool, path, federate, *TOY, ROUNDS)


@pytest.mark.slow
def test_stop_interrupts_a_run_as_ctrl_c_does(tool: Callable[..., Any], tmp_path: Path, temporary: Path) -> None:
    run = tool("run", *TOY, "num_rounds=1000", "run_name=stopped")
    wait_for(lambda: reached(tmp_path / "runs" / "stopped", 1), 240)
    status, said, error = finish(tool("runs", "stop", "stopped"))
    assert status == 0, error
    assert said.startswith(f"stopped stopped (pids {run.pid}, ")
    status, _, error = finish(run)
    assert status == 130
    assert error.splitlines()[-2] == "interrupted: everything that was started has been stopped"
    assert not list(temporary.glob("flapp-*"))


@pytest.mark.slow
def test_what_is_killed_in_a_federation_is_not_online_and_ends_with_its_supervisor(
    tool: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "federation"
    status, _, error = finish(tool("federation", "up", "--clients", "2"))
    assert status == 0, error
    processes = Processes(federation.read_federation(folder).token)
    try:

        def look() -> tuple[int, dict[str, Any]]:
            status, said, _ = finish(tool("federation", "status", "--json"))
            return status, json.loads(said)

        def healthy() -> bool:
            return look()[0] == 0

        supernode = psutil.Process(look()[1]["programs"]["client_1"]["pid"])
        supervisor = federation.find_supervisor(folder)
        assert supervisor is not None
        supervisor.suspend()  # or the SuperNode is back before anybody can look
        supernode.kill()
        status, facts = look()
        supervisor.resume()
        assert (status, facts["online"], facts["missing"]) == (1, 1, ["client_1"])
        wait_for(healthy, 240)  # as another node: Flower lists the dead one for up to a minute
        supernode = psutil.Process(look()[1]["programs"]["client_1"]["pid"])
        (superexec,) = (child for child in supernode.children() if "superexec" in child.cmdline())
        superexec.kill()
        supernode.wait(GONE_SECONDS)
        wait_for(healthy, 240)
        run = tool("run", "deployment=local", "clients=2", *TOY, "num_rounds=1000", "run_name=shared")
        wait_for(lambda: reached(tmp_path / "runs" / "shared", 1), 240)
        run.kill()
        run.wait()
        status, _, error = finish(tool("runs", "stop", "shared"))
        assert status == 0, error
        assert healthy()
        supervisor.kill()
        wait_for(lambda: not processes.running(), GONE_SECONDS)
        status, _, error = finish(tool("federation", "status"))
        assert (status, error.count("was killed and its programs have been stopped: bring it up")) == (1, 1)
        assert finish(tool("federation", "down"))[:2] == (0, "nothing was running\n")
    finally:
        processes.stop()
