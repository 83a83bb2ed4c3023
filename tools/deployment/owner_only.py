"""Flower's SuperLink or SuperNode, answering only the user who started it.

    python -P tools/deployment/owner_only.py superlink ARGUMENTS        the arguments of flower-superlink
    python -P tools/deployment/owner_only.py supernode ARGUMENTS        the arguments of flower-supernode

Flower's APIs have no password, so every user of this machine could submit an app to the SuperLink's port, and the app
would run as the user who started the SuperLink. Linux lists the user of each TCP socket in /proc/net/tcp. Connections
from other users and from other machines are refused before anything is read from them.
"""

import asyncio
import importlib
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

PROGRAMS = {"superlink": "flwr.superlink.cli.flower_superlink", "supernode": "flwr.supernode.cli.flower_supernode"}
TCP, TCP6 = Path("/proc/net/tcp"), Path("/proc/net/tcp6")
PREFIXES = {TCP: "", TCP6: "0000000000000000FFFF0000"}  # of an IPv4 address
ESTABLISHED, CLOSED = "01", "0"  # a connection's state; the inode of a socket that its process has closed


class OwnerOnly(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Serve connections of the user of this process; answer all others with 403 and close them."""

    def connection_made(self, transport: Any) -> None:
        if find_user(transport.get_extra_info("socket")) == os.geteuid():
            super().connection_made(transport)
            return
        text = f"only the user who started this server (uid {os.geteuid()}) may use it: start one of your own\n"
        transport.set_protocol(asyncio.Protocol())  # it ignores what still comes in
        transport.write(f"HTTP/1.1 403 Forbidden\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode())
        transport.close()


def find_user(connection: Any) -> int | None:
    """Return the user of the process at the other end of a TCP connection, or None if it cannot be found."""
    try:  # an error that left this function would leave the connection open, and uvicorn would serve it
        with socket.socket(fileno=os.dup(connection.fileno())) as same:
            user = look_up(same.getpeername(), same.getsockname())
            same.getpeername()  # fails if the other end has gone meanwhile, and its port may be somebody else's by now
            return user
    except OSError:
        return None


def look_up(peer: tuple[str, int], own: tuple[str, int]) -> int | None:
    """Return the uid of the open socket whose own address is `peer`, connected to `own`; None if there is none."""
    for path, prefix in PREFIXES.items():
        ends = [prefix + to_hex(*end) for end in (peer, own)]
        for line in path.read_text().splitlines() if path.exists() else []:
            if ends[0] in line:
                _, local, remote, state, _, _, _, user, _, inode, *_ = line.split()
                if [local, remote, state] == [*ends, ESTABLISHED] and inode != CLOSED:
                    return int(user)
    return None


def to_hex(host: str, port: int) -> str:
    """Return an IPv4 address and port as /proc/net/tcp writes them."""
    return f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"


def protect(name: str) -> None:
    """Make the uvicorn server of one of Flower's modules answer its owner only; exits if that is not possible."""
    from flwr.supercore.version import package_version

    if not TCP.exists():
        sys.exit(f"error: this system has no {TCP}, so other users cannot be kept out of {name}: use Linux")
    module = importlib.import_module(name)
    if getattr(module, "uvicorn", None) is not uvicorn:
        sys.exit(
            f"error: flapp cannot keep other users out of Flower {package_version}, whose {name} does not use "
            "uvicorn: install the version of Flower that flapp was tested with (see flwr in pyproject.toml)"
        )

    def run(app: Any, **options: Any) -> None:
        uvicorn.run(app, http=OwnerOnly, **options)

    def config(app: Any, **options: Any) -> uvicorn.Config:
        return uvicorn.Config(app, http=OwnerOnly, **options)

    vars(module)["uvicorn"] = SimpleNamespace(run=run, Config=config, Server=uvicorn.Server)


if __name__ == "__main__":
    module = PROGRAMS[sys.argv.pop(1)]
    protect(module)
    sys.exit(getattr(importlib.import_module(module), module.rpartition(".")[2])())
