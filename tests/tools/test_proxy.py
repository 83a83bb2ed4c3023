"""A SuperLink behind nginx on a test network: a site trains through it, and nothing else gets through."""

import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.superlink.routers.fleet.router import router

from tests.conftest import read_lines
from tests.support.networks import two_machines
from tests.support.strangers import as_stranger
from tests.support.waiting import wait_for
from tests.tools.conftest import Refusal
from tools.certificates import make_server_files, make_site_keys
from tools.deployment.processes import environment, program
from tools.deployment.submit import APP
from tools.deployment.superlink import SuperLink
from tools.proxy import CALLS, main, write_proxy_files

SERVER, PORT, INNER = "10.77.0.1", 8000, 9000


def ask(host: str, port: int, ca: str, *requests: str) -> list[int]:
    """Send requests such as "POST /path" just as they are written, and return the statuses."""
    statuses = []
    for request in requests:
        connection = http.client.HTTPSConnection(host, port, timeout=60, context=ssl.create_default_context(cafile=ca))
        connection.request(*request.split(), body=b"", headers={"content-type": PROTOBUF_MEDIA_TYPE})
        statuses.append(connection.getresponse().status)
        connection.close()
    return statuses


@dataclass
class Network:
    """Two machines that see only each other: `server` is 10.77.0.1, `site` is 10.77.0.2."""

    server: str
    site: str
    folder: Path

    def start(self, machine: str, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a program on a machine, with what it says in `name`.txt."""
        with (self.folder / f"{name}.txt").open("wb") as said:
            words, env = self.on(machine, *command), environment(self.folder / name, "proxy-test")
            return subprocess.Popen(words, env=env, cwd=self.folder, stdout=said, stderr=said)

    def call(self, machine: str, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program on a machine to its end."""
        return subprocess.run(self.on(machine, *command), capture_output=True, text=True, timeout=500, **options)

    def on(self, machine: str, *command: str) -> list[str]:
        return ["ip", "netns", "exec", getattr(self, machine), *command]

    def flwr(self, machine: str, superlink: SuperLink, *words: str) -> dict[str, Any]:
        """Run Flower's command line on a machine, and return its answer."""
        command = (program("flwr"), *words, "--format", "json")
        done = self.call(machine, *command, env=superlink.env, cwd=superlink.folder)
        try:
            return dict(json.loads(done.stdout))
        except json.JSONDecodeError:
            return {"success": False, "error-message": done.stdout + done.stderr}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Return two machines; whatever runs on them is stopped afterwards."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with two_machines(SERVER, "10.77.0.2") as names:
        yield Network(*names, tmp_path_factory.mktemp("proxy"))


@pytest.fixture(scope="module")
def superlink(network: Network) -> Iterator[SuperLink]:
    """Return a SuperLink on the server's loopback address, as whoever is on the server sees it; nginx is before it."""
    folder = network.folder
    make_server_files(folder, [SERVER])
    make_site_keys(folder / "site")
    (folder / "keys").mkdir()
    shutil.copy(folder / "site" / "site.pub", folder / "keys" / "client_0.pub")
    conf = write_proxy_files(folder, f"{SERVER}:{PORT}", INNER)
    network.start("server", "nginx", "nginx", "-c", str(conf), "-g", "user root;")
    files = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
    words = [word for flag, name in files.items() for word in (flag, str(folder / name))]
    words += ["--host", "127.0.0.1", "--port", str(INNER), "--isolation", "subprocess", "--enable-supernode-auth"]
    network.start("server", "superlink", program("flower-superlink"), *words)
    superlink = SuperLink(f"127.0.0.1:{INNER}", folder / "ca.crt")
    wait_for(lambda: f"127.0.0.1:{INNER}" in network.call("server", "ss", "-ltn").stdout)
    register = ("supernode", "register", str(folder / "keys" / "client_0.pub"), "--name", "client_0")
    assert network.flwr("server", superlink, *register)["success"]
    yield superlink
    superlink.stop()


@pytest.mark.slow
def test_a_site_trains_a_model_of_30_megabytes_through_nginx(network: Network, superlink: SuperLink) -> None:
    folder = network.folder
    arguments = ["--superlink", f"{SERVER}:{PORT}", "--isolation", "subprocess"]
    arguments += ["--root-certificates", str(folder / "ca.crt")]
    arguments += ["--auth-supernode-private-key", str(folder / "site" / "site.key")]
    arguments += ["--node-config", f'client-id="0" home="{folder}/home-of-site"']
    network.start("site", "supernode", sys.executable, "-P", str(APP / "tools" / "supernode.py"), *arguments)
    settings = ["deployment=local", f"deployment.address=127.0.0.1:{INNER}", f"home={folder}/home", "run_name=big"]
    settings += [f"deployment.root_certificates={folder}/ca.crt", f"deployment.client_keys={folder}/keys"]
    settings += ["clients=1", "num_rounds=1", "dataset=digits", "model=cnn", "train.steps=1", "checkpoint=off"]
    settings += ["evaluate.personal_epochs=0"]
    env = os.environ | {"PYTHONPATH": str(APP)}
    done = network.call("server", sys.executable, "-m", "tools.run", *settings, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr + (folder / "supernode.txt").read_text()
    (line,) = read_lines(folder / "home" / "runs" / "big", "train")
    assert line["replies"] == 1
    assert min(line["bytes_up"], line["bytes_down"]) > 30_000_000
    assert json.loads((folder / "home" / "runs" / "big" / "metrics.json").read_text())["refused"] == {}


@pytest.mark.slow
def test_nobody_on_another_machine_submits_lists_or_registers(network: Network, superlink: SuperLink) -> None:
    folder = network.folder
    make_site_keys(folder / "intruder")
    key = str(folder / "intruder" / "site.pub")
    (node,) = network.flwr("server", superlink, "supernode", "list")["nodes"]
    runs = network.flwr("server", superlink, "list")["runs"]
    outside = SuperLink(f"{SERVER}:{PORT}", folder / "ca.crt")
    attempts = [
        ("list",),
        ("run", str(APP), "flapp"),
        ("supernode", "list"),
        ("supernode", "register", key, "--name", "client_0"),
        ("supernode", "unregister", node["node-id"]),
    ]
    answers = [network.flwr("site", outside, *words) for words in attempts]
    outside.stop()
    assert [answer["success"] for answer in answers] == [False] * len(attempts)
    assert all("403" in json.dumps(answer) for answer in answers), answers
    assert [each["node-id"] for each in network.flwr("server", superlink, "supernode", "list")["nodes"]] == [
        node["node-id"]
    ]
    assert len(network.flwr("server", superlink, "list")["runs"]) == len(runs)


@pytest.mark.slow
def test_only_the_fleet_api_is_passed_on_however_a_path_is_written(network: Network, superlink: SuperLink) -> None:
    refused = [
        *("POST /v1/control/list-nodes", "POST /v1/runtime/get-nodes", "GET /docs", "GET /openapi.json", "GET /"),
        *("POST /v1/fleet/register-node", "POST /v1/fleet/unregister-node", "POST /v1/fleet/", "POST /v1/fleet"),
        *("POST /v1/fleet/../control/list-nodes", "POST /v1/fleet/%2e%2e/control/list-nodes"),
        *("POST /v1/fleet/pull-messages/../../control/list-nodes", "POST //v1//control/list-nodes"),
        *("POST /v1/fleet/pull-messages/x", "GET /v1/fleet/pull-messages"),
    ]
    unsigned = ["POST /v1/fleet/pull-messages", "POST /v1/control/list-nodes/..%2f..%2ffleet/pull-messages"]
    on_the_site = partial(as_stranger, network=f"/run/netns/{network.site}", user=0)
    ca = str(network.folder / "ca.crt")
    found = on_the_site(ask, SERVER, PORT, ca, *refused, *unsigned)
    assert dict(zip([*refused, *unsigned], found, strict=True)) == {
        **dict.fromkeys(refused, 403),
        **dict.fromkeys(unsigned, 401),
    }
    assert on_the_site(ask, SERVER, INNER, ca, refused[0]).startswith("ConnectionRefusedError")


def test_the_calls_that_are_passed_on_are_flowers_own() -> None:
    paths = {route.path.removeprefix("/v1/fleet/") for route in router.routes}  # type: ignore[attr-defined]
    assert paths == {*CALLS, "register-node", "unregister-node"}


def test_what_nginx_could_not_use_is_refused_with_the_fix(tmp_path: Path, refusal: Refusal) -> None:
    folder = tmp_path / "a"
    fix = f"python -m tools.certificates server {folder} --host NAME"
    assert refusal(main, folder) == f"error: {folder}/ca.crt is missing: {fix}"
    make_server_files(folder, ["fl.example.org"])
    assert refusal(main, folder, "--listen", "8000") == "error: --listen 8000 is not an address: give HOST:PORT"
    assert "not an address" in refusal(main, folder, "--listen", "0.0.0.0:8000; user root")
    folder.rename(tmp_path / "b; c")
    assert "use a folder with a plain name" in refusal(main, tmp_path / "b; c")


def test_a_certificate_made_by_hand_that_is_not_for_localhost_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refusal: Refusal
) -> None:
    monkeypatch.setattr("tools.certificates.LOOPBACK", ())
    make_server_files(tmp_path, ["fl.example.org"])
    assert "server.crt is not for localhost, where nginx reaches the SuperLink: python" in refusal(main, tmp_path)
    monkeypatch.undo()
    make_server_files(tmp_path, ["fl.example.org"])  # the fix
    assert main([str(tmp_path)]) == 0
    if shutil.which("nginx"):
        subprocess.run(["nginx", "-t", "-c", capsys.readouterr().out.strip()], check=True, capture_output=True)
