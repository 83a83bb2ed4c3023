"""Keep a SuperLink and its SuperNodes running: whatever ends is started again, after a growing pause.

`python -m tools.federation up` starts this program in the background. It reads <folder>/federation.json and writes the
state of all programs to <folder>/supervisor.json. On SIGTERM it stops the SuperNodes, then the SuperLink, and removes
supervisor.json. If it is killed, its guard stops the programs and supervisor.json stays.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from flapp.files import write_json
from flapp.untrusted import printable, read_json
from tools.deployment.processes import HOST, TOKEN, SuperLinkError, answers, environment, free_port
from tools.deployment.superlink import OWNER_ONLY, SuperLink
from tools.running.guard import guarded

FACTS, SEEN, LOG = "federation.json", "supervisor.json", "log.txt"
SUPERLINK, KEYS = "superlink", "keys"
CLIENT_ID = re.compile(r"[^/\0\r\n]{1,100}")
FIRST_PAUSE, LONGEST_PAUSE, SETTLED_SECONDS = 1.0, 60.0, 60.0  # a SuperNode killed is let in again after 60 s at most
LOOK_SECONDS, STOP_SECONDS, REGISTRARS = 0.3, 8.0, 4
FAST_SUPERNODE = (sys.executable, "-P", str(Path(__file__).parents[1] / "supernode.py"))


@dataclass(frozen=True)
class Federation:
    """The parts of a federation on this machine, as written to federation.json.

    address: of the SuperLink, host:port; clients: ids; shards: a folder per client, or None when they share `home`;
    homes: whether each site has a home of its own; threads: of a client's process; plain: whether the SuperNodes are
    Flower's own instead of tools.supernode.
    """

    token: str
    address: str
    tls: bool
    clients: tuple[str, ...]
    shards: str | None
    homes: bool
    threads: int
    plain: bool = False

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


def read_federation(folder: Path) -> Federation:
    """Read federation.json; raises FileNotFoundError, or ValueError when `up` did not write it."""
    path = folder / FACTS
    try:
        values = read_json(path)
        federation = Federation(**values | {"clients": tuple(values["clients"])})
        if odd := next(_faults(federation), None):
            raise ValueError(odd)
        return federation
    except (ValueError, TypeError, KeyError) as error:
        said = printable(error)
        raise ValueError(
            f"{path} is not what this flapp writes ({said}): remove it, and bring the federation up"
        ) from error


def _faults(federation: Federation) -> Iterator[str]:
    """Yield the fields with values that `up` never writes. Clients, for example, name folders."""
    kinds = {"token": str, "address": str, "tls": bool, "homes": bool, "threads": int, "plain": bool}
    yield from (name for name, kind in kinds.items() if type(getattr(federation, name)) is not kind)
    if not re.fullmatch(r"[0-9A-Za-z.\-]+:[0-9]{1,5}", federation.address):
        yield "address"
    if not all(isinstance(name, str) and CLIENT_ID.fullmatch(name) for name in federation.clients):
        yield "clients"
    if not isinstance(federation.shards, str | None) or not (federation.shards or "").isprintable():
        yield "shards"


def site_name(client_id: str) -> str:
    """Return the name of a client's folder, under which its SuperNode is registered too."""
    return f"client_{client_id}"


def root_certificates(folder: Path, federation: Federation) -> Path | None:
    """Return the path of the CA's certificate of a federation with TLS, otherwise None."""
    return folder / "ca.crt" if federation.tls else None


def superlink_command(folder: Path, federation: Federation) -> list[str]:
    """Return the command line of the SuperLink, which answers only this user."""
    command = [*OWNER_ONLY, "superlink", "--host", HOST, "--port", str(federation.port)]
    command += ["--isolation", "subprocess", "--disable-runtime-dependency-installation"]
    if not federation.tls:
        return [*command, "--insecure"]
    files = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
    paths = [word for flag, name in files.items() for word in (flag, str(folder / name))]
    return [*command, *paths, "--enable-supernode-auth"]


def supernode_command(folder: Path, federation: Federation, client_id: str) -> list[str]:
    """Return the command line of a client's SuperNode, with a new port at each start."""
    site = folder / site_name(client_id)
    settings = {"client-id": client_id}
    if federation.shards is not None:
        settings["shard-path"] = str(Path(federation.shards) / site_name(client_id))
    if federation.homes:
        settings["home"] = str(site / "home")
    node_config = " ".join(f'{key}="{value}"' for key, value in settings.items())
    program = (*OWNER_ONLY, "supernode") if federation.plain else FAST_SUPERNODE
    command = [*program, "--superlink", federation.address, "--node-config", node_config]
    command += ["--host", HOST, "--port", str(free_port()), "--isolation", "subprocess"]
    if not federation.tls:
        return [*command, "--insecure"]
    keys = ["--auth-supernode-private-key", str(site / "site.key")]
    return [*command, "--root-certificates", str(folder / "ca.crt"), *keys]


class Child:
    """One program that should run, and when it may be started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.restarts = -1
        self.log_start = 0  # bytes of the log that earlier starts have written
        self.started = self.next_start = 0.0
        self.pause = FIRST_PAUSE

    def start(self, command: list[str], env: dict[str, str]) -> None:
        """Start the program in its own folder and append its output to its log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOG).open("ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(command, env=env, cwd=self.folder, stdout=log, stderr=log)
        self.started = time.monotonic()
        self.restarts += 1

    def has_ended(self) -> bool:
        """Return whether the program has just ended; if so, its next start is planned."""
        if self.process is None or self.process.poll() is None:
            return False
        now = time.monotonic()
        if now - self.started > SETTLED_SECONDS:
            self.pause = FIRST_PAUSE
        status, pid = self.process.returncode, self.process.pid
        say(f"{self.folder.name} (pid {pid}) ended with {status}; again in {self.pause:g} s")
        self.process, self.next_start = None, now + self.pause
        self.pause = min(LONGEST_PAUSE, self.pause * 2)
        return True

    def is_due(self) -> bool:
        """Return whether the program is not running and may be started."""
        return self.process is None and time.monotonic() >= self.next_start

    def stop(self) -> None:
        """Ask the program to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def facts(self) -> dict[str, Any]:
        """Return the values that `status` shows."""
        pid = self.process.pid if self.process else None
        return {"pid": pid, "restarts": max(0, self.restarts), "log_start": self.log_start}


class Supervisor:
    """Run the programs of a federation until it is stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.federation = folder, read_federation(folder)
        self.superlink = Child(folder / SUPERLINK)
        self.nodes = {client_id: Child(folder / site_name(client_id)) for client_id in self.federation.clients}
        self.ready = False  # the SuperLink answers, and knows the keys
        self.seen: dict[str, Any] = {}  # what was last written to supervisor.json

    def run(self) -> None:
        """Keep all programs running, forever."""
        while True:
            self.look()
            time.sleep(LOOK_SECONDS)

    def look(self) -> None:
        """Notice what has ended, start what is due, and write supervisor.json if something has changed."""
        if self.superlink.has_ended():
            self.ready = False
        if self.superlink.is_due():
            self.superlink.start(superlink_command(self.folder, self.federation), self._environment(self.superlink))
        if not self.ready and self.superlink.process is not None:
            self.ready = self._make_ready()
        for client_id, node in self.nodes.items():
            node.has_ended()
            if self.ready and node.is_due():
                node.start(supernode_command(self.folder, self.federation, client_id), self._environment(node))
        programs = {SUPERLINK: self.superlink.facts()} | {site_name(i): node.facts() for i, node in self.nodes.items()}
        seen = {"pid": os.getpid(), "ready": self.ready, "programs": programs}
        if seen != self.seen:
            write_json(self.folder / SEEN, seen)
            self.seen = seen

    def stop(self) -> None:
        """Stop the SuperNodes first, so that they can unregister from the SuperLink, then the SuperLink."""
        for children in (list(self.nodes.values()), [self.superlink]):
            for child in children:
                child.stop()
            end = time.monotonic() + STOP_SECONDS
            while any(child.process and child.process.poll() is None for child in children) and time.monotonic() < end:
                time.sleep(0.1)

    def _environment(self, child: Child) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": str(self.federation.threads)}
        return environment(child.folder, self.federation.token) | threads

    def _make_ready(self) -> bool:
        """Register every site's key once the SuperLink answers; a restarted SuperLink knows none."""
        if not answers(self.federation.port):
            return False
        if not self.federation.tls:
            return True
        try:
            with SuperLink(self.federation.address, self.folder / "ca.crt") as superlink:

                def register(client_id: str) -> None:
                    name = site_name(client_id)
                    superlink.flwr("supernode", "register", str(self.folder / name / "site.pub"), "--name", name)

                with ThreadPoolExecutor(REGISTRARS) as threads:
                    list(threads.map(register, self.nodes))
        except SuperLinkError as error:
            say(str(error))
            return False
        return True


def say(text: str) -> None:
    """Add a line to this program's log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def supervise(folder: Path) -> None:
    """Keep the federation of `folder` running until SIGTERM or SIGINT."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    supervisor = Supervisor(folder)
    with guarded(TOKEN, supervisor.federation.token):
        try:
            supervisor.run()
        finally:
            supervisor.stop()
            (folder / SEEN).unlink(missing_ok=True)


def _leave(signum: int, frame: FrameType | None) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


if __name__ == "__main__":
    supervise(Path(sys.argv[1]))
