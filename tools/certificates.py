"""Keys and certificates of a deployment, made by `cryptography`; nobody else can read what is secret.

    python -m tools.certificates server DIR --host fl.example.org      of a SuperLink, with a CA of its own
    python -m tools.certificates site DIR                              the key pair of a SuperNode

    DIR/ca.crt          the CA's certificate: every site and everyone who submits runs needs a copy
        ca.key          its private key (mode 0600): signs the next server certificate; keep it off the server
        server.crt      the SuperLink's certificate, for the hosts given and localhost, for --days days
        server.key      its private key (mode 0600)
        site.key        a SuperNode's private key (mode 0600): never leaves the site
        site.pub        its public key, which `flwr supernode register` takes

What is there already stays: a second `server` makes a new server certificate under the same CA.
"""

import datetime
import ipaddress
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tools.running.called import as_called, new_parser

CA_DAYS, SERVER_DAYS = 3650, 397
LOOPBACK = ("localhost", "127.0.0.1")  # a SuperLink is also reached from its own machine
OTHER_USES = (  # of a key, which a CA's is not for
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("encipher_only", "decipher_only"),
)
PrivateKey = ec.EllipticCurvePrivateKey


def make_server_files(folder: Path, hosts: Sequence[str], days: int = SERVER_DAYS) -> None:
    """Write the certificate and key of a SuperLink that is reached as `hosts`, names or addresses, and its CA's.

    The certificate is for localhost and 127.0.0.1 too. Raises ValueError when a CA's certificate lies there without its
    key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ca_key, ca = _load_or_make_ca(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    alternatives = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys([*hosts, *LOOPBACK])])
    server = (
        _certificate(name, ca.subject, key, days)
        .add_extension(alternatives, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    _write(folder / "server.key", _pem(key), secret=True)
    _write(folder / "server.crt", server.public_bytes(serialization.Encoding.PEM))


def make_site_keys(folder: Path) -> None:
    """Write the key pair by which a SuperNode proves who it is, unless there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "site.key").exists():
        _write(folder / "site.key", _openssh(ec.generate_private_key(ec.SECP384R1())), secret=True)
    (folder / "site.key").chmod(0o600)
    key = serialization.load_ssh_private_key((folder / "site.key").read_bytes(), None)
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    _write(folder / "site.pub", key.public_key().public_bytes(encoding, form) + b"\n")


def _load_or_make_ca(folder: Path) -> tuple[PrivateKey, x509.Certificate]:
    paths = folder / "ca.key", folder / "ca.crt"
    if (there := [path for path in paths if path.exists()]) and len(there) < 2:
        missing = paths[1 - paths.index(there[0])]
        raise ValueError(f"{there[0]} has no {missing.name} beside it: bring that back, or choose another folder")
    if there:
        paths[0].chmod(0o600)
        key = serialization.load_pem_private_key(paths[0].read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key, x509.load_pem_x509_certificate(paths[1].read_bytes())
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "flapp CA")])
    usage = x509.KeyUsage(**dict.fromkeys(OTHER_USES, False), key_cert_sign=True, crl_sign=True)
    ca = (
        _certificate(name, name, key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    _write(paths[0], _pem(key), secret=True)
    _write(paths[1], ca.public_bytes(serialization.Encoding.PEM))
    return key, ca


def _certificate(subject: x509.Name, issuer: x509.Name, key: PrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: PrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _openssh(key: PrivateKey) -> bytes:
    form = serialization.PrivateFormat.OpenSSH
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write(path: Path, content: bytes, secret: bool = False) -> None:
    """Write a file whole; a secret one is never readable by others, not for a moment."""
    partial = path.with_name(path.name + ".tmp")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.replace(partial, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what the command line asks for and say where it is."""
    parser = new_parser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    server = kinds.add_parser("server", help="certificate and key of a SuperLink")
    server.add_argument("folder", type=Path)
    server.add_argument("--host", action="append", required=True, help="a name or address that it is reached by")
    server.add_argument("--days", type=int, default=SERVER_DAYS, help="that its certificate is valid")
    site = kinds.add_parser("site", help="key pair of a SuperNode")
    site.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    try:
        if given.kind == "server":
            make_server_files(given.folder, given.host, given.days)
        else:
            make_site_keys(given.folder)
    except (OSError, ValueError, OverflowError) as error:
        print(as_called(f"error: {error}"), file=sys.stderr)
        return 1
    names = ("ca.crt", "ca.key", "server.crt", "server.key") if given.kind == "server" else ("site.key", "site.pub")
    print("\n".join(str(given.folder / name) for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
