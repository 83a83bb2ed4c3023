"""Who may reach a simulation: Ray asks for a token, and Flower's ports answer only the user who started them."""

import contextlib
import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import psutil
import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.superlink.grid import InMemoryGrid

from flapp import server_app
from tests.conftest import LocalGrid
from tests.support.networks import two_machines
from tests.support.projects import SLOW, write_task
from tests.support.strangers import as_stranger, get, listening, needs_root
from tests.support.waiting import WAIT_SECONDS, wait_for
from tools.deployment import superlink
from tools.deployment.processes import HOST, TOKEN, Processes, SuperLinkError, environment
from tools.deployment.submit import APP
from tools.deployment.superlink import PrivateSuperLink, SuperLink, ray_environment

VICTIM, ATTACKER = "10.231.77.1", "10.231.77.2"
ATTACK = Path(__file__).parents[1] / "support" / "ray_attack.py"
RAY_METHODS = (
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/FreeObjects",
    "/ray.rpc.CoreWorkerService/PushTask",
)


def submit_app(port: int, fab: bytes) -> str:
    """Submit an app to a SuperLink as `flwr run` does."""
    client = ControlHttpClient.from_server_address(f"{HOST}:{port}", True, None, [])
    app = Fab(hash_str=hashlib.sha256(fab).hexdigest(), content=fab)
    return str(client.StartRun(StartRunRequest(fab=app)))


def ray_answers(addresses: list[tuple[str, int]]) -> dict[tuple[str, int], set[str]]:
    """Return how ports of Ray answer callers that have no token, as status codes; empty for what is not gRPC.

    All are asked at once, because a port that is not gRPC lets its caller wait.
    """

    def ask(address: tuple[str, int], method: str) -> str:
        with grpc.insecure_channel("{}:{}".format(*address)) as channel:
            try:
                channel.unary_unary(method)(b"", timeout=60)
                return "OK"
            except grpc.RpcError as error:
                return str(error.code().name)  # type: ignore[attr-defined]

    questions = list(itertools.product(addresses, RAY_METHODS))
    answers: dict[tuple[str, int], set[str]] = {address: set() for address in addresses}
    with ThreadPoolExecutor(len(questions)) as threads:
        for (address, _), code in zip(questions, threads.map(ask, *zip(*questions, strict=True)), strict=True):
            answers[address] |= {code} - {"UNIMPLEMENTED", "UNAVAILABLE"}
    return answers


def test_a_ray_without_tokens_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "version", lambda _: "2.51.2")
    with pytest.raises(SuperLinkError, match=r"^Ray 2.51.2 would run code .*install Ray 2.52.0 or later \(pip.*\)$"):
        PrivateSuperLink()
    monkeypatch.setattr(superlink, "version", lambda _: "2.52.0")
    assert ray_environment(None)["RAY_AUTH_MODE"] == "token"


def test_every_simulation_has_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the user's own cluster")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    started = [PrivateSuperLink(), PrivateSuperLink()]
    for each in started:
        each.stop()
    assert [each.env["RAY_AUTH_MODE"] for each in started] == ["token"] * 2
    tokens = {each.env["RAY_AUTH_TOKEN"] for each in started}
    assert len(tokens) == 2
    assert {len(token) for token in tokens} == {64}


def test_flowers_hidden_grpc_ports_stay_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hidden = ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API")
    for name in hidden:
        monkeypatch.setenv(name, "1")
    assert not environment(tmp_path, "token").keys() & set(hidden)


def test_a_shared_ray_cluster_gets_the_users_token_and_one_without_is_warned_of_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/keys/ray"}
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    link = PrivateSuperLink(ray_address="first:6379")
    link.stop()
    assert {key: value for key, value in link.env.items() if key.startswith("RAY_AUTH")} == given
    assert link.env["RAY_ADDRESS"] == "first:6379"
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("RAY_AUTH_MODE")
    PrivateSuperLink(ray_address="first:6379").stop()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the Ray cluster at first:6379 may run code from anybody who reaches it")
    assert "RAY_AUTH_MODE=token" in line


def test_the_server_app_warns_of_a_simulation_whose_ray_asks_for_no_token(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flapp.server_app.log", lambda level, text: caplog.records.append(text))
    simulation = InMemoryGrid.__new__(InMemoryGrid)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    server_app.warn_of_open_ray(LocalGrid({}, []))
    assert caplog.records == []
    server_app.warn_of_open_ray(simulation)
    (text,) = caplog.records
    assert "use python -m tools.run, or start Flower's SuperLink with RAY_AUTH_MODE=token" in str(text)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    server_app.warn_of_open_ray(simulation)
    assert len(caplog.records) == 1


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return the settings of a run that lasts."""
    folder = write_task(tmp_path_factory.mktemp("slow"), SLOW)
    words = ("run_name=long", "experiment=toy_regression", "train.steps=20000", f"code={folder}")
    return (*words, "train.loss=task:loss", "deployment=simulation", "deployment.total_cpus=1")


@pytest.fixture(scope="module")
def namespaces() -> Iterator[tuple[str, str]]:
    """Return two network namespaces, a simulation's and an attacker's, that see each other and nothing else."""
    with two_machines(VICTIM, ATTACKER, is_routed=True) as names:  # Ray takes the address of its route for its own
        yield names


@pytest.fixture(scope="module")
def raylet(
    namespaces: tuple[str, str], long: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[psutil.Process]:
    """Return Ray's own process of a simulation that runs in a network namespace."""
    home = tmp_path_factory.mktemp("home")
    env = os.environ | {"FLAPP_HOME": str(home), "PYTHONPATH": str(APP)}
    command = ["ip", "netns", "exec", namespaces[0], sys.executable, "-m", "tools.run", *long]
    run = subprocess.Popen(command, cwd=home, env=env, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: run.poll() is not None or (home / "runs" / "long" / "progress.json").exists())
        assert run.poll() is None
        yield wait_for(lambda: find_raylet(psutil.Process(run.pid)))
    finally:
        run.terminate()
        run.wait(WAIT_SECONDS)


def find_raylet(parent: psutil.Process) -> psutil.Process | None:
    """Return Ray's own process below a run, whose command line names the cluster's address."""
    for process in parent.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "raylet":
                return process
    return None


def attack(namespace: str, raylet: psutil.Process, folder: Path, **env: str) -> str:
    """Run code in a Ray cluster from another machine; return the network namespace that it ran in, or the error."""
    (address,) = (word.removeprefix("--gcs-address=") for word in raylet.cmdline() if word.startswith("--gcs-address="))
    assert address.startswith(f"{VICTIM}:")
    command = ["ip", "netns", "exec", namespace, sys.executable, str(ATTACK), address, ATTACKER, str(folder)]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    done = subprocess.run(command, env=kept | env, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr + done.stdout


@pytest.mark.slow
@needs_root
def test_no_port_of_a_simulation_serves_another_user(raylet: psutil.Process) -> None:
    as_another = partial(as_stranger, network=f"/proc/{raylet.pid}/ns/net")
    as_root = partial(as_another, user=0)
    ports = as_root(listening, Processes(raylet.environ()[TOKEN]).running())
    (port,) = (port for host, port in ports if host == HOST)
    assert "403 Forbidden" in as_another(submit_app, port, build_fab_from_disk(APP))
    assert as_another(get, port)[0] == 403
    link = SuperLink(f"{HOST}:{port}")
    assert len(as_root(link.flwr, "list")["runs"]) == 1
    link.stop()
    open_to_all = {(HOST, port): name for (host, port), name in ports.items() if host == "::"}
    assert set(open_to_all.values()) >= {"gcs_server", "raylet"}
    assert set.union(*as_another(ray_answers, list(open_to_all)).values()) == {"UNAUTHENTICATED"}


@pytest.mark.slow
@needs_root
def test_code_from_another_machine_runs_in_a_simulation_only_with_its_token(
    namespaces: tuple[str, str], raylet: psutil.Process, tmp_path: Path
) -> None:
    inside = os.readlink(f"/proc/{raylet.pid}/ns/net")
    right = {key: value for key, value in raylet.environ().items() if key.startswith("RAY_AUTH")}
    tokens = ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, right)

    def try_with(number: int) -> str:
        return attack(namespaces[1], raylet, tmp_path / str(number), **tokens[number])

    with ThreadPoolExecutor(2) as threads:
        refused, answer = threads.map(try_with, range(2))
    assert answer == inside
    assert inside not in refused
    assert "InvalidAuthToken" in refused, refused


@pytest.mark.slow
@needs_root
def test_the_token_of_a_simulation_stands_in_no_command_line_and_no_file(raylet: psutil.Process) -> None:
    env = raylet.environ()
    token, folder, home = env["RAY_AUTH_TOKEN"].encode(), Path(env[TOKEN]), Path(env["FLAPP_HOME"])
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert token not in process.read_bytes()
    assert folder.stat().st_mode & 0o777 == 0o700
    read = {}
    for path in [*folder.rglob("*"), *home.rglob("*")]:
        with contextlib.suppress(FileNotFoundError):  # the run goes on, and replaces files
            if path.is_file() and not path.is_symlink():
                read[path] = path.read_bytes()
    assert folder / "superlink.log" in read
    assert [path for path, content in read.items() if token in content] == []


@pytest.mark.slow
@needs_root
def test_a_simulation_whose_command_is_killed_ends_by_itself(raylet: psutil.Process) -> None:
    folder = raylet.environ()[TOKEN]
    processes = Processes(folder)
    assert raylet in processes.running()
    (command,) = (each for each in raylet.parents() if "tools.run" in each.cmdline())
    command.kill()
    wait_for(lambda: not processes.running() and not Path(folder).exists())
