"""A real federation with TLS: the bytes of every other runtime, outsiders kept out, and what is killed comes back."""

import contextlib
import re
import signal
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flapp.config.load import compose
from flapp.config.schema import ConfigError
from tests.conftest import read_lines
from tests.support.commands import finish, start_tool
from tests.support.replies import Federate
from tests.support.waiting import wait_for
from tools.certificates import make_server_files, make_site_keys
from tools.checkpoints import main as checkpoints
from tools.deployment.processes import HOST, TOKEN, Processes, environment, free_port, program
from tools.deployment.submit import run_once
from tools.deployment.superlink import SuperLink
from tools.deployment.supervisor import SUPERLINK, Federation, read_federation
from tools.federation import find_missing, find_silent, online_nodes, read_seen

pytestmark = pytest.mark.slow

TOY = ("experiment=toy_regression", "evaluate.every=2", "num_rounds=2")
CASES = {  # one whose replies are summed, one that needs each client's tensors
    "toy": TOY,
    "flora": (
        *(
            "experiment=digits_fedlora",
            "model.pretrained=null",
            "model=vit_tiny",
            "model.image_size=16",
            "num_rounds=1",
        ),
        *("partition=iid", "train.epochs=1", "train.steps=1", "evaluate.personal_epochs=0", "checkpoint=off"),
        "strategy.aggregation=flora",
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a home with a federation of three sites that runs, secured; afterwards nothing of it is left."""
    home = tmp_path_factory.mktemp("site")
    status, said, error = finish(start_tool(home, "federation", "up", "--clients", "3", "--tls"))
    assert status == 0, error
    assert "(TLS, registered keys only): 3 of 3 SuperNodes online" in said
    token = read_federation(home / "federation").token
    yield home
    assert finish(start_tool(home, "federation", "down"))[0] == 0
    assert Processes(token).running() == []


@pytest.fixture
def federation(home: Path) -> Federation:
    """Return what the federation is made of."""
    return read_federation(home / "federation")


def submit(home: Path, name: str, *settings: str) -> subprocess.Popen[str]:
    """Start a run over the federation."""
    return start_tool(home, "run", "deployment=local", "clients=3", f"run_name={name}", *settings)


def reached(home: Path, name: str, server_round: int) -> Callable[[], bool]:
    """Return a condition: a run has trained this round."""
    path = home / "runs" / name

    def trained() -> bool:
        if not (path / "metrics.jsonl").exists():
            return False
        return any(line["round"] == server_round for line in read_lines(path, "train"))

    return trained


def is_back(folder: Path) -> bool:
    """Return whether the federation's SuperLink runs again and all of its SuperNodes are online."""
    seen = read_seen(folder)
    if seen is None or not seen.ready or not seen.programs[SUPERLINK].restarts or find_silent(folder, seen):
        return False
    return not find_missing(folder, seen, online_nodes(folder, read_federation(folder)))


def find_processes(federation: Federation, word: str, folder: str) -> Iterator[psutil.Process]:
    """Yield the processes of the federation with this word in their command line, started for this folder."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            env = process.environ()
            ours = env.get(TOKEN) == federation.token and env.get("FLWR_HOME", "").endswith(f"/{folder}/flwr")
            if ours and word in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def find_client(federation: Federation, folder: str) -> psutil.Process | None:
    """Return the process in which a client trains, busy for a while: a fork of what its SuperNode keeps for that."""
    for process in find_processes(federation, "supernode.py clients", folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = process.parent()
            if parent and parent.cmdline() == process.cmdline() and process.cpu_times().user > 0.5:
                return process
    return None


def digest_of(summary: str) -> str:
    """Return the model's digest from what tools.run says at the end."""
    found = re.search(r"^model .*sha256 ([0-9a-f]{64})\)$", summary, re.MULTILINE)
    assert found is not None
    return found[1]


def other_key(folder: Path) -> str:
    """Return the reason for which who is registered as client 0 is refused."""
    return f"is registered as client 0 with another key than the one pinned in {folder}/keys/client_0.pub"


def register_as_client_0(folder: Path, federation: Federation, keys: Path) -> str:
    """Make a key pair in `keys`, register it under the name of client 0 and return the id of its node."""
    make_site_keys(keys)
    with SuperLink(federation.address, folder / "ca.crt") as superlink:
        return str(superlink.flwr("supernode", "register", str(keys / "site.pub"), "--name", "client_0")["node-id"])


@pytest.fixture
def outsider(federation: Federation, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Return a function that starts a SuperNode of one's own and returns the file of all that it says."""
    processes = Processes(f"{federation.token}-outsider")

    def start(name: str, *secrets: Path) -> Path:
        ca, key = map(str, secrets)
        command = [program("flower-supernode"), "--superlink", federation.address, "--isolation", "subprocess"]
        command += ["--node-config", 'client-id="0"', "--host", HOST, "--port", str(free_port())]
        command += ["--root-certificates", ca, "--auth-supernode-private-key", key]
        env = environment(tmp_path / name, processes.token)
        with (tmp_path / f"{name}.txt").open("wb") as said:
            subprocess.Popen(command, env=env, cwd=tmp_path, stdout=said, stderr=said)
        return tmp_path / f"{name}.txt"

    yield start
    processes.stop()


def test_private_keys_of_a_federation_are_for_their_owner_only(home: Path) -> None:
    keys = sorted((home / "federation").rglob("*.key"))
    assert [key.name for key in keys] == ["ca.key", "site.key", "site.key", "site.key", "server.key"]
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}


def test_plain_http_and_other_authorities_are_refused(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"http://{federation.address}/", timeout=5)
    make_server_files(tmp_path, [HOST])
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(f"https://{federation.address}/", timeout=5, context=context)


def test_runs_at_once_end_in_the_bytes_of_other_runtimes_and_outsiders_are_kept_out(
    home: Path, federation: Federation, outsider: Callable[..., Path], federate: Federate, tmp_path: Path
) -> None:
    """The outsiders have a wrong CA, a strange key, or a registered key and another client's name."""
    folder = home / "federation"
    make_server_files(tmp_path, [HOST])
    make_site_keys(tmp_path / "strange")
    node = register_as_client_0(folder, federation, tmp_path / "known")
    strange = outsider("strange", folder / "ca.crt", tmp_path / "strange" / "site.key")
    wrong = outsider("wrong", tmp_path / "ca.crt", folder / "client_0" / "site.key")
    known = outsider("known", folder / "ca.crt", tmp_path / "known" / "site.key")
    wait_for(lambda: "SuperNode ID" in known.read_text())
    wait_for(lambda: len(online_nodes(folder, federation)) == 4)  # the three, and the one that is registered
    wait_for(lambda: "Failed to activate SuperNode" in strange.read_text())
    started = {name: submit(home, name, *words) for name, words in CASES.items()}
    for name, process in started.items():
        status, said, error = finish(process)
        assert status == 0, error
        assert said.splitlines()[-1] == f"refused: node {node}: {other_key(folder)}"
        assert digest_of(said) == federate(*CASES[name], "clients=3")[0]["model_sha256"]
    assert len(online_nodes(folder, federation)) == 4
    assert "SuperNode ID" not in wrong.read_text()


def test_a_client_and_a_supernode_killed_in_a_round_are_named_and_take_part_again(
    home: Path, federation: Federation
) -> None:
    words = ("experiment=toy_regression", "train.steps=4000", "num_rounds=40", "evaluate.every=40")
    run = submit(home, "killed", *words)
    wait_for(lambda: reached(home, "killed", 1)() and find_client(federation, "client_1")).kill()
    (supernode,) = find_processes(federation, "supernode.py --superlink", "client_2")
    supernode.kill()
    path = home / "runs" / "killed"

    def came_back() -> bool:
        lines = read_lines(path, "train")
        return len(lines) > 2 and lines[-1]["replies"] == 3

    wait_for(came_back)
    run.send_signal(signal.SIGINT)
    assert finish(run)[0] == 130
    failed = [
        {failure["client"]: failure["reason"] for failure in line["failures"]} for line in read_lines(path, "train")
    ]
    assert failed[0] == {}
    assert failed[1].keys() == {"1", "2"}
    assert failed[1]["1"] == "failed: its process ended before it answered (killed, or out of memory)"
    with SuperLink(federation.address, home / "federation" / "ca.crt") as superlink:
        assert {each["status"] for each in superlink.flwr("list")["runs"]} <= {"finished:completed", "finished:stopped"}


def test_a_superlink_killed_comes_back_and_the_run_is_resumed_to_the_same_bytes(
    home: Path, federation: Federation, federate: Federate
) -> None:
    settings = (*TOY, "num_rounds=3", "train.optimizer=sgd", "train.momentum=0.9")
    run = submit(home, "link", *settings)
    wait_for(reached(home, "link", 1))
    (superlink,) = find_processes(federation, "owner_only.py", "superlink")
    superlink.kill()
    status, _, error = finish(run)
    assert status == 1
    assert error.splitlines()[-1].endswith("run_name=link resume=true")
    wait_for(lambda: is_back(home / "federation"))
    status, said, error = finish(submit(home, "link", *settings, "resume=true"))
    assert status == 0, error
    undisturbed, _ = federate("clients=3", *settings)
    assert digest_of(said) == undisturbed["model_sha256"]
    assert checkpoints(["verify", str(home / "checkpoints")]) == 0


def test_more_clients_than_sites_are_refused_before_the_run(home: Path) -> None:
    settings = compose([f"home={home}", "deployment=local", *TOY, "clients=5", "run_name=many"])
    with pytest.raises(ConfigError, match="has 3: set clients=3$"):
        run_once(settings)
    assert not (home / "runs" / "many").exists()


def test_whoever_unregisters_a_client_and_takes_its_name_does_not_take_its_place(
    home: Path, federation: Federation, outsider: Callable[..., Path], federate: Federate, tmp_path: Path
) -> None:
    folder = home / "federation"
    honest = re.findall(r"SuperNode ID: (\d+)", (folder / "client_0" / "log.txt").read_text())[-1]
    with SuperLink(federation.address, folder / "ca.crt") as superlink:
        superlink.flwr("supernode", "unregister", honest)
    node = register_as_client_0(folder, federation, tmp_path / "intruder")
    intruder = outsider("intruder", folder / "ca.crt", tmp_path / "intruder" / "site.key")
    wait_for(lambda: "SuperNode ID" in intruder.read_text())
    wait_for(lambda: len(online_nodes(folder, federation)) == 3)
    few = ("num_rounds=1", "strategy.min_clients=2")
    status, said, error = finish(submit(home, "taken", *TOY, *few, "strategy.wait_for_clients=5"))
    assert status == 0, error
    assert said.splitlines()[-1] == f"refused: node {node}: {other_key(folder)}"
    assert [line["absent"] for line in read_lines(home / "runs" / "taken", "train")] == [["0"]]
    two, _ = federate(
        *(*TOY, *few, "deployment=local", "strategy.wait_for_clients=0.1"),
        nodes=[{"client-id": "1"}, {"client-id": "2"}],
    )
    assert digest_of(said) == two["model_sha256"]
