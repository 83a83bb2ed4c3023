"""The public keys by which the server recognises clients: pinned in files, compared with those of the nodes."""

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)

from flapp.config.schema import ConfigError

PREFIX, SUFFIX = "client_", ".pub"
KEY_ERRORS = (ValueError, UnsupportedAlgorithm)


class ClientKeys:
    """Hold the pinned key of each client: `client_<id>.pub` in `folder`, an OpenSSH public key like `site.pub`.

    Raises ConfigError when the folder cannot be read or has no such file, when a file is not a key that Flower accepts,
    and when two clients have the same key.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._owners: dict[bytes, str] = {}
        try:
            paths = sorted(path for path in folder.iterdir() if path.match(f"{PREFIX}?*{SUFFIX}"))
            for path in paths:
                self._pin(path)
        except OSError as error:
            raise ConfigError(
                f"deployment.client_keys={folder}: {error.filename} cannot be read ({error.strerror}): "
                "give a folder of client_<id>.pub files"
            ) from error
        if not paths:
            raise ConfigError(
                f"deployment.client_keys={folder} has no client_<id>.pub file: copy each site's site.pub into it"
            )
        self._clients = set(self._owners.values())

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._clients

    def path(self, client_id: str) -> Path:
        """Return the file in which a client's key is pinned, or should be."""
        return self.folder / f"{PREFIX}{client_id}{SUFFIX}"

    def owner(self, pem: bytes) -> str | None:
        """Return the client whose pinned key is `pem`, which is a node's key as Flower sends it, or None."""
        try:
            return self._owners.get(_canonical(load_pem_public_key(pem)))
        except KEY_ERRORS:
            return None

    def _pin(self, path: Path) -> None:
        try:
            key = _canonical(load_ssh_public_key(path.read_bytes()))
        except KEY_ERRORS as error:
            raise ConfigError(
                f"{path} is not a public key of an elliptic curve ({error}): copy the site's site.pub again"
            ) from error
        client_id = path.name.removeprefix(PREFIX).removesuffix(SUFFIX)
        if other := self._owners.get(key):
            raise ConfigError(f"{self.path(other)} and {path} are the same key: give each site a key of its own")
        self._owners[key] = client_id


def _canonical(key: object) -> bytes:
    if not isinstance(key, EllipticCurvePublicKey):
        raise ValueError(f"it is a {type(key).__name__}")
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
