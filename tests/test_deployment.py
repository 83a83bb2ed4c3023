"""A real federation with TLS: the bytes of a simulation, outsiders kept out, and what is killed comes back."""

import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import read_lines
from tools.certificates import make_server_files, make_site_keys
from tools.federation import count_online
from tools.processes import HOST, TOKEN, Processes, environment, free_port, program
from tools.submit import APP
from tools.superlink import SuperLink
from tools.supervisor import Federation, read_federation

pytestmark = pytest.mark.slow

Federate = Callable[..., tuple[dict[str, Any], Path]]
TOY = ("experiment=toy_regression", "evaluate.every=2")
WAIT_SECONDS = 240


def tool(home: Path, module: str, *arguments: str) -> subprocess.Popen[str]:
    """Start one of our tools as a user would, from another folder."""
    env = os.environ | {"FLAPP_HOME": str(home), "PYTHONPATH": str(APP)}
    command = [sys.executable, "-m", f"tools.{module}", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=home, env=env, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a tool and return its exit status, and what it said."""
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def wait_for(condition: Callable[[], Any]) -> Any:
    """Wait until a condition holds, and return what it is."""
    end = time.monotonic() + WAIT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a home with a federation of three sites that runs, secured; afterwards nothing of it is left."""
    home = tmp_path_factory.mktemp("site")
    status, said, error = finish(tool(home, "federation", "up", "--clients", "3", "--tls"))
    assert status == 0, error
    assert "(TLS, registered keys only): 3 of 3 SuperNodes online" in said
    token = read_federation(home / "federation").token
    yield home
    assert finish(tool(home, "federation", "down"))[0] == 0
    assert Processes(token).running() == []


@pytest.fixture
def federation(home: Path) -> Federation:
    """Return what the federation is made of."""
    return read_federation(home / "federation")


def submit(home: Path, name: str, *settings: str) -> subprocess.Popen[str]:
    """Start a run over the federation."""
    return tool(home, "run", "deployment=local", "clients=3", f"run_name={name}", *settings)


def reached(home: Path, name: str, server_round: int) -> Callable[[], bool]:
    """Return a condition: a run has trained this round."""
    path = home / "runs" / name

    def trained() -> bool:
        if not (path / "metrics.jsonl").exists():
            return False
        return any(line["round"] == server_round for line in read_lines(path, "train"))

    return trained


def find_process(federation: Federation, word: str, folder: str) -> psutil.Process | None:
    """Return the process of the federation with this word in its command line, started for this folder."""
    for process in psutil.process_iter():
        try:
            env = process.environ()
            ours = env.get(TOKEN) == federation.token and env.get("FLWR_HOME", "").endswith(f"/{folder}/flwr")
            if ours and word in " ".join(process.cmdline()):
                return process
        except (psutil.Error, OSError):
            continue
    return None


def find_client(federation: Federation, folder: str) -> psutil.Process | None:
    """Return the process in which a client trains: a fork of what its SuperNode keeps for that, busy for a while."""
    server = find_process(federation, "supernode.py clients", folder)
    for child in server.children() if server else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE and child.cpu_times().user > 1:
                return child
    return None


def digest_of(summary: str) -> str:
    """Return the model's digest from what tools.run says at the end."""
    found = re.search(r"^model ([0-9a-f]{64})$", summary, re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture
def outsider(home: Path, federation: Federation, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Return a function that starts a SuperNode of one's own and returns all it says in some seconds."""
    processes = Processes("outsider")

    def start(client_id: str, *secrets: str, seconds: float = 12) -> str:
        command = [program("flower-supernode"), "--superlink", federation.address, "--isolation", "subprocess"]
        command += ["--node-config", f'client-id="{client_id}"', "--host", HOST, "--port", str(free_port()), *secrets]
        env = environment(tmp_path, processes.token)
        with (tmp_path / "said.txt").open("wb") as said:
            subprocess.Popen(command, env=env, cwd=tmp_path, stdout=said, stderr=said)
        time.sleep(seconds)
        return (tmp_path / "said.txt").read_text()

    yield start
    processes.stop()


def online(home: Path, federation: Federation) -> int:
    """Return how many SuperNodes the SuperLink says are online."""
    return count_online(home / "federation", federation)


def test_private_keys_of_a_federation_are_for_their_owner_only(home: Path) -> None:
    keys = sorted((home / "federation").rglob("*.key"))
    assert [key.name for key in keys] == ["ca.key", "site.key", "site.key", "site.key", "server.key"]
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}


def test_two_runs_at_once_end_in_the_bytes_of_their_simulations(home: Path, federate: Federate) -> None:
    seeds = ("3", "4")
    started = [submit(home, f"seed{seed}", *TOY, "num_rounds=2", f"seed={seed}") for seed in seeds]
    ended = [finish(process) for process in started]
    assert [status for status, _, _ in ended] == [0, 0], ended
    alone = [federate(*TOY, "clients=3", "num_rounds=2", f"seed={seed}")[0]["model_sha256"] for seed in seeds]
    assert [digest_of(said) for _, said, _ in ended] == alone


def test_plain_http_and_other_authorities_are_refused(
    home: Path, federation: Federation, outsider: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"http://{federation.address}/", timeout=5)
    make_server_files(tmp_path / "other", [HOST])
    context = ssl.create_default_context(cafile=str(tmp_path / "other" / "ca.crt"))
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(f"https://{federation.address}/", timeout=5, context=context)
    key = str(home / "federation" / "client_0" / "site.key")
    outsider("0", "--root-certificates", str(tmp_path / "other" / "ca.crt"), "--auth-supernode-private-key", key)
    assert online(home, federation) == 3


def test_a_supernode_whose_key_is_not_registered_stays_out(
    home: Path, federation: Federation, outsider: Callable[..., str], tmp_path: Path
) -> None:
    make_site_keys(tmp_path / "site")
    ca, key = home / "federation" / "ca.crt", tmp_path / "site" / "site.key"
    said = outsider("7", "--root-certificates", str(ca), "--auth-supernode-private-key", str(key))
    assert "Failed to activate SuperNode" in said
    assert online(home, federation) == 3


def test_a_registered_site_that_claims_anothers_id_is_left_out_of_the_run(
    home: Path, federation: Federation, outsider: Callable[..., str], tmp_path: Path
) -> None:
    make_site_keys(tmp_path / "site")
    ca, key = home / "federation" / "ca.crt", tmp_path / "site" / "site.key"
    with SuperLink(federation.address, ca) as superlink:
        superlink.flwr("supernode", "register", str(key.with_suffix(".pub")), "--name", "client_9")
    outsider("0", "--root-certificates", str(ca), "--auth-supernode-private-key", str(key))
    assert online(home, federation) == 4
    status, _, error = finish(submit(home, "claimed", *TOY, "num_rounds=1"))
    assert status == 0, error
    line = read_lines(home / "runs" / "claimed", "roster")[0]
    assert line["refused"] == {"node client_9": "claims client 0, its key is registered as client_9"}


def test_a_client_killed_in_a_round_is_named_and_its_supernode_goes_on(home: Path, federation: Federation) -> None:
    settings = ("train.steps=20000", "num_rounds=3", "evaluate.every=3", "experiment=toy_regression")
    run = submit(home, "client", *settings)
    wait_for(reached(home, "client", 1))
    order = home / "runs" / "client" / "progress.json"
    wait_for(lambda: json.loads(order.read_text())["round"] == 2)
    wait_for(lambda: find_client(federation, "client_1")).kill()
    status, _, error = finish(run)
    assert status == 0, error
    failures = [line["failures"] for line in read_lines(home / "runs" / "client", "train")]
    assert failures[0] == failures[2] == []
    assert [failure["client"] for failure in failures[1]] == ["1"]


def test_a_supernode_killed_comes_back_and_the_run_goes_on(home: Path, federation: Federation) -> None:
    run = submit(home, "node", *TOY, "num_rounds=40", "checkpoint=off")
    wait_for(reached(home, "node", 1))
    victim = find_process(federation, "supernode.py --superlink", "client_2")
    assert victim is not None
    victim.kill()
    path = home / "runs" / "node"

    def came_back() -> bool:
        lines = read_lines(path, "train")
        left = [line["round"] for line in lines if line["replies"] < 3]
        return bool(left) and lines[-1]["replies"] == 3 and lines[-1]["round"] > left[-1]

    wait_for(came_back)
    run.send_signal(signal.SIGINT)
    assert finish(run)[0] == 130
    with SuperLink(federation.address, home / "federation" / "ca.crt") as superlink:
        assert {each["status"] for each in superlink.flwr("list")["runs"]} <= {"finished:completed", "finished:stopped"}


def test_a_superlink_killed_comes_back_and_the_run_is_resumed_to_the_same_bytes(
    home: Path, federation: Federation, federate: Federate
) -> None:
    settings = (*TOY, "num_rounds=5", "train.optimizer=sgd", "train.momentum=0.9")
    run = submit(home, "link", *settings)
    wait_for(reached(home, "link", 2))
    victim = find_process(federation, "flower-superlink", "superlink")
    assert victim is not None
    victim.kill()
    status, _, error = finish(run)
    assert status == 1
    assert error.splitlines()[-1].endswith("run_name=link resume=true")
    wait_for(lambda: finish(tool(home, "federation", "status"))[0] == 0)
    status, said, error = finish(submit(home, "link", *settings, "resume=true"))
    assert status == 0, error
    undisturbed, _ = federate("clients=3", *settings)
    assert digest_of(said) == undisturbed["model_sha256"]
    assert finish(tool(home, "checkpoints", "verify", str(home / "checkpoints")))[0] == 0


def test_more_clients_than_sites_are_refused_before_the_run(home: Path) -> None:
    status, _, error = finish(tool(home, "run", "deployment=local", *TOY, "clients=5"))
    assert status == 1
    assert error.splitlines()[-1].endswith("has 3: set clients=3")
