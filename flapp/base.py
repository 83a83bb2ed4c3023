"""Store the frozen base of adapters on disk, as home/models/<digest>/base.safetensors.

The digest covers the tensors only, not the file that they came from. A node that receives a base stores it only if its
digest is correct.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from flapp.model.files import load_tensors, save_tensors, widen

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DAMAGED = "damaged"  # in place of the digest of a file that cannot be read


@dataclass(frozen=True, eq=False)
class Base:
    """The frozen tensors of a model, and the digest that names them."""

    digest: str
    tensors: Mapping[str, "Tensor"]


class BaseError(ValueError):
    """A base that is missing or does not match its name."""


def digest_of(tensors: "Mapping[str, Tensor | np.ndarray]") -> str:
    """Return the digest of tensors; PyTorch is imported here because some users of this module never need it."""
    from flapp.checkpoint import tensors as tensor_bytes

    return tensor_bytes.digest_of(tensors)


def keep_base(models: Path, tensors: Mapping[str, "Tensor"]) -> Base:
    """Store a base below `models` unless it is there already, in the dtypes in which its tensors are sent."""
    tensors = {key: widen(tensor) for key, tensor in tensors.items()}
    base = Base(digest_of(tensors), tensors)
    path = base_path(models, base.digest)
    if find_base(models, base.digest) != base.digest:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, path)
    return base


def find_base(models: Path, digest: str) -> str:
    """Return the digest of the file in which the base `digest` is kept: `digest` itself if the file is intact.

    Returns DAMAGED if the file cannot be read, and "" if there is none.
    """
    path = base_path(models, digest)
    try:
        facts = path.stat()
    except FileNotFoundError:
        return ""
    return _digest_of_file(path, facts.st_mtime_ns, facts.st_size)


def load_base(models: Path, digest: str) -> dict[str, "Tensor"]:
    """Read a base; raises BaseError when it is missing or has another digest."""
    found, path = find_base(models, digest), base_path(models, digest)
    if not found:
        raise BaseError(f"{path} is missing: restart this client, which then receives it")
    if found != digest:
        what = "is damaged" if found == DAMAGED else f"holds base {found[:12]}"
        raise BaseError(f"{path} {what}: remove it and restart this client, which then receives it again")
    return load_tensors(path)[0]


def receive_base(models: Path, digest: str, tensors: Mapping[str, "Tensor"]) -> None:
    """Store a base that has arrived; raises BaseError when it has another digest than the server named."""
    base_path(models, digest)  # before anything is read or written, the name must be a digest
    if (found := digest_of(tensors)) != digest:
        what = f"the base that arrived has digest {found[:12]}, the server's is {digest[:12]}"
        raise BaseError(f"{what}: the server sends it again")
    keep_base(models, tensors)


def base_path(models: Path, digest: str) -> Path:
    """Return the path of a base; raises BaseError for a name that is not a digest."""
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise BaseError(f"{digest!r} is not the digest of a base")
    return models / digest / "base.safetensors"


@lru_cache(maxsize=16)
def _digest_of_file(path: Path, modified: int, size: int) -> str:
    """Return the digest of a file's tensors, or DAMAGED; the file is read again only when it has changed."""
    try:
        return digest_of(load_tensors(path)[0])
    except ValueError:
        return DAMAGED
