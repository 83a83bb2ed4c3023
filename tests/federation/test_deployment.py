"""A real federation with TLS: the bytes of every other runtime, outsiders kept out, and what is killed comes back."""

import contextlib
import re
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from flwr.app import Message

from flapp.config.load import compose
from flapp.config.schema import ConfigError
from tests.conftest import Federate, read_lines
from tests.support.commands import finish, start_tool
from tests.support.own_runs import run
from tests.support.projects import EDITED, EDITED_WORDS, SLOW, add_to_task, new_project, settings_in
from tests.support.replies import drop, trained_in
from tests.support.waiting import wait_for
from tools.certificates import make_server_files, make_site_keys
from tools.checkpoints import main as checkpoints
from tools.deployment.processes import HOST, TOKEN, Processes, environment, free_port, program
from tools.deployment.submit import run_once
from tools.deployment.superlink import SuperLink
from tools.deployment.supervisor import SUPERLINK, Federation, read_federation
from tools.federation import find_missing, find_silent, online_nodes, read_seen

pytestmark = pytest.mark.slow

SMALL = f"{EDITED_WORDS} clients=2 partition=iid train.epochs=1 train.steps=3 evaluate.personal_epochs=0"
CASES = {  # of a user's own project: one whose replies are summed, one that needs each client's tensors
    "summed": f"{SMALL} num_rounds=2 evaluate.every=2 strategy.fraction_evaluate=0.5",
    "adapters": f"{SMALL} num_rounds=1 strategy=fedlora strategy.aggregation=flora lora=default lora.rank=2 "
    "lora.targets=[all-linear]",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a home with a project that its user has edited, `mine`, and with a federation that runs.

    It has two sites, is secured, and allows the project's code. Afterwards nothing of it is left.
    """
    home = tmp_path_factory.mktemp("site")
    project = new_project(home / "mine", "vision")
    add_to_task(project, EDITED)
    (project / "slow.py").write_text(SLOW)
    words = ("up", "--clients", "2", "--tls", "--allow-code", "mine")
    status, said, error = finish(start_tool(home, "federation", *words))
    assert status == 0, error
    assert "(TLS, registered keys only): 2 of 2 SuperNodes online" in said
    token = read_federation(home / "federation").token
    yield home
    assert finish(start_tool(home, "federation", "down"))[0] == 0
    assert Processes(token).running() == []


@pytest.fixture
def federation(home: Path) -> Federation:
    """Return what the federation is made of."""
    return read_federation(home / "federation")


def submit(home: Path, name: str, *settings: str) -> subprocess.Popen[str]:
    """Start a run over the federation, in the project's folder."""
    return start_tool(home, "run", "deployment=local", f"run_name={name}", *settings, cwd=home / "mine")


def run_here(home: Path, name: str, *settings: str) -> str:
    """Run the project's settings in this process and return the digest of the model."""
    return str(run(settings_in(home / "mine", home, f"run_name={name}", *settings))[0]["model_sha256"])


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


def find_client(folder: Path) -> psutil.Process | None:
    """Return the process in which a site's client has begun to train, which takes five seconds."""
    for begun in (folder / "flwr").glob("begun-*"):
        with contextlib.suppress(psutil.NoSuchProcess):
            if time.time() - begun.stat().st_mtime < 3:
                return psutil.Process(int(begun.name.removeprefix("begun-")))
    return None


def digest_of(summary: str) -> str:
    """Return the model's digest from what tools.run says at the end."""
    found = re.search(r"^model .*sha256 ([0-9a-f]{64})\)$", summary, re.MULTILINE)
    assert found is not None
    return found[1]


def other_key(folder: Path) -> str:
    """Return the reason why the node registered as client 0 is refused."""
    return f"is registered as client 0 with a different key from the one pinned in {folder}/keys/client_0.pub"


def register_as_client_0(folder: Path, federation: Federation, keys: Path) -> str:
    """Make a key pair in `keys`, register it under the name of client 0 and return the id of its node."""
    make_site_keys(keys)
    with SuperLink(federation.address, folder / "ca.crt") as superlink:
        return str(superlink.flwr("supernode", "register", str(keys / "site.pub"), "--name", "client_0")["node-id"])


@pytest.fixture(scope="module")
def outsider(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Path]]:
    """Return a function that starts a SuperNode with the key in a folder and returns the file of all that it says."""
    federation, folder = read_federation(home / "federation"), tmp_path_factory.mktemp("outsiders")
    processes = Processes(f"{federation.token}-outsider")

    def start(keys: Path) -> Path:
        command = [program("flower-supernode"), "--superlink", federation.address, "--isolation", "subprocess"]
        command += ["--node-config", 'client-id="0"', "--host", HOST, "--port", str(free_port())]
        command += ["--root-certificates", str(home / "federation" / "ca.crt")]
        command += ["--auth-supernode-private-key", str(keys / "site.key")]
        with (folder / f"{keys.name}.txt").open("wb") as said:
            env = environment(folder / keys.name, processes.token)
            subprocess.Popen(command, env=env, cwd=folder, stdout=said, stderr=said)
        return folder / f"{keys.name}.txt"

    yield start
    processes.stop()


@pytest.fixture(scope="module")
def intruder(home: Path, outsider: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the id of a node that runs, and that is registered with a key of its own under the name of client 0."""
    keys, folder = tmp_path_factory.mktemp("keys") / "intruder", home / "federation"
    node = register_as_client_0(folder, read_federation(folder), keys)
    said = outsider(keys)
    wait_for(lambda: "SuperNode ID" in said.read_text())
    return node


def test_what_is_killed_is_named_and_takes_part_again_and_the_resumed_run_ends_in_the_model_of_the_replies_it_got(
    home: Path, federation: Federation, federate: Federate
) -> None:
    """The test kills the SuperLink, then a client and a SuperNode during rounds. Finally it interrupts the run."""
    words = ["experiment=toy_regression", "clients=2", f"code={home}/mine", "train.loss=slow:loss", "train.steps=25"]
    words += ["num_rounds=20", "evaluate.every=20", "train.optimizer=sgd", "train.momentum=0.9"]
    path, sites = home / "runs" / "killed", home / "federation"
    run = submit(home, "killed", *words)
    wait_for(reached(home, "killed", 1))
    (superlink,) = find_processes(federation, "owner_only.py", "superlink")
    superlink.kill()
    status, _, error = finish(run)
    assert status == 1
    assert error.splitlines()[-1].endswith("run_name=killed resume=true")
    wait_for(lambda: is_back(sites))
    done = len(read_lines(path, "round"))
    run = submit(home, "killed", *words, "resume=true")
    wait_for(lambda: reached(home, "killed", done + 1)() and find_client(sites / "client_0")).kill()
    wait_for(lambda: reached(home, "killed", done + 2)() and find_client(sites / "client_1"))
    (supernode,) = find_processes(federation, "supernode.py --superlink", "client_1")
    supernode.kill()

    def came_back() -> bool:
        lines = read_lines(path, "train")
        return sum(bool(line["failures"]) for line in lines) == 2 and lines[-1]["replies"] == 2

    wait_for(came_back)
    run.send_signal(signal.SIGINT)
    assert finish(run)[0] == 130
    with SuperLink(federation.address, sites / "ca.crt") as link:
        assert {each["status"] for each in link.flwr("list")["runs"]} <= {"finished:completed", "finished:stopped"}
    resumed, _ = federate(*words, f"home={home}", "run_name=killed", "resume=true")
    lines = read_lines(path, "train")
    failed = [{each["client"]: each["reason"] for each in line["failures"]} for line in lines]
    first, second = filter(None, failed)
    assert first == {"0": "failed: its process ended before it answered (killed, or out of memory)"}
    assert second.keys() == {"1"}
    missing = {str(line["round"]): {*reasons, *line["absent"]} for line, reasons in zip(lines, failed, strict=True)}

    def silence(name: str, reply: Message) -> Message:
        if trained_in(reply) is not None and name in missing[reply.metadata.group_id]:
            drop(reply)
        return reply

    without, _ = federate(*words, tamper=silence)
    assert resumed["model_sha256"] == without["model_sha256"]
    assert checkpoints(["verify", str(home / "checkpoints")]) == 0


def test_private_keys_of_a_federation_are_for_their_owner_only(home: Path) -> None:
    keys = sorted((home / "federation").rglob("*.key"))
    assert [key.name for key in keys] == ["ca.key", "site.key", "site.key", "server.key"]
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}


def test_plain_http_and_other_authorities_are_refused(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"http://{federation.address}/", timeout=5)
    make_server_files(tmp_path, [HOST])
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(f"https://{federation.address}/", timeout=5, context=context)


def test_runs_at_once_end_in_the_bytes_of_other_runtimes_and_strange_keys_are_kept_out(
    home: Path, outsider: Callable[[Path], Path], intruder: str, tmp_path: Path
) -> None:
    """One key is not registered; the other one is, under another client's name."""
    make_site_keys(tmp_path / "strange")
    strange = outsider(tmp_path / "strange")
    started = {name: submit(home, name, *words.split()) for name, words in CASES.items()}
    for name, process in started.items():
        status, said, error = finish(process)
        assert status == 0, error
        assert said.splitlines()[-1] == f"refused: node {intruder}: {other_key(home / 'federation')}"
        assert digest_of(said) == run_here(home, f"{name}-here", *CASES[name].split())
    assert "Failed to activate SuperNode" in strange.read_text()
    assert "SuperNode ID" not in strange.read_text()


def test_more_clients_than_sites_are_refused_before_the_run(home: Path) -> None:
    settings = compose([f"home={home}", "deployment=local", "experiment=toy_regression", "clients=5", "run_name=many"])
    with pytest.raises(ConfigError, match="has 2: set clients=2$"):
        run_once(settings)
    assert not (home / "runs" / "many").exists()


def test_whoever_unregisters_a_client_and_has_its_name_does_not_take_its_place(
    home: Path, federation: Federation, intruder: str, federate: Federate
) -> None:
    folder = home / "federation"
    honest = re.findall(r"SuperNode ID: (\d+)", (folder / "client_0" / "log.txt").read_text())[-1]
    with SuperLink(federation.address, folder / "ca.crt") as superlink:
        superlink.flwr("supernode", "unregister", honest)
    few = ("experiment=toy_regression", "clients=2", "num_rounds=1", "strategy.min_clients=1", "checkpoint=off")
    status, said, error = finish(submit(home, "taken", *few, "strategy.wait_for_clients=5"))
    assert status == 0, error
    assert said.splitlines()[-1] == f"refused: node {intruder}: {other_key(folder)}"
    assert [line["absent"] for line in read_lines(home / "runs" / "taken", "train")] == [["0"]]
    alone, _ = federate(*few, "deployment=local", "strategy.wait_for_clients=0.1", nodes=[{"client-id": "1"}])
    assert digest_of(said) == alone["model_sha256"]
