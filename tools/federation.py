"""Run a whole federation on this machine: a SuperLink, a SuperNode for each client, and a supervisor.

    python -m tools.federation up --clients 3              clients "0" to "2", with the data in home
    python -m tools.federation up --shards DIR             one site for each client in a folder of shards, which is
                                                           checked first
    python -m tools.federation up --clients 3 --tls        certificates, and only SuperNodes with registered keys
    python -m tools.run deployment=local clients=3         start a run on it
    python -m tools.federation status                      show what runs; exits 1 unless everything runs
    python -m tools.federation down

All files are in one folder: home/federation, or the folder given with --folder:

    federation.json          the parts of the federation
    supervisor.json          what runs now; supervisor.log says what ended and when it was started again
    ca.crt, ca.key, server.crt, server.key     with --tls; private keys can be read by their owner only
    superlink/log.txt        the SuperLink's log; its Flower home is in the same folder
    keys/client_<id>.pub     with --tls: the sites' public keys, which runs use to identify clients
    client_<id>/log.txt      the log of a SuperNode and its clients; with --tls also its site.key and site.pub
"""

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
from pydantic import ValidationError

from flapp.data.shards.manifest import load_manifest
from flapp.files import write_json
from tools.cli import default_home, errors_in_one_line, new_parser
from tools.deployment.processes import (
    HOST,
    Processes,
    SuperLinkError,
    environment,
    free_port,
    is_free,
    is_running,
    last_line,
)
from tools.deployment.superlink import APP
from tools.deployment.supervisor import (
    FACTS,
    KEYS,
    LOG,
    SEEN,
    SUPERLINK,
    Federation,
    Seen,
    describe_down,
    first_fault,
    read_facts,
    read_federation,
    site_name,
    superlink_of,
)
from tools.verify_data import verify_shards

READY_SECONDS, LEAVE_SECONDS, LOOK_SECONDS = 120, 25, 0.3
SUPERVISOR_LOG = "supervisor.log"
NODE_ID = re.compile(r"SuperNode ID: (\d+)")
LOG_BYTES = 1 << 16  # of a SuperNode's log, from its last start on, to search for its id


def up(given: argparse.Namespace) -> int:
    """Check everything, start the federation and wait until every SuperNode is online; if that fails, stop it."""
    folder: Path = given.folder
    if (supervisor := find_supervisor(folder)) is not None:
        raise SuperLinkError(f"{folder} has a federation that runs (pid {supervisor.pid}): take it down first")
    federation = plan(given)
    if (folder / FACTS).exists():
        take_down(folder)  # processes that a killed federation may have left
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SEEN, *(f"{each}/{LOG}" for each in (SUPERLINK, *map(site_name, federation.clients)))):
        (folder / name).unlink(missing_ok=True)
    if federation.tls:
        from tools.certificates import make_server_files, make_site_keys  # imports cryptography

        make_server_files(folder, [HOST, "localhost"])
        shutil.rmtree(folder / KEYS, ignore_errors=True)
        (folder / KEYS).mkdir()
        for name in map(site_name, federation.clients):
            make_site_keys(folder / name)
            shutil.copy(folder / name / "site.pub", folder / KEYS / f"{name}.pub")
    write_json(folder / FACTS, federation.model_dump())
    env = environment(folder, federation.token) | {"PYTHONPATH": str(APP)}
    command = [sys.executable, "-m", "tools.deployment.supervisor", str(folder)]
    if given.foreground:
        # Processes are found by the token in /proc, which shows the environment that a program was started with.
        os.execve(command[0], command, env)
    with (folder / SUPERVISOR_LOG).open("wb") as log:
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until_ready(folder, federation, process)
    except BaseException:
        take_down(folder)
        raise
    return status(given)


def plan(given: argparse.Namespace) -> Federation:
    """Return the parts of the federation that the command line asks for, after checking every shard and the port.

    Raises SuperLinkError or DataError for the first fault.
    """
    clients = [str(i) for i in range(given.clients or 0)]
    if given.shards:
        for check in verify_shards(given.shards.resolve(), None):
            if not check.ok:
                raise SuperLinkError(f"{check.where}: {check.name}: {check.detail}")
        clients = list(load_manifest(given.shards))
    if not clients:
        raise SuperLinkError("how many clients? give --clients N, or --shards DIR")
    if given.clients not in (None, len(clients)):
        raise SuperLinkError(f"--clients {given.clients}, but {given.shards} holds {len(clients)}: leave --clients out")
    port = given.port or free_port()
    if not is_free(port):
        raise SuperLinkError(f"--port {port} is in use on {HOST}: choose another, or leave it out for a free one")
    shards = str(given.shards.resolve()) if given.shards else None
    options = {name: getattr(given, name) for name in ("tls", "homes", "threads", "plain")}
    options["allow_code"] = tuple(as_allowed(each) for each in given.allow_code)
    token, address = secrets.token_hex(16), f"{HOST}:{port}"
    try:
        return Federation(token=token, address=address, clients=tuple(clients), shards=shards, **options)
    except ValidationError as error:
        found = f"these options do not describe a federation ({first_fault(error)})"
        raise SuperLinkError(f"{found}: correct them") from None


def as_allowed(word: str) -> str:
    """Return what a site may allow: a folder as an absolute path, or a package by its name; raises SuperLinkError."""
    is_folder = Path(word).is_dir()
    found = str(Path(word).resolve()) if is_folder else word
    if " " in found or not (is_folder or word.isidentifier()):
        raise SuperLinkError(
            f"--allow-code {found} must be the name of a package or an existing folder, without spaces: give another"
        )
    return found


def wait_until_ready(folder: Path, federation: Federation, process: subprocess.Popen[bytes]) -> None:
    """Wait until every SuperNode is online; raises SuperLinkError with what is missing and the ends of the logs."""
    end = time.monotonic() + READY_SECONDS
    missing = ""
    while time.monotonic() < end:
        seen = read_seen(folder)
        if process.poll() is not None:
            raise SuperLinkError(f"the supervisor ended: {last_line((folder / SUPERVISOR_LOG).read_text())}")
        if seen is None or not seen.ready:
            missing = SUPERLINK
        elif missing_nodes := find_silent(folder, seen) or find_missing(folder, seen, online_nodes(folder, federation)):
            missing = f"{len(missing_nodes)} of {len(federation.clients)} SuperNodes"
        else:
            return
        time.sleep(LOOK_SECONDS)
    logs = {name: folder / name / LOG for name in (SUPERLINK, *map(site_name, federation.clients))}
    words = "; ".join(f"{name}: {last_line(path.read_text())}" for name, path in logs.items() if path.exists())
    raise SuperLinkError(f"after {READY_SECONDS} s, not online: {missing}. Last log lines: {words[:1000]}")


def online_nodes(folder: Path, federation: Federation) -> set[str]:
    """Return the ids of the nodes that the SuperLink lists as online; it lists a dead node for up to a minute."""
    with superlink_of(folder, federation) as superlink:
        nodes = superlink.flwr("supernode", "list")["nodes"]
    return {str(node["node-id"]) for node in nodes if node["status"] == "online"}


def find_missing(folder: Path, seen: Seen, online: set[str]) -> list[str]:
    """List the SuperNodes that are not running, or whose current process is not online."""
    return [name for name, ids in ids_by_site(folder, seen).items() if online.isdisjoint(ids)]


def find_silent(folder: Path, seen: Seen) -> list[str]:
    """List the SuperNodes that have not logged an id yet: a look that costs nothing, unlike a question to Flower."""
    return [name for name, ids in ids_by_site(folder, seen).items() if not ids]


def ids_by_site(folder: Path, seen: Seen) -> dict[str, list[str]]:
    """Return the node ids that each SuperNode has logged since its last start; none if it does not run."""
    found: dict[str, list[str]] = {name: [] for name in seen.programs if name != SUPERLINK}
    for name in found:
        program = seen.programs[name]
        with contextlib.suppress(psutil.NoSuchProcess):
            if program.pid is not None and is_running(psutil.Process(program.pid)):
                with (folder / name / LOG).open("rb") as log:
                    log.seek(program.log_start)
                    found[name] = NODE_ID.findall(log.read(LOG_BYTES).decode(errors="replace"))
    return found


def status(given: argparse.Namespace) -> int:
    """Print the state of all programs; returns 0 only when all of them run."""
    folder: Path = given.folder
    federation, seen = read_federation(folder), read_seen(folder)
    if find_supervisor(folder) is None or seen is None:
        raise SuperLinkError(describe_down(folder, federation, seen))
    online: set[str] = set()
    fault = ""
    try:
        online = online_nodes(folder, federation)
    except SuperLinkError as error:
        fault = str(error)
    missing = find_missing(folder, seen, online)
    healthy = not missing and all(program.pid for program in seen.programs.values())
    if given.json:
        ca, clients = str(folder / "ca.crt") if federation.tls else None, len(federation.clients)
        facts = {"address": federation.address, "tls": federation.tls, "root_certificates": ca}
        facts |= {"clients": clients, "online": clients - len(missing), "missing": missing}
        print(json.dumps(facts | seen.model_dump() | {"healthy": healthy}, indent=1))
    else:
        print(table(folder, federation, seen, missing))
    if fault:
        print(f"error: {fault}", file=sys.stderr)
    return int(not healthy)


def table(folder: Path, federation: Federation, seen: Seen, missing: list[str]) -> str:
    """Return the status as text, with one line per program."""
    secure, clients = "TLS, registered keys only" if federation.tls else "no TLS", len(federation.clients)
    lines = [f"SuperLink at {federation.address} ({secure}): {clients - len(missing)} of {clients} SuperNodes online"]
    width = max(map(len, seen.programs))
    for name, program in seen.programs.items():
        offline = " (not online)" if name in missing else ""
        state = f"pid {program.pid}{offline}" if program.pid else "waiting to be started again"
        again = f"  started {program.restarts + 1} times" if program.restarts else ""
        lines.append(f"  {name:<{width}}  {state:<12}  {folder / name / LOG}{again}")
    return "\n".join(lines)


def down(given: argparse.Namespace) -> int:
    """Stop every process of the federation."""
    stopped = take_down(given.folder)
    print(f"stopped {stopped} processes" if stopped else "nothing was running")
    return 0


def take_down(folder: Path) -> int:
    """Have the supervisor stop its programs, then stop all others; return how many processes there were."""
    processes = Processes(read_federation(folder).token)
    running = len(processes.running())
    if (supervisor := find_supervisor(folder)) is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor.terminate()
        psutil.wait_procs([supervisor], timeout=LEAVE_SECONDS)
    processes.stop()
    return running


def find_supervisor(folder: Path) -> psutil.Process | None:
    """Return the process that supervises the federation of this folder, if it runs."""
    if not (folder / FACTS).exists():
        return None
    seen = read_seen(folder)
    running = Processes(read_federation(folder).token).running()
    return next((process for process in running if seen is None or process.pid == seen.pid), None)


def read_seen(folder: Path) -> Seen | None:
    """Return the content of supervisor.json, or None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return read_facts(folder / SEEN, Seen)
    return None


@errors_in_one_line(SuperLinkError, OSError, ValueError)
def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks and return the exit status."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("command", choices=["up", "status", "down"])
    add("--folder", type=Path, default=default_home() / "federation", help="default: %(default)s")
    add("--clients", type=int, help="number of clients; ids are 0, 1, ...")
    add("--shards", type=Path, help="folder of client_<id> folders with a manifest.json")
    add("--tls", action="store_true", help="encrypt, and accept only registered keys")
    add("--port", type=int, help="port of the SuperLink; default: a free one")
    add("--threads", type=int, default=1, help="threads per client process; default: 1")
    text = "give each site its own home for data, checkpoint stores, and the frozen weights of FedLoRA"
    add("--homes", action="store_true", help=text)
    add("--plain", action="store_true", help="run Flower's own SuperNodes, which are slower")
    text = "packages and folders whose code runs may name, such as . for the folder of your task.py"
    add("--allow-code", nargs="+", default=[], metavar="WHAT", help=text)
    add("--foreground", action="store_true", help="supervise in this process, until it is stopped")
    add("--json", action="store_true", help="print the status as JSON")
    given = parser.parse_args(arguments)
    given.folder = given.folder.resolve()
    try:
        return {"up": up, "status": status, "down": down}[given.command](given)
    except KeyboardInterrupt:
        stopped = "; what was started has been stopped" if given.command == "up" else ""
        print(f"error: interrupted{stopped}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
