"""Who may reach a simulation: Ray asks for a token, and Flower's ports answer only the user who started them."""

import contextlib
import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import psutil
import pytest
import uvicorn
from flwr.cli.build import build_fab_from_disk
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.superlink.grid import InMemoryGrid

from flapp import server_app
from tests.conftest import LocalGrid
from tools import owner_only, superlink
from tools.owner_only import OwnerOnly, find_user, protect
from tools.processes import HOST, TOKEN, SuperLinkError, environment
from tools.submit import APP
from tools.superlink import CONNECTION, PrivateSuperLink, ray_environment

WAIT_SECONDS = 240
STRANGER = 65534
LONG = ("experiment=toy_regression", "train.steps=20000", "num_rounds=200")
VICTIM, ATTACKER = "10.231.77.1", "10.231.77.2"
ATTACK = Path(__file__).with_name("ray_attack.py")
RAY_METHODS = (
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/FreeObjects",
    "/ray.rpc.CoreWorkerService/PushTask",
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acting as another user takes root")


def as_stranger(action: Callable[..., Any], *arguments: Any) -> Any:
    """Return what an action of another user of this machine returns, or the text of its error."""
    here, there = multiprocessing.Pipe()

    def act() -> None:
        os.setgroups([])
        os.setgid(STRANGER)
        os.setuid(STRANGER)
        try:
            there.send(action(*arguments))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test wants to see it
            there.send(f"{type(error).__name__}: {error}")

    process = multiprocessing.get_context("fork").Process(target=act)
    process.start()
    process.join(WAIT_SECONDS)
    assert here.poll()
    return here.recv()


def wait_for(condition: Callable[[], Any]) -> Any:
    """Wait until a condition holds, and return what it is."""
    end = time.monotonic() + WAIT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def get(port: int) -> tuple[int, str]:
    """Return the status and text of a server's answer."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def submit_app(port: int, fab: bytes) -> str:
    """Submit an app to a SuperLink as `flwr run` does."""
    client = ControlHttpClient.from_server_address(f"{HOST}:{port}", True, None, [])
    app = Fab(hash_str=hashlib.sha256(fab).hexdigest(), content=fab)
    return str(client.StartRun(StartRunRequest(fab=app)))


def send_and_leave(port: int) -> None:
    """Send a whole request and be gone."""
    with socket.create_connection((HOST, port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


def listening(processes: list[psutil.Process]) -> dict[tuple[str, int], str]:
    """Return the addresses that processes listen on, and the name of each process."""
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for each in process.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN:
                    found[tuple(each.laddr)] = process.name()
    return found


def ray_answers(host: str, port: int) -> set[str]:
    """Return the status codes with which a port of Ray answers callers that have no token; empty if it is not gRPC."""
    codes = set()
    for method in RAY_METHODS:
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            try:
                channel.unary_unary(method)(b"", timeout=30)
                codes.add("OK")
            except grpc.RpcError as error:
                codes.add(error.code().name)  # type: ignore[attr-defined]
    return codes - {"UNIMPLEMENTED", "UNAVAILABLE"}


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


def test_a_server_answers_its_owner(server: tuple[int, list[str]]) -> None:
    port, served = server
    assert get(port) == (200, "welcome")
    with socket.socket(socket.AF_INET6) as mapped:  # such a connection stands in /proc/net/tcp6
        mapped.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        mapped.connect((f"::ffff:{HOST}", port))
        mapped.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert mapped.recv(100).startswith(b"HTTP/1.1 200")
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
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 403"
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
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            return connection.recv(12)

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
        protect(owner_only.SUPERLINK)


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


def test_a_shared_ray_cluster_gets_the_users_token(
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


def test_a_shared_ray_cluster_without_a_token_is_warned_of_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
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


@pytest.mark.slow
@needs_root
def test_no_port_of_a_simulation_serves_another_user(tmp_path: Path) -> None:
    with PrivateSuperLink() as link:
        link.flwr("run", str(APP), CONNECTION, "-c", f'overrides="{" ".join(LONG)} home={tmp_path} run_name=long"')
        wait_for((tmp_path / "runs" / "long" / "progress.json").exists)
        ports = listening(link.processes.running())
        assert [address for address in ports if address[0] == HOST] == [(HOST, link.port)]
        said = as_stranger(submit_app, link.port, build_fab_from_disk(APP))
        assert "403 Forbidden" in said
        assert as_stranger(get, link.port)[0] == 403
        assert len(link.flwr("list")["runs"]) == 1
        answers = {name: as_stranger(ray_answers, HOST, port) for (host, port), name in ports.items() if host == "::"}
        assert answers.keys() >= {"gcs_server", "raylet"}
        assert set.union(*answers.values()) == {"UNAUTHENTICATED"}
    assert link.processes.running() == []


@pytest.mark.slow
@needs_root
def test_no_port_of_a_federation_without_tls_serves_another_user(tmp_path: Path) -> None:
    env = os.environ | {"FLAPP_HOME": str(tmp_path), "PYTHONPATH": str(APP)}

    def tool(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", *arguments], cwd=tmp_path, env=env, check=True, timeout=WAIT_SECONDS)

    tool("tools.federation", "up", "--clients", "1")
    try:
        ours = [each for each in psutil.process_iter() if env["FLAPP_HOME"] == environment_of(each).get("FLAPP_HOME")]
        ports = listening(ours)
        assert len(ports) == 2  # the SuperLink's and the SuperNode's
        assert {host for host, _ in ports} == {HOST}
        assert {as_stranger(get, port)[0] for _, port in ports} == {403}
        assert {get(port)[0] for _, port in ports} == {404}
        tool("tools.run", "deployment=local", "experiment=toy_regression", "clients=1", "num_rounds=1")
    finally:
        tool("tools.federation", "down")


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Return the environment that a process was started with, or nothing where that cannot be read."""
    with contextlib.suppress(psutil.Error, OSError):
        return process.environ()
    return {}


def ip(*words: str) -> None:
    """Run the ip command."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[tuple[str, str]]:
    """Return two network namespaces, a simulation's and an attacker's, that see each other and nothing else."""
    names = (f"flapp{os.getpid()}a", f"flapp{os.getpid()}b")
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces are not permitted: {getattr(error, 'stderr', error)}")
        for name, own, other in ((names[0], VICTIM, ATTACKER), (names[1], ATTACKER, VICTIM)):
            ip("-n", name, "address", "add", f"{own}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "route", "add", "default", "via", other)  # Ray takes the address of this route for its own
        yield names


@pytest.fixture(scope="module")
def simulation(namespaces: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[psutil.Process]]:
    """Return the processes of a simulation that runs in a network namespace, tools.run the first."""
    home = tmp_path_factory.mktemp("home")
    env = os.environ | {"FLAPP_HOME": str(home), "PYTHONPATH": str(APP)}
    command = ["ip", "netns", "exec", namespaces[0], sys.executable, "-m", "tools.run", *LONG, "run_name=long"]
    run = subprocess.Popen(command, cwd=home, env=env, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: run.poll() is not None or (home / "runs" / "long" / "progress.json").exists())
        assert run.poll() is None
        yield [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    finally:
        run.terminate()
        run.wait(WAIT_SECONDS)


def ray_process(processes: list[psutil.Process]) -> psutil.Process:
    """Return Ray's own process on the head node, whose command line names the cluster's address."""
    (raylet,) = (process for process in processes if process.name() == "raylet")
    return raylet


def attack(namespace: str, head: psutil.Process, folder: Path, **env: str) -> str:
    """Run code in a Ray cluster from another machine; return the network namespace that it ran in, or the error."""
    (address,) = (word.removeprefix("--gcs-address=") for word in head.cmdline() if word.startswith("--gcs-address="))
    assert address.startswith(f"{VICTIM}:")
    command = ["ip", "netns", "exec", namespace, sys.executable, str(ATTACK), address, ATTACKER, str(folder)]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    done = subprocess.run(command, env=kept | env, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr + done.stdout


@pytest.mark.slow
@needs_root
def test_code_from_another_machine_runs_in_a_simulation_only_with_its_token(
    namespaces: tuple[str, str], simulation: list[psutil.Process], tmp_path: Path
) -> None:
    head = ray_process(simulation)
    inside = os.readlink(f"/proc/{head.pid}/ns/net")
    tokens = ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
    for number, token in enumerate(tokens):
        answer = attack(namespaces[1], head, tmp_path / str(number), **token)
        assert inside not in answer
        assert "InvalidAuthToken" in answer, answer
    right = {key: value for key, value in head.environ().items() if key.startswith("RAY_AUTH")}
    assert attack(namespaces[1], head, tmp_path / "right", **right) == inside


@pytest.mark.slow
@needs_root
def test_the_token_of_a_simulation_stands_in_no_command_line_and_no_file(simulation: list[psutil.Process]) -> None:
    env = ray_process(simulation).environ()
    token, folder, home = env["RAY_AUTH_TOKEN"].encode(), Path(env[TOKEN]), Path(env["FLAPP_HOME"])
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert token not in process.read_bytes()
    assert folder.stat().st_mode & 0o777 == 0o700
    files = [path for root in (folder, home) for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert folder / "superlink.log" in files
    assert [path for path in files if token in path.read_bytes()] == []
