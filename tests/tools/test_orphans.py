"""What a killed command leaves running ends by itself, is named until then, and can be stopped."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from flapp.config.load import compose, to_json
from flapp.config.schema import ConfigError
from flapp.files import write_json
from flapp.messages import describe_error
from flapp.server import run_names
from flapp.server.roster import Roster
from flapp.server.run_dir import RunDirectory
from tests.conftest import Federate, LocalGrid, read_lines, run_app
from tests.support.commands import left_running
from tests.support.federations import nodes
from tests.support.waiting import wait_for
from tools import runs
from tools.deployment.processes import OWNER, SWEEP, TOKEN, Processes, note_process, noted_process
from tools.deployment.submit import APP, run_once
from tools.running.guard import guarded
from tools.running.run_entries import RunsError
from tools.running.stop import stop_run

Start = Callable[..., subprocess.Popen[str]]
TOY = (
    *("experiment=toy_regression", "evaluate.every=20", "num_rounds=20"),
    *("deployment=simulation", "deployment.total_cpus=1"),
)
GONE_SECONDS = 60  # generous, for a busy machine: it takes about 7


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts a program from our checkout; it is killed afterwards."""
    started: list[subprocess.Popen[str]] = []

    def run(*command: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        program = subprocess.Popen(command, cwd=APP, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        started.append(program)
        return program

    yield run
    for program in started:
        program.kill()
        program.communicate()


def start_python(start: Start, code: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start a script that prints `ready` when it is."""
    program = start(sys.executable, "-c", code, *arguments, env=os.environ | variables)
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    return program


def sleep_with(start: Start, variable: str, token: object) -> subprocess.Popen[str]:
    """Start a program that only carries a token."""
    return start("sleep", "600", env={variable: str(token)})


# The guard

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


@pytest.mark.slow
def test_a_killed_program_leaves_no_process_and_no_folder(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "flapp-x"
    for each in (folder, tmp_path / "flapp-x-superlink", tmp_path / "another"):
        each.mkdir()
    stranger = sleep_with(start, "FLAPP_ORPHAN", tmp_path / "another")
    program = start_python(start, GUARDED, str(folder))
    started = Processes(str(folder), "FLAPP_ORPHAN")
    wait_for(lambda: len(started.running()) >= 2)  # a program has no environment for a moment as it starts
    program.kill()
    _, said = program.communicate(timeout=GONE_SECONDS)  # to the guard's last word
    assert started.running() == []
    assert [each.name for each in tmp_path.iterdir()] == ["another"]
    assert said.startswith(f"pid {program.pid} was killed; its guard stopped the ")
    assert stranger.poll() is None


def test_a_guard_touches_nothing_if_its_program_ends_by_itself(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    began = time.monotonic()
    with guarded("FLAPP_ORPHAN", str(folder), folder):
        child = sleep_with(start, "FLAPP_ORPHAN", folder)
        if (pid := os.fork()) == 0:
            time.sleep(600)
            os._exit(0)
    assert time.monotonic() - began < GONE_SECONDS  # the guard has not waited for the fork
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert child.poll() is None
    assert folder.exists()


# Runs that are still running

HOLDER = """
import sys, time
from pathlib import Path
from flapp.server import run_names
path = Path(sys.argv[1])
file = run_names.lock_run(path, "x")
run_names.name_holder(path, 17)
print("ready", flush=True)
time.sleep(600)
"""
COMMAND = """
import signal, sys
from pathlib import Path
from tools.deployment.processes import note_process
note = Path(sys.argv[1])
def interrupt(*_):
    note.with_name("interrupted").touch()
    sys.exit()
signal.signal(signal.SIGTERM, interrupt)
note_process(note)
print("ready", flush=True)
input()
"""


@pytest.fixture
def running(data_home: Path, request: pytest.FixtureRequest) -> Iterator[RunDirectory]:
    """Return the directory of a run that this process writes."""
    name = f"run_name=orphan-{request.node.name[:40]}"
    run = RunDirectory.create(compose([f"home={data_home}", *TOY, name]), run_id=17)
    yield run
    run.close()


@pytest.fixture
def orphan(running: RunDirectory, start: Start, tmp_path: Path) -> Callable[[object], subprocess.Popen[str]]:
    """Return a function that starts a process which holds a run, with this token in its environment."""
    running.close()
    return lambda token: start_python(start, HOLDER, str(running.path), **{TOKEN: str(token), SWEEP: str(tmp_path)})


def test_a_run_that_still_runs_is_named_with_its_process_and_the_command_that_stops_it(running: RunDirectory) -> None:
    fix = f"python -m tools.runs stop {running.config.run_name}`"
    with pytest.raises(ConfigError, match=rf"is still running \(pid {os.getpid()}\).*{fix}"):
        run_names.lock_run(running.path, running.config.run_name)
    assert run_names.find_holder(running.path) == {"pid": os.getpid(), "run_id": 17}
    left = (running.path / run_names.RUNNING).read_text()
    running.close()
    assert not (running.path / run_names.RUNNING).exists()
    (running.path / run_names.RUNNING).write_text(left)  # as after a kill: it counts for nothing
    assert run_names.find_holder(running.path) is None
    run_names.lock_run(running.path, "x").close()


def test_a_look_at_a_run_does_not_keep_its_next_start_out(running: RunDirectory) -> None:
    running.close()
    with (running.path / run_names.METRICS).open() as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        threading.Timer(run_names.PROBE_SECONDS / 3, lambda: fcntl.flock(looker, fcntl.LOCK_UN)).start()
        run_names.lock_run(running.path, "x").close()


@pytest.fixture(autouse=True)
def kill_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill what does not end after half a second."""
    monkeypatch.setattr("tools.deployment.processes.STOP_SECONDS", 0.5)


def test_stop_ends_an_orphan_with_all_that_carries_its_token_and_says_how_to_continue(
    running: RunDirectory, orphan: Any, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "flapp-x"
    token.mkdir()
    process, superlink = orphan(token), sleep_with(start, TOKEN, token)
    process.send_signal(signal.SIGSTOP)
    name, home = running.config.run_name, running.config.home
    assert runs.main(["stop", name, "--home", home]) == 0
    stopped, advice = capsys.readouterr().out.splitlines()
    assert stopped.startswith(f"stopped {name} (pids ")
    assert {str(process.pid), str(superlink.pid)} <= set(stopped.rstrip(")").replace(",", "").split())
    assert advice.endswith(f"run_name={name} resume=true")
    assert (process.wait(GONE_SECONDS), superlink.wait(GONE_SECONDS)) != (None, None)
    assert not token.exists()
    assert runs.main(["stop", name, "--home", home]) == 0
    assert capsys.readouterr().out == f"{name} is not running\n"


def test_stop_interrupts_the_command_if_it_still_runs_even_suspended(
    running: RunDirectory, orphan: Any, start: Start, tmp_path: Path
) -> None:
    owner = start_python(start, COMMAND, str(tmp_path / OWNER))
    owner.send_signal(signal.SIGSTOP)
    process = orphan(tmp_path / "flapp-x")
    assert stop_run(running.path) == [owner.pid, process.pid]
    assert (tmp_path / "interrupted").exists()


def test_stop_kills_nobody_whose_pid_running_json_names_by_mistake(
    running: RunDirectory, orphan: Any, start: Start, tmp_path: Path
) -> None:
    process, stranger = orphan(tmp_path / "flapp-x"), sleep_with(start, TOKEN, tmp_path / "flapp-x")
    write_json(running.path / run_names.RUNNING, {"pid": stranger.pid, "run_id": 17})
    with pytest.raises(RunsError, match=rf"process {stranger.pid}, named in running.json, does not .* `fuser "):
        stop_run(running.path)
    assert (process.poll(), stranger.poll()) == (None, None)


def test_stop_leaves_the_other_processes_of_a_shared_superlink_alone(running: RunDirectory, orphan: Any) -> None:
    process = orphan("0123456789abcdef" * 2)  # a federation's token
    with pytest.raises(RunsError, match="not started by flapp: stop it with `flwr stop 17`"):
        stop_run(running.path)
    assert process.poll() is None


def test_a_new_process_with_a_noted_pid_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    note_process(tmp_path / "note")
    assert noted_process(tmp_path / "note") == psutil.Process()
    pid, began = json.loads((tmp_path / "note").read_text())
    (tmp_path / "note").write_text(json.dumps([pid, began - 60]))
    assert noted_process(tmp_path / "note") is None
    assert noted_process(tmp_path / "no note") is None


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

WORDS = "Error: some words of Flower's"
DEAD = {
    ErrorCode.NODE_UNAVAILABLE: "its node stopped answering (killed, out of memory, or disconnected)",
    ErrorCode.MESSAGE_UNAVAILABLE: "its node left the federation, or did not answer before the message expired",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its answer expired before it could be read",
    ErrorCode.CLIENT_APP_CRASHED: "its process ended before it answered (killed, or out of memory)",
    ErrorCode.UNKNOWN: WORDS,
}


def test_errors_of_flower_and_ray_say_in_plain_words_that_a_client_died() -> None:
    assert {code: describe_error(Error(code, WORDS)) for code in DEAD} == DEAD
    for name in ("ActorDied", "OutOfMemory", "WorkerCrashed"):
        reason = (
            f"<class 'ray.exceptions.{name}Error'>:<'The actor died unexpectedly before finishing this task.\n...'>"
        )
        assert describe_error(Error(ErrorCode.UNKNOWN, reason)) == DEAD[ErrorCode.CLIENT_APP_CRASHED]
        assert describe_error(Error(ErrorCode.UNKNOWN, f"no {reason}")).startswith("no <class")


def test_a_node_that_died_before_it_said_who_it_is_is_refused_under_its_own_id(data_home: Path) -> None:
    settings = compose([f"home={data_home}", "experiment=toy_regression", "run_name=joining"])
    grid = LocalGrid({"config-json": to_json(settings)}, nodes(3))
    dead = next(iter(grid.nodes))

    def answer(reply: Message) -> Message:
        """Return the reply, or Flower's own answer for the dead node, which comes from the SuperLink."""
        if reply.metadata.src_node_id != dead:
            return reply
        answer = Message(Error(ErrorCode.NODE_UNAVAILABLE, WORDS), reply_to=reply)
        answer.metadata.__dict__["_src_node_id"] = 1
        answer.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
        return answer

    def ask(messages: list[Message], *, timeout: float) -> list[Message]:
        return [answer(reply) for reply in grid.pull_messages(grid.push_messages(messages))]

    asking: Any = SimpleNamespace(get_nodes=grid.get_nodes, send_and_receive=ask)
    roster = Roster(asking, ["0", "1", "2"], 0)
    roster.refresh()
    assert roster.refused == {f"node {dead}": DEAD[ErrorCode.NODE_UNAVAILABLE]}
    assert len(roster.members) == 2


# The real thing


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Return a folder for temporary files whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="fo-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def tool(start: Start, tmp_path: Path, temporary: Path) -> Start:
    """Return a function that starts one of our tools over a home of its own."""
    env = os.environ | {"FLAPP_HOME": str(tmp_path), "TMPDIR": str(temporary)}
    return lambda module, *arguments: start(sys.executable, "-m", f"tools.{module}", *arguments, env=env)


def reached(path: Path, server_round: int) -> bool:
    """Say whether a run has completed a round."""
    return (path / "metrics.jsonl").exists() and any(
        line["round"] >= server_round for line in read_lines(path, "round")
    )


@pytest.mark.slow
def test_a_run_killed_while_starting_ends_by_itself_and_one_whose_guard_sleeps_is_named_stopped_and_resumed(
    tool: Start, tmp_path: Path, temporary: Path, federate: Federate, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs" / "killed"
    words = ("run", *TOY, "run_name=killed")

    def kill(run: subprocess.Popen[str]) -> None:
        run.kill()
        run.wait()

    def check_all_is_gone() -> None:
        wait_for(lambda: not left_running(tmp_path) and not list(temporary.glob("flapp-*")), GONE_SECONDS)

    run = tool(*words)
    wait_for(lambda: list(temporary.glob("flapp-*-*")))  # its SuperLink starts
    kill(run)
    check_all_is_gone()
    run = tool(*words, *(["resume=true"] if path.exists() else []))
    wait_for(lambda: reached(path, 1))
    (guard,) = (child for child in psutil.Process(run.pid).children() if "tools.running.guard" in child.cmdline())
    server = psutil.Process(json.loads((path / run_names.RUNNING).read_text())["pid"])
    resumed = compose([f"home={tmp_path}", *TOY, "run_name=killed", "resume=true"])
    try:
        guard.suspend()
        server.suspend()
        kill(run)
        with pytest.raises(ConfigError) as refused:
            run_once(resumed)
        assert f"run_name=killed is still running (pid {server.pid})" in str(refused.value)
        assert "`python -m tools.runs stop killed`" in str(refused.value)
        assert runs.main(["stop", "killed", "--home", str(tmp_path)]) == 0
        assert str(server.pid) in capsys.readouterr().out
    finally:
        guard.resume()
    check_all_is_gone()
    summary, _ = run_app(resumed, LocalGrid({}, nodes(resumed.clients)))
    assert summary["model_sha256"] == federate(*TOY)[0]["model_sha256"]
