"""What code runs here: the digest of this package's source, and the versions of what it stands on."""

import hashlib
import platform
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path


def read_source() -> dict[str, bytes]:
    """Return this package's source files by their path in it, sorted."""
    package = Path(__file__).resolve().parent
    return {str(path.relative_to(package)): path.read_bytes() for path in sorted(package.rglob("*.py"))}


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Return the SHA-256 of this package's source files: server and clients must run the same."""
    digest = hashlib.sha256()
    for name, content in read_source().items():
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def versions() -> str:
    """Return the versions that decide a client's bytes, as one line."""
    packages = " ".join(f"{name}={version(name)}" for name in ("flwr", "torch", "numpy"))
    return f"python={platform.python_version()} {packages}"
