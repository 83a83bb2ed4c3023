"""Write files atomically: each file appears whole or not at all, and is on disk when the function returns.

Files that must be whole are written by `replacing` or `replacing_folder`. `stamp` tells whether a file has changed.
Reading files that somebody else may have written is in untrusted.py.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Stamp = tuple[tuple[str | int, ...], ...]  # of files: it changes when one is written or removed


@contextmanager
def replacing(path: Path, mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to, and rename it to `path` when the block ends.

    Where the block raises, `path` stays as it was. mode: permissions that the file has from its first byte on.
    """
    partial = _beside(path)
    try:
        if mode is not None:
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path, is_new: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`, and rename it to `folder` when the block ends.

    A folder that is there already is replaced. If the block raises, it stays as it was. is_new: raise OSError if the
    folder has content when the block ends. Another process may have written this content, so it stays.
    """
    partial = _beside(folder)
    old = folder.with_name(f"{partial.name}.old")
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
        if folder.exists() and not is_new:
            os.replace(folder, old)  # a folder cannot be renamed onto one that has content
        os.replace(partial, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_bytes(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write a file whole or not at all."""
    with replacing(path, mode) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file whole or not at all; raises ValueError for NaN and the infinities; see `finite`."""
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return plain values with null for NaN and the infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def stamp(folder: Path, names: Sequence[str]) -> Stamp:
    """Return the stamp of files in a folder."""
    return tuple(stamp_of(os.path.join(folder, name)) for name in names)


def stamp_of(path: str) -> tuple[str | int, ...]:
    """Return a file's path, inode, size and times; only the path if there is no such file."""
    with suppress(OSError):
        facts = os.stat(path)
        return path, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
    return (path,)
