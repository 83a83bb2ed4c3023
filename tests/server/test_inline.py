"""deployment=inline: clients in worker processes, or in this one; whatever dies, a run ends in the same bytes."""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, Message
from flwr.common.constant import ErrorCode

from flapp.config.load import compose
from flapp.config.schema import ConfigError
from flapp.groups import cut
from flapp.messages import describe_error, views
from flapp.server.inline import CLIENT_APP, SERVER_NODE, InlineGrid, start_forkserver
from flapp.server.shared_arrays import LEAST_BYTES
from tests.conftest import Federate, read_lines, run_app
from tests.support.commands import PYTORCHS, SECONDS, in_shared_memory, left_running, starting_runs
from tests.support.inline_app import say
from tests.support.waiting import wait_for
from tools.deployment.submit import RunError, run_once
from tools.running import inline
from tools.running.stop import stop_run

Start = Callable[..., InlineGrid]
TOY = "experiment=toy_regression"
LONG = (TOY, "num_rounds=60", "evaluate.every=60")
NODE = {"partition-id": 0, "num-partitions": 1}
FIRST = SERVER_NODE + 1  # the id of the first node


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts a grid with so many workers, of the tests' client app unless told otherwise."""
    start_forkserver(CLIENT_APP)
    grids = []

    def make(workers: int, **settings: Any) -> InlineGrid:
        grids.append(InlineGrid({}, [NODE], workers, **{"client_app": "tests.support.inline_app"} | settings))
        return grids[-1]

    yield make
    for grid in grids:
        grid.close()


def model(megabytes: float = 0.2) -> ArrayRecord:
    values = np.random.default_rng(0).random(int(megabytes * 1e6 / 8))
    return ArrayRecord({"w": Array(values), "scalar": Array(np.array(7)), "empty": Array(np.empty((0, 3), np.float32))})


def ask(grid: InlineGrid, *messages: Message, timeout: float = SECONDS) -> list[Message]:
    """Send messages and return the replies in their order."""
    replies = {reply.metadata.reply_to_message_id: reply for reply in grid.send_and_receive(messages, timeout=timeout)}
    return [replies[each.metadata.message_id] for each in messages if each.metadata.message_id in replies]


def pid_of(reply: Message) -> int:
    return int(reply.content.metric_records["process"]["pid"])  # type: ignore[arg-type]


# Messages and workers


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bytes_of_model", [80, 4 * LEAST_BYTES])
def test_a_model_arrives_and_comes_back_as_it_was_sent(start: Start, workers: int, bytes_of_model: int) -> None:
    sent = model(bytes_of_model / 1e6)
    before = {key: values.copy() for key, values in views(sent).items()}
    for reply in ask(start(workers), *(say(FIRST, "work", sent) for _ in range(4))):
        found = views(reply.content.array_records["arrays"])
        assert found.keys() == before.keys()
        assert all(np.array_equal(found[key], before[key]) for key in before)
        assert all(found[key].dtype == before[key].dtype for key in before)


def test_a_model_is_written_once_for_all_messages_that_carry_it(start: Start) -> None:
    grid, first = start(2), model()
    for _ in range(2):
        ask(grid, *(say(FIRST, "work", first) for _ in range(6)))
        assert grid.blocks_made == 1
    first["w"] = Array(np.zeros(LEAST_BYTES))
    (reply,) = ask(grid, say(FIRST, "work", first))
    assert not views(reply.content.array_records["arrays"])["w"].any()
    ask(grid, *(say(FIRST, "work", model()) for _ in range(2)))
    assert grid.blocks_made == 4
    ask(grid, say(FIRST, "work", model(1e-4)))
    assert grid.blocks_made == 4  # small models take no shared memory


@pytest.mark.parametrize("workers", [0, 1])
def test_a_client_that_changes_what_it_received_changes_nothing_of_the_servers(start: Start, workers: int) -> None:
    grid, sent = start(workers), model()
    _, after = ask(grid, say(FIRST, "change", sent), say(FIRST, "work", sent))
    assert set(sent) == {"w", "scalar", "empty"}
    assert set(after.content.array_records["arrays"]) == {"w", "scalar", "empty"}


@pytest.mark.slow
def test_descriptors_and_mappings_are_closed_when_replies_are_gone(start: Start) -> None:
    grid, process = start(2), psutil.Process()
    ask(grid, *(say(FIRST, "work", model()) for _ in range(4)))
    before = process.num_fds()
    for _ in range(5):
        ask(grid, *(say(FIRST, "work", model()) for _ in range(4)))
    assert process.num_fds() <= before
    grid.close()
    gc.collect()  # of other tests, whose replies Flower's dictionaries hold in cycles
    assert "memfd:flapp" not in Path("/proc/self/maps").read_text()


def test_a_worker_that_dies_loses_only_the_message_it_was_handling(start: Start) -> None:
    grid = start(2)
    pids = {pid_of(reply) for reply in ask(grid, *(say(FIRST, "work") for _ in range(8)))}
    assert len(pids) == 2  # messages go to whichever is free
    assert os.getpid() not in pids
    replies = ask(grid, *(say(FIRST, action) for action in ("work", "exit", "work", "work", "exit", "work")))
    assert [reply.has_error() for reply in replies] == [False, True, False, False, True, False]
    assert replies[1].error.code == ErrorCode.CLIENT_APP_CRASHED
    assert describe_error(replies[1].error) == "its process ended before it answered (killed, or out of memory)"
    assert len(psutil.Process().children(recursive=True)) >= 2


def test_a_worker_goes_on_when_its_client_raises_or_at_ctrl_c_and_is_replaced_when_killed_or_no_longer_waited_for(
    start: Start,
) -> None:
    grid = start(1)
    first, failed, last = ask(grid, say(FIRST, "work"), say(FIRST, "raise"), say(FIRST, "work"))
    assert (failed.error.code, failed.error.reason) == (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "OSError: no disk")
    assert pid_of(first) == pid_of(last)
    for process in psutil.Process().children(recursive=True):
        process.send_signal(signal.SIGINT)  # as a terminal does with Ctrl-C, which is for this process only
    (again,) = ask(grid, say(FIRST, "work"))
    assert pid_of(again) == pid_of(first)
    os.kill(pid_of(last), signal.SIGKILL)  # while it is idle
    wait_for(lambda: not grid._workers[0].process.is_alive(), SECONDS)
    (second,) = ask(grid, say(FIRST, "work"))
    assert pid_of(second) != pid_of(first)
    assert ask(grid, say(FIRST, "hang"), say(FIRST, "work"), timeout=0.3) == []
    (third,) = ask(grid, say(FIRST, "work"))
    assert pid_of(third) != pid_of(second)


def test_what_a_worker_prints_goes_to_the_log_and_never_to_the_terminal(
    start: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(start(1, log_file=tmp_path / "log.txt"), say(FIRST, "print"))
    assert (tmp_path / "log.txt").read_text().splitlines()[0] == "printed by a client"
    out, err = capfd.readouterr()
    assert "printed" not in out + err
    assert "stderr" not in out + err


def test_without_workers_a_breakpoint_stops_in_the_main_thread_of_this_process(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[tuple[int, bool]] = []
    here = threading.main_thread()
    hook = lambda: reached.append((os.getpid(), threading.current_thread() is here))  # noqa: E731
    monkeypatch.setattr(sys, "breakpointhook", hook)
    ask(start(0), say(FIRST, "break"))
    assert reached == [(os.getpid(), True)]


@pytest.mark.slow
@pytest.mark.parametrize("clients", [3, 70])
def test_a_worker_killed_in_a_round_costs_its_clients_that_round_by_name(
    start: Start, tmp_path: Path, clients: int
) -> None:
    words = (f"clients={clients}", "partition.min_size=1", "checkpoint=off", "num_rounds=3")
    settings = compose([TOY, f"home={tmp_path}", "run_name=killed", *words])
    summary, path = run_app(settings, start(2))
    assert (summary["status"], summary["rounds"]) == ("finished", 3)
    named = {line["round"]: line["failures"] for line in read_lines(path, "train")}
    assert named[1] == named[3] == []
    assert tuple(failure["client"] for failure in named[2]) in cut(sorted(map(str, range(clients))))
    reason = "failed: its process ended before it answered (killed, or out of memory)"
    assert {failure["reason"] for failure in named[2]} == {reason}


# Settings


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["deployment=simulation", "deployment.workers=2"], "workers=2 is for deployment=inline: leave it out, or"),
        (["deployment.port=9000"], "port=9000 is for deployment=simulation: add deployment=simulation"),
        (["deployment.ray_address=a:1"], "ray_address=a:1 is for deployment=simulation: add deployment=simulation"),
        (["deployment.address=a:1"], "address=a:1 is for deployment=local: add deployment=local"),
    ],
)
def test_settings_of_another_runtime_are_refused_with_the_one_they_are_for(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=f"deployment.{said}"):
        compose(["home=/nowhere", TOY, *words])


@pytest.mark.parametrize(
    ("words", "gpus", "workers"),
    [
        ([], 0, 4),
        (["clients=3"], 0, 3),  # no more than a round has messages
        (["deployment.workers=0"], 0, 0),
        (["deployment.workers=7"], 0, 7),
        (["deployment.total_cpus=3"], 0, 3),
        (["deployment.client_cpus=2"], 0, 2),
        (["deployment.client_gpus=0.5"], 1, 2),
        (["deployment.client_gpus=0.5", "deployment.workers=1"], 1, 1),
        (["deployment.client_gpus=2"], 4, 2),
    ],
)
def test_there_are_as_many_workers_as_processors_and_gpus_allow_unless_their_number_is_given(
    monkeypatch: pytest.MonkeyPatch, words: list[str], gpus: int, workers: int
) -> None:
    monkeypatch.setattr("tools.deployment.submit.available_cpus", lambda: 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert inline.count_workers(compose(["home=/nowhere", TOY, "clients=40", *words])) == workers


def test_more_workers_than_the_gpus_have_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    settings = compose(["home=/nowhere", TOY, "deployment.client_gpus=0.5", "deployment.workers=3"])
    with pytest.raises(
        ConfigError, match="client_gpus=0.5 of a GPU, and this machine has 1 GPU: .*workers=2, or lower"
    ):
        inline.count_workers(settings)


@pytest.mark.parametrize(
    ("share", "workers", "devices"),
    [(0.0, 2, None), (0.5, 4, ["0", "0", "1", "1"]), (1.0, 2, ["0", "1"]), (2.0, 1, ["0,1"])],
)
def test_workers_are_dealt_out_over_the_gpus(
    monkeypatch: pytest.MonkeyPatch, share: float, workers: int, devices: list[str] | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    settings = compose(["home=/nowhere", TOY, f"deployment.client_gpus={share}"])
    assert inline.find_devices(settings, workers) == devices


# The command


@pytest.mark.parametrize(
    ("words", "needed"),
    [("", []), ("model=vit_tiny dataset=digits", ["flapp.model.vit"]), ("train.compile=true", ["torch._dynamo"])],
)
def test_workers_are_forked_from_a_process_with_what_their_settings_need(
    monkeypatch: pytest.MonkeyPatch, words: str, needed: list[str]
) -> None:
    started: list[str] = []
    monkeypatch.setattr(inline, "start_forkserver", lambda *names: started.extend(names))
    inline.prepare(compose(["home=/nowhere", *([TOY] if "model" not in words else []), *words.split()]))
    assert started == [CLIENT_APP, *needed]


def test_a_temporary_folder_with_too_long_a_path_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = "/tmp/" + "x" * 70
    monkeypatch.setattr("tempfile.tempdir", folder)
    with pytest.raises(ConfigError, match=f"temporary folder {folder} is too long .*set TMPDIR"):
        inline.prepare(compose(["home=/nowhere", TOY]))
    inline.prepare(compose(["home=/nowhere", TOY, "deployment.workers=0"]))


@pytest.fixture
def start_run(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts tools.run with a home and a temporary folder of its own."""
    with starting_runs(tmp_path) as start:
        yield start


@pytest.mark.slow
@pytest.mark.parametrize(("how", "workers"), [("Ctrl-C", 2), ("runs stop", 0)])  # test_runtimes.py kills
def test_a_run_that_is_ended_leaves_nothing_and_is_resumed_to_the_same_bytes(
    start_run: Callable[..., Any], tmp_path: Path, federate: Federate, how: str, workers: int
) -> None:
    path = tmp_path / "runs" / "ended"
    process = start_run(*LONG, "run_name=ended", f"deployment.workers={workers}", start_new_session=True)
    metrics = path / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"round": 3' in metrics.read_text(), SECONDS)
    processes = left_running(tmp_path)
    assert len(processes) >= (4 if workers else 1)  # the command, the fork server and two workers
    assert not [each for process in processes for each in process.net_connections("inet")]
    shared = in_shared_memory(processes)
    if how == "runs stop":
        assert process.pid in (stop_run(path) or ())
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=SECONDS)
    assert how == "runs stop" or process.returncode == 130  # stop_run has read it, as only a parent can
    error, hint = said.splitlines()[-2:]
    assert error == "interrupted: everything that was started has been stopped"
    assert "run_name=ended resume=true" in hint
    assert not (path / "running.json").exists()
    wait_for(lambda: not left_running(tmp_path), SECONDS)
    assert not shared & set(os.listdir("/dev/shm"))
    wait_for(lambda: {each.name for each in (tmp_path / "tmp").iterdir()} <= PYTORCHS, SECONDS)
    resumed, _ = federate(*LONG, f"home={tmp_path}", "run_name=ended", "resume=true")
    assert resumed["model_sha256"] == federate(*LONG)[0]["model_sha256"]


def test_an_exception_of_a_client_is_in_the_log_with_its_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("train.lr=1e30", "train.steps=50", "deployment.workers=1")
    said = r"^round 1: clients 0 to 2: .*lower train.lr.*0 of 3 clients gave a valid train.*$"
    with pytest.raises(RunError, match=said):
        run_once(compose([TOY, f"home={tmp_path}", "run_name=bad", *words]))
    assert "Traceback" not in "".join(capfd.readouterr())
    log = (tmp_path / "runs" / "bad" / "log.txt").read_text()
    assert "Traceback (most recent call last)" in log
    assert 'flapp/training.py", line ' in log
    assert "FloatingPointError" in log
    assert "\x1b" not in log
