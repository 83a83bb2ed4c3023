"""SuperLinks for runs: any SuperLink by its address, or a private one that is started and stopped with one run.

The SuperLink that `flwr run` starts by itself is a daemon. It keeps folder, environment and code of its first start.
The private one belongs to one run, starts in a neutral folder, and has its own home and port.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

from flapp.config.load import CONF, PACKAGE
from tools.deployment.processes import (
    HOST,
    KILL_SECONDS,
    SWEEP,
    Processes,
    SuperLinkError,
    answers,
    environment,
    is_free,
    last_line,
    listens,
    program,
    reserve_port,
)

APP = PACKAGE.parent  # what flapp and tools are imported from: the checkout, or site-packages
SHIPPED = ("pyproject.toml", "README.md")  # a wheel has them in the package, beside conf/
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # codes of a terminal: colours, cursor
START_SECONDS = 60
CONNECTION = "flapp"  # what Flower's command line calls the SuperLink
OWNER_ONLY = (sys.executable, "-P", str(Path(__file__).with_name("owner_only.py")))  # then superlink or supernode
RAY_WITH_TOKENS = "2.52.0"  # the first Ray with token authentication


class SuperLink:
    """The SuperLink at `address`, used through Flower's command line from a temporary folder.

    root_certificates: the CA that its certificate must be signed by; None for a SuperLink without TLS.
    """

    def __init__(self, address: str, root_certificates: Path | None = None) -> None:
        self.address = address
        prefix = Path(os.environ.get(SWEEP, "flapp")).name + "-"
        self.folder = Path(tempfile.mkdtemp(prefix=prefix))  # short, because Ray puts sockets below it
        self.processes = Processes(str(self.folder))
        self.env = environment(self.folder, self.processes.token)
        secure = "insecure = true" if root_certificates is None else f'root-certificates = "{root_certificates}"'
        home = self.folder / "flwr"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\naddress = "{address}"\n{secure}\n'
        )

    def __enter__(self) -> "SuperLink":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start nothing: the first command shows whether the SuperLink answers."""

    def stop(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def check_alive(self) -> None:
        """Raise SuperLinkError if the SuperLink does not answer."""
        if not answers(self.address):
            raise SuperLinkError(f"the SuperLink at {self.address} does not answer any more")

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run `flwr ARGUMENTS --format json` against this SuperLink and return its answer."""
        command = [program("flwr"), *arguments, "--format", "json"]
        done = subprocess.run(command, env=self.env, cwd=self.folder, capture_output=True, text=True, check=False)
        try:
            answer = json.loads(done.stdout)
        except json.JSONDecodeError:
            raise SuperLinkError(f"flwr {arguments[0]} failed: {last_line(done.stderr or done.stdout)}") from None
        if not answer.get("success"):
            raise SuperLinkError(f"flwr {arguments[0]} failed: {last_line(answer.get('error-message', ''))}")
        return answer

    def status(self, run_id: str) -> tuple[str, str]:
        """Return Flower's status of a run, such as finished:completed, and its details."""
        run = self.flwr("list", "--run-id", run_id)["runs"][0]
        return str(run["status"]), str(run["status-details"])

    def stop_run(self, run_id: str) -> None:
        """Ask Flower to stop a run; errors are ignored."""
        with contextlib.suppress(SuperLinkError):
            self.flwr("stop", run_id)

    def read_log(self, run_id: str, how: str = "--stream") -> Iterator[str]:
        """Yield the lines that the ServerApp of a run prints: --stream, until the run ends; --show, those so far."""
        command = [program("flwr"), "log", run_id, how]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
        env = self.env | {"PYTHONUNBUFFERED": "1"}  # otherwise lines arrive in large blocks
        with subprocess.Popen(command, env=env, cwd=self.folder, errors="replace", **pipes) as process:
            assert process.stdout is not None
            try:
                yield from process.stdout
            finally:
                process.terminate()

    def save_log(self, run_id: str, path: Path) -> None:
        """Add what the apps of a run printed to `path`, without the codes that colour a terminal."""
        with path.open("a", encoding="utf-8") as file:
            file.writelines(ANSI.sub("", line) for line in self.read_log(run_id, "--show"))


def owned_superlink(address: str) -> list[str]:
    """Return the command line of a SuperLink that listens at an address of this machine and answers only this user."""
    host, _, port = address.rpartition(":")
    command = [*OWNER_ONLY, "superlink", "--host", host, "--port", port, "--isolation", "subprocess"]
    return [*command, "--disable-runtime-dependency-installation"]


class PrivateSuperLink(SuperLink):
    """A SuperLink for one simulation, at a free port unless one is given. It starts Ray unless ray_address is given."""

    def __init__(self, port: int | None = None, ray_address: str | None = None) -> None:
        ray = ray_environment(ray_address)
        self.reserved = reserve_port() if port is None else socket.socket()
        self.port = int(self.reserved.getsockname()[1]) if port is None else port
        super().__init__(f"{HOST}:{self.port}")
        self.env |= ray
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers; raises SuperLinkError."""
        if not is_free(self.port):
            raise SuperLinkError(
                f"deployment.port={self.port} is in use on {HOST}: choose another, or set it to null for a free one"
            )
        command = [*owned_superlink(self.address), "--insecure", "--simulation"]
        with (self.folder / "superlink.log").open("wb") as log:
            self.process = subprocess.Popen(
                command, env=self.env, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + START_SECONDS
        while not listens(self.process.pid, self.port):
            self.check_alive()
            if time.monotonic() > end:
                raise SuperLinkError(f"the SuperLink did not answer in {START_SECONDS} s: {last_line(self._log())}")
            time.sleep(0.1)

    def check_alive(self) -> None:
        """Raise SuperLinkError if the SuperLink has ended."""
        if self.process is None or self.process.poll() is not None:
            raise SuperLinkError(f"the SuperLink ended by itself: {last_line(self._log())}")

    def stop(self) -> None:
        """Stop every process this SuperLink has started, and remove its folder."""
        self.processes.stop()
        if self.process is not None:
            self.process.wait(KILL_SECONDS)
        self.reserved.close()
        super().stop()

    def _log(self) -> str:
        path = self.folder / "superlink.log"
        return path.read_text(errors="replace") if path.exists() else ""


@contextlib.contextmanager
def app_folder() -> Iterator[Path]:
    """Yield a folder with pyproject.toml, flapp/ and conf/: the checkout, or a temporary copy of an installed wheel."""
    if CONF.parent != PACKAGE:
        yield APP
        return
    with tempfile.TemporaryDirectory(prefix="flapp-app-") as made:
        folder = Path(made)
        shutil.copytree(PACKAGE, folder / "flapp", ignore=shutil.ignore_patterns("__pycache__", "conf", *SHIPPED))
        shutil.copytree(CONF, folder / "conf")
        for name in SHIPPED:
            shutil.copy(PACKAGE / name, folder)
        yield folder


def ray_environment(ray_address: str | None) -> dict[str, str]:
    """Return the environment that makes Ray require a token, because Ray listens on all addresses of this machine.

    If the run starts Ray, it makes a new token. For another cluster, the run takes the token from this process's
    environment. Raises SuperLinkError for a Ray that does not know tokens.
    """
    if Version(found := version("ray")) < Version(RAY_WITH_TOKENS):
        raise SuperLinkError(
            f"Ray {found} would run code from anybody who reaches its ports: "
            f"install Ray {RAY_WITH_TOKENS} or later (pip install -U 'flwr[simulation]')"
        )
    if ray_address is None:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if os.environ.get("RAY_AUTH_MODE") != "token":
        print(
            f"warning: the Ray cluster at {ray_address} may run code from anybody who reaches it: start all of it "
            "with RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN, and give this run the same",
            file=sys.stderr,
        )
    return {"RAY_ADDRESS": ray_address}
