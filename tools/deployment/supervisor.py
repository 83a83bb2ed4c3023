"""The parts of a federation on this machine, and the program that keeps its SuperLink and SuperNodes running.

`python -m tools.federation up` starts this program in the background. It restarts each program that ends, after a
growing pause. It reads <folder>/federation.json and writes the state of all programs to <folder>/supervisor.json. On
SIGTERM it stops the SuperNodes, then the SuperLink, and removes supervisor.json. If it is killed, its guard stops the
programs and supervisor.json stays.
"""

import asyncio
import contextlib
import fcntl
import io
import itertools
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import monotonic, strftime
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from flapp.files import write_json
from flapp.untrusted import printable, read_bytes
from tools.deployment.processes import HOST, TOKEN, Processes, SuperLinkError, answers, environment, free_port
from tools.deployment.superlink import OWNER_ONLY, SuperLink, app_folder, owned_superlink
from tools.running.guard import guarded

UP = "bring it up (python -m tools.federation up, with the options that you gave it before)"
FACTS, SEEN, LOG = "federation.json", "supervisor.json", "log.txt"
SUPERLINK, KEYS = "superlink", "keys"
STOPPING = (signal.SIGTERM, signal.SIGINT)
FIRST_PAUSE, LONGEST_PAUSE, SETTLED_SECONDS = 1.0, 60.0, 60.0
# The SuperLink counts a killed SuperNode as online for up to 60 s. If it came back within that time, nobody would
# report the messages that it has lost, and a round would wait for them until strategy.timeout.
KILLED_PAUSE = 70.0
LOOK_SECONDS, STOP_SECONDS, REGISTRARS = 0.3, 8.0, 4
FAST_SUPERNODE = (sys.executable, "-P", str(Path(__file__).parents[1] / "supernode.py"))

Address = Annotated[str, Field(pattern=r"^[0-9A-Za-z.\-]+:[0-9]{1,5}$")]
ClientId = Annotated[str, Field(pattern=r"^[^/\x00\r\n]{1,100}$")]  # it names a folder
Printable = Annotated[str, Field(pattern=r"^\P{C}*$")]
Pid = Annotated[int, Field(gt=0, lt=1 << 31)]


class Federation(BaseModel, frozen=True, strict=True, extra="forbid"):
    """The parts of a federation on this machine, as written to federation.json.

    address: of the SuperLink, host:port; clients: ids; shards: the folder that holds every client's shard, or None;
    homes: whether each site has a home of its own; threads: of a client's process; plain: whether the SuperNodes are
    Flower's own instead of tools.supernode; allow_code: packages and folders whose code runs may name.
    """

    token: Annotated[str, Field(min_length=32)]
    address: Address
    tls: bool
    clients: Annotated[tuple[ClientId, ...], Field(min_length=1)]
    shards: Printable | None
    homes: bool
    threads: int
    plain: bool = False
    allow_code: tuple[Printable, ...] = ()


class Program(BaseModel, strict=True):
    """The state of one program; log_start: bytes of its log that earlier starts have written."""

    pid: Pid | None = None
    restarts: NonNegativeInt = 0
    log_start: NonNegativeInt = 0


class Seen(BaseModel, strict=True):
    """The state of all programs, as written to supervisor.json; ready: the SuperLink answers and knows the keys."""

    pid: Pid
    ready: bool
    programs: dict[Printable, Program]


Facts = TypeVar("Facts", Federation, Seen)


def read_facts(path: Path, kind: type[Facts]) -> Facts:
    """Read federation.json or supervisor.json; raises OSError, or ValueError for what this flapp never writes."""
    try:
        return kind.model_validate_json(read_bytes(path))
    except ValueError as error:
        said = first_fault(error) if isinstance(error, ValidationError) else str(error)
        raise ValueError(
            f"{path} is not what this flapp writes ({printable(said)}): remove it, and bring the federation up"
        ) from error


def first_fault(error: ValidationError) -> str:
    """Return what pydantic found wrong first, as `place: problem`."""
    fault = error.errors()[0]
    return printable(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, got {fault['input']}")


def read_federation(folder: Path) -> Federation:
    """Read federation.json; raises SuperLinkError when there is none, or ValueError when `up` did not write it."""
    try:
        return read_facts(folder / FACTS, Federation)
    except FileNotFoundError:
        raise SuperLinkError(f"{folder} has no federation: python -m tools.federation up --clients N") from None


def site_name(client_id: str) -> str:
    """Return the name of a client's folder, under which its SuperNode is registered too."""
    return f"client_{client_id}"


def superlink_of(folder: Path, federation: Federation) -> SuperLink:
    """Return the SuperLink of a federation, not entered yet."""
    return SuperLink(federation.address, folder / "ca.crt" if federation.tls else None)


def describe_down(folder: Path, federation: Federation, seen: Seen | None) -> str:
    """Return one line: that no supervisor runs, whether it was killed, and what to do."""
    if left := Processes(federation.token).running():
        pids = ", ".join(str(process.pid) for process in left)
        return (
            f"the supervisor of {folder} is gone, and {len(left)} of its processes still run (pids {pids}): "
            "take the federation down, then bring it up"
        )
    if seen is None:
        return f"the federation of {folder} is down: {UP}"
    return f"the supervisor of {folder} (pid {seen.pid}) was killed and its programs have been stopped: {UP}"


def install_app(folder: Path) -> None:
    """Install the app for the SuperLink and every SuperNode before any of their processes needs it.

    Two processes that install the same app at the same time would see each other's half-written files.
    """
    from flwr.cli.build import build_fab_from_disk  # takes half a second; only local federations need it
    from flwr.cli.install import install_from_fab

    with app_folder() as app:
        fab = build_fab_from_disk(app)
    federation = read_federation(folder)
    with (folder / "install.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=folder) as unpacked:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.redirect_stdout(io.StringIO()):
            made = install_from_fab(fab, Path(unpacked), skip_prompt=True)
        for name in (SUPERLINK, *map(site_name, federation.clients)):
            place = folder / name / "flwr" / "apps" / made.name
            if not place.exists():
                half = place.with_name(f".{place.name}")
                shutil.rmtree(half, ignore_errors=True)
                shutil.copytree(made, half)
                half.rename(place)


def superlink_command(folder: Path, federation: Federation) -> list[str]:
    """Return the command line of a federation's SuperLink."""
    command = owned_superlink(federation.address)
    if not federation.tls:
        return [*command, "--insecure"]
    command += ["--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "server.crt")]
    return [*command, "--ssl-keyfile", str(folder / "server.key"), "--enable-supernode-auth"]


def supernode_command(folder: Path, federation: Federation, client_id: str) -> list[str]:
    """Return the command line of a client's SuperNode, with a new port at each start."""
    site = folder / site_name(client_id)
    settings = {"client-id": client_id}
    if federation.shards is not None:
        settings["shard-path"] = str(Path(federation.shards) / site_name(client_id))
    if federation.homes:
        settings["home"] = str(site / "home")
    if federation.allow_code:
        settings["allow-code"] = " ".join(federation.allow_code)
    node_config = " ".join(f'{key}="{value}"' for key, value in settings.items())
    program = (*OWNER_ONLY, "supernode") if federation.plain else FAST_SUPERNODE
    command = [*program, "--superlink", federation.address, "--node-config", node_config]
    command += ["--host", HOST, "--port", str(free_port()), "--isolation", "subprocess"]
    if not federation.tls:
        return [*command, "--insecure"]
    keys = ["--auth-supernode-private-key", str(site / "site.key")]
    return [*command, "--root-certificates", str(folder / "ca.crt"), *keys]


class Supervisor:
    """Run the programs of a federation until it is stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.federation = folder, read_federation(folder)
        names = [SUPERLINK, *map(site_name, self.federation.clients)]
        self.seen = Seen(pid=os.getpid(), ready=False, programs={name: Program() for name in names})
        self.ready = asyncio.Event()

    async def run(self) -> None:
        """Keep all programs running until SIGTERM or SIGINT, and stop them."""
        stop = asyncio.Event()
        for number in STOPPING:
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        superlink = asyncio.create_task(self.keep(SUPERLINK, partial(superlink_command, self.folder, self.federation)))
        nodes = []
        for client_id in self.federation.clients:
            command = partial(supernode_command, self.folder, self.federation, client_id)
            nodes.append(asyncio.create_task(self.keep(site_name(client_id), command)))
        ends = [asyncio.create_task(stop.wait()), superlink, *nodes]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises the error of a task that failed
        finally:
            for tasks in (nodes, [superlink]):  # SuperNodes first, so that they can unregister from the SuperLink
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=STOP_SECONDS)

    async def keep(self, name: str, command: Callable[[], list[str]]) -> None:
        """Start a program, and start it again whenever it has ended; SuperNodes wait until the SuperLink is ready."""
        pause = FIRST_PAUSE
        for restarts in itertools.count():
            if name != SUPERLINK:
                await self.ready.wait()
            began = monotonic()
            async with self.running(name, command(), restarts) as process:
                if name == SUPERLINK:
                    await self.make_ready(process)
                status = await process.wait()
            if name == SUPERLINK:
                self.ready.clear()
            if monotonic() - began > SETTLED_SECONDS:
                pause = FIRST_PAUSE
            was_killed = status < 0 and -status not in STOPPING  # by a signal, before it could leave the federation
            if name != SUPERLINK and self.federation.tls and was_killed:
                pause = KILLED_PAUSE
            say(f"{name} (pid {process.pid}) ended with {status}; it restarts in {pause:g} s")
            self.seen.programs[name].pid = None
            self.note()
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 2)

    @contextlib.asynccontextmanager
    async def running(self, name: str, command: list[str], restarts: int) -> AsyncIterator[asyncio.subprocess.Process]:
        """Run a program in its own folder, with its output in its log, at most until the block ends."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        env = environment(folder, self.federation.token) | {"OMP_NUM_THREADS": str(self.federation.threads)}
        with (folder / LOG).open("ab") as log:
            log_start = log.tell()
            process = await asyncio.create_subprocess_exec(*command, env=env, cwd=folder, stdout=log, stderr=log)
        try:
            self.seen.programs[name] = Program(pid=process.pid, restarts=restarts, log_start=log_start)
            self.note()
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()

    async def make_ready(self, superlink: asyncio.subprocess.Process) -> None:
        """Register every site's key once the SuperLink answers; a restarted SuperLink knows none."""
        while superlink.returncode is None and not self.ready.is_set():
            await asyncio.sleep(LOOK_SECONDS)
            try:
                if answers(self.federation.address):
                    if self.federation.tls:
                        await asyncio.to_thread(self.register_keys)
                    self.ready.set()
                    self.note()
            except SuperLinkError as error:
                say(str(error))

    def register_keys(self) -> None:
        with superlink_of(self.folder, self.federation) as superlink, ThreadPoolExecutor(REGISTRARS) as threads:
            superlink.flwr("list", "--limit", "1")  # fails if the SuperLink is not ready, before any key is registered

            def register(name: str) -> None:
                superlink.flwr("supernode", "register", str(self.folder / name / "site.pub"), "--name", name)

            list(threads.map(register, map(site_name, self.federation.clients)))  # raises what one of them raised

    def note(self) -> None:
        """Write supervisor.json."""
        self.seen.ready = self.ready.is_set()
        write_json(self.folder / SEEN, self.seen.model_dump())


def say(text: str) -> None:
    """Add a line to this program's log."""
    print(f"{strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def supervise(folder: Path) -> None:
    """Keep the federation of `folder` running until SIGTERM or SIGINT."""
    supervisor = Supervisor(folder)
    token = supervisor.federation.token
    with guarded(TOKEN, token):
        try:
            asyncio.run(supervisor.run())
        finally:
            Processes(token).stop()  # what has not ended by itself
            (folder / SEEN).unlink(missing_ok=True)


if __name__ == "__main__":
    for each in STOPPING:
        signal.signal(each, lambda *_: sys.exit(0))  # until the event loop handles them
    supervise(Path(sys.argv[1]))
