"""Make the keys and certificates of a deployment. Private keys can be read by their owner only.

    python -m tools.certificates server DIR --host fl.example.org      for a SuperLink, signed by a CA of its own
    python -m tools.certificates site DIR                              the key pair of a SuperNode

    DIR/ca.crt          the CA's certificate: every site and everyone who submits runs needs a copy
        ca.key          its private key (mode 0600): signs the next server certificate; keep it off the server
        server.crt      the SuperLink's certificate, for the given hosts and localhost, valid for --days days
        server.key      its private key (mode 0600)
        site.key        a SuperNode's private key (mode 0600): never leaves the site
        site.pub        its public key, which `flwr supernode register` takes

An existing CA and existing site keys are kept: running `server` again makes a new server certificate signed by the same
CA.
"""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flapp.files import write_bytes
from tools.cli import errors_in_one_line, new_parser

SERVER_DAYS = 397
LOOPBACK = ("localhost", "127.0.0.1")  # a SuperLink is also reached from its own machine
FORMAT = serialization.PrivateFormat.OpenSSH, serialization.PublicFormat.OpenSSH


def make_server_files(folder: Path, hosts: Sequence[str], days: int = SERVER_DAYS) -> None:
    """Write the CA's files, and a SuperLink's certificate and key for `hosts` (its names or addresses).

    Raises ValueError when one of the CA's two files is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ca = load_or_make_ca(folder)
    until = datetime.now(UTC) + timedelta(days=days)
    server = ca.issue_cert(*dict.fromkeys([*hosts, *LOOPBACK]), common_name=hosts[0], not_after=until)
    write_bytes(folder / "server.key", server.private_key_pem.bytes(), mode=0o600)
    write_bytes(folder / "server.crt", server.cert_chain_pems[0].bytes())


def load_or_make_ca(folder: Path) -> trustme.CA:
    """Return the CA in a folder, or make one if there is none."""
    key, certificate = folder / "ca.key", folder / "ca.crt"
    if key.exists() and certificate.exists():
        key.chmod(0o600)
        return trustme.CA.from_pem(certificate.read_bytes(), key.read_bytes())
    for there, missing in ((key, certificate), (certificate, key)):
        if there.exists():
            raise ValueError(f"{there} has no {missing.name} beside it: restore that file, or choose another folder")
    ca = trustme.CA(path_length=0, organization_name="flapp", organization_unit_name="flapp CA")
    write_bytes(key, ca.private_key_pem.bytes(), mode=0o600)
    write_bytes(certificate, ca.cert_pem.bytes())
    return ca


def make_site_keys(folder: Path) -> None:
    """Write the key pair by which a SuperNode proves its identity; an existing private key is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "site.key"
    if not path.exists():
        new = ec.generate_private_key(ec.SECP384R1())
        pem = new.private_bytes(serialization.Encoding.PEM, FORMAT[0], serialization.NoEncryption())
        write_bytes(path, pem, mode=0o600)
    path.chmod(0o600)
    public = serialization.load_ssh_private_key(path.read_bytes(), None).public_key()
    write_bytes(folder / "site.pub", public.public_bytes(serialization.Encoding.OpenSSH, FORMAT[1]) + b"\n")


@errors_in_one_line(OSError, ValueError, OverflowError)
def main(arguments: Sequence[str] | None = None) -> None:
    """Make what the command line asks for and print the paths."""
    parser = new_parser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    server = kinds.add_parser("server", help="certificate and key of a SuperLink")
    server.add_argument("folder", type=Path)
    server.add_argument("--host", action="append", required=True, help="a name or address of the SuperLink")
    server.add_argument("--days", type=int, default=SERVER_DAYS, help="validity of its certificate")
    site = kinds.add_parser("site", help="key pair of a SuperNode")
    site.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    if given.kind == "server":
        make_server_files(given.folder, given.host, given.days)
        names = ["ca.crt", "ca.key", "server.crt", "server.key"]
    else:
        make_site_keys(given.folder)
        names = ["site.key", "site.pub"]
    print("\n".join(str(given.folder / name) for name in names))


if __name__ == "__main__":
    sys.exit(main())
