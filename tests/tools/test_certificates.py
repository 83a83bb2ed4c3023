"""Certificates and keys: Python's own TLS accepts them, and only their owner may read the private ones."""

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from tests.tools.conftest import Refusal
from tools.certificates import main, make_server_files, make_site_keys


def shake_hands(folder: Path, ca: Path, name: str) -> str:
    """Let a TLS server with the folder's certificate meet a client that trusts `ca`; return its protocol."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as plain:
            try:
                with context.wrap_socket(plain, server_side=True) as secure:
                    secure.recv(1)
            except (ssl.SSLError, ConnectionError):
                return

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client = ssl.create_default_context(cafile=str(ca))
        client.verify_flags |= ssl.VERIFY_X509_STRICT
        address = listener.getsockname()
        with socket.create_connection(address) as plain, client.wrap_socket(plain, server_hostname=name) as secure:
            return str(secure.version())
    finally:
        thread.join()


def test_a_server_certificate_is_good_for_its_hosts_and_a_second_one_is_signed_by_the_same_ca(tmp_path: Path) -> None:
    make_server_files(tmp_path, ["one.example.org", "10.0.0.7"])
    before = (tmp_path / "ca.crt").read_bytes()
    for name in ("one.example.org", "10.0.0.7", "localhost", "127.0.0.1"):
        assert shake_hands(tmp_path, tmp_path / "ca.crt", name) == "TLSv1.3"
    make_server_files(tmp_path, ["two.example.org"])
    assert (tmp_path / "ca.crt").read_bytes() == before
    assert shake_hands(tmp_path, tmp_path / "ca.crt", "two.example.org") == "TLSv1.3"


def test_another_host_and_another_ca_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        make_server_files(tmp_path / name, ["fl.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(tmp_path / "a", tmp_path / "a" / "ca.crt", "other.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path / "a", tmp_path / "b" / "ca.crt", "fl.example.org")


def test_a_ca_without_its_key_makes_no_certificates(tmp_path: Path, refusal: Refusal) -> None:
    make_server_files(tmp_path, ["one.example.org"])
    key = (tmp_path / "ca.key").read_bytes()
    for missing, there in (("ca.key", "ca.crt"), ("ca.crt", "ca.key")):
        (tmp_path / missing).rename(tmp_path / "elsewhere")
        error = refusal(main, "server", tmp_path, "--host", "one.example.org")
        assert error.startswith(f"error: {tmp_path}/{there} has no {missing} beside it")
        (tmp_path / "elsewhere").rename(tmp_path / missing)
    assert (tmp_path / "ca.key").read_bytes() == key


def test_private_keys_are_for_their_owner_only_and_stay_when_asked_again(tmp_path: Path) -> None:
    make_server_files(tmp_path, ["one.example.org"])
    make_site_keys(tmp_path)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    secret = {"ca.key", "server.key", "site.key"}
    assert {name for name, mode in modes.items() if mode == 0o600} == secret
    assert {name for name, mode in modes.items() if mode == 0o644} == {"ca.crt", "server.crt", "site.pub"}
    private = (tmp_path / "site.key").read_bytes()
    (tmp_path / "site.key").chmod(0o644)
    make_site_keys(tmp_path)
    assert (tmp_path / "site.key").read_bytes() == private
    assert stat.S_IMODE((tmp_path / "site.key").stat().st_mode) == 0o600


def test_a_sites_public_key_belongs_to_its_private_one(tmp_path: Path) -> None:
    assert main(["site", str(tmp_path)]) == 0
    private = load_ssh_private_key((tmp_path / "site.key").read_bytes(), None)
    public = load_ssh_public_key((tmp_path / "site.pub").read_bytes())
    assert private.public_key() == public
