"""Read files from untrusted sources: refuse those that would hang, recurse or fill the memory.

Every function raises OSError for what cannot be read at all, and ValueError for content that is not acceptable. The
callers turn both into their own error, which names the file and the fix.
"""

import errno
import io
import json
import math
import os
import re
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from pydantic import ValidationError

MOST_BYTES = 32 << 20  # of one JSON text; Python's objects take up to 15 times as much memory
MOST_CONTAINERS = 1_000_000  # lists and objects in it
DEEPEST = 100  # lists and objects inside one another
MOST_HEADER = 8 << 20  # bytes of the header of a safetensors file
NPY_HEADER = 16_384  # bytes in which the header of a .npy file must end; numpy's own limit is 10,000
_LONG_NUMBER = re.compile(rb"\d{20}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NPY_ERRORS = (ValueError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError, LookupError, OverflowError)


def check_regular(path: Path) -> int:
    """Return the size of a file in bytes; raises OSError for a pipe, which would block, a device or a folder."""
    facts = os.stat(path)
    if stat.S_ISDIR(facts.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return facts.st_size


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file of at most `most` bytes."""
    if (size := check_regular(path)) > most:
        raise ValueError(f"it has {size:,} bytes, at most {most:,} are expected")
    with path.open("rb") as file:
        return file.read(most)


def read_json(path: Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the content of a JSON file; pairs: see json.loads's object_pairs_hook."""
    return parse_json(read_bytes(path), pairs)


def parse_json(
    text: bytes | str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None, surrogates: bool = False
) -> Any:
    """Return the value of a JSON text within the limits above, whose integers fit into 64 bits.

    Raises ValueError for anything else and, unless `surrogates`, for half surrogate pairs, which have no encoding.
    """
    text = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has {len(text):,} bytes, at most {MOST_BYTES:,} are expected")
    if text.count(b"[") + text.count(b"{") > MOST_CONTAINERS:
        raise ValueError(f"it has more than {MOST_CONTAINERS:,} lists and objects")
    parse_int = _bounded_int if _LONG_NUMBER.search(text) else None
    try:
        value = json.loads(text.decode(), object_pairs_hook=pairs, parse_int=parse_int)
    except RecursionError:
        raise ValueError(f"its lists and objects are more than {DEEPEST} deep") from None
    if text.count(b"[") + text.count(b"{") > DEEPEST:
        _check_depth(value)
    if not surrogates and _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text in it has half of a surrogate pair") from None
    return value


def _bounded_int(digits: str) -> int:
    if len(digits) > 20 or not -(1 << 63) <= int(digits) < 1 << 64:
        raise ValueError(f"the number {digits[:24]}... does not fit into 64 bits")
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        inner = (item for each in level for item in (each.values() if isinstance(each, dict) else each))
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(f"its lists and objects are more than {DEEPEST} deep")


def read_npy_header(start: bytes, kinds: str = "biuf") -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Return shape, Fortran order, dtype and offset of the first element of a .npy file from its first bytes.

    The dtype must be plain: of one of `kinds`, at most 8 bytes a number, little-endian. The shape must be of integers
    of at least 0. Raises ValueError for anything else, without allocating what the header claims.
    """
    # numpy writes version 1 unless the header is too long for it.
    length = 10 + int.from_bytes(start[8:10], "little")
    return _parse_npy_header(bytes(start[: length if bytes(start[6:7]) == b"\x01" else NPY_HEADER]), kinds)


@lru_cache(maxsize=1024)  # the arrays of a model have few different headers, and come again in every message
def _parse_npy_header(start: bytes, kinds: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    file = io.BytesIO(start[:NPY_HEADER])
    try:
        major, _ = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except _NPY_ERRORS as error:
        raise ValueError(f"its header is not one of a .npy array ({' '.join(str(error).split())[:200]})") from None
    if not all(type(length) is int and length >= 0 for length in shape) or len(shape) > 32:
        raise ValueError(f"its shape {str(shape)[:100]} is not of whole numbers from 0")
    text = dtype.kind in "SU" and dtype.kind in kinds
    if dtype.kind not in kinds or dtype.names or dtype.subdtype or not (1 <= dtype.itemsize <= (4096 if text else 8)):
        held = "Python objects" if dtype.hasobject else str(dtype)[:60]
        raise ValueError(f"it holds {held}, not plain numbers")
    if dtype.newbyteorder("<") != dtype:
        raise ValueError(f"its dtype {dtype} is not little-endian")
    if math.prod(max(length, 1) for length in shape) * dtype.itemsize >= 1 << 62:
        raise ValueError(f"its shape {str(shape)[:100]} is beyond all memory")
    return shape, fortran, dtype, file.tell()


def open_npy(path: Path, mode: str = "c", kinds: str = "biuf") -> np.ndarray:
    """Map a .npy file, of plain numbers, that ends where its array ends; mode: as numpy.memmap's."""
    size = check_regular(path)
    with path.open("rb") as file:
        shape, fortran, dtype, offset = read_npy_header(file.read(NPY_HEADER), kinds)
    needed = offset + math.prod(shape) * dtype.itemsize
    if needed != size:
        fault = "behind" if size > needed else "too few for"
        raise ValueError(f"it has {abs(size - needed):,} bytes {fault} its array")
    if needed == offset:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode, offset, shape, "F" if fortran else "C")  # type: ignore[call-overload]


def check_safetensors(path: Path, most_header: int = MOST_HEADER) -> None:
    """Raise ValueError unless a regular file may be of safetensors, with a header of sane size."""
    size = check_regular(path)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 8 or header > min(most_header, size - 8):
        raise ValueError(f"its header claims {header:,} bytes, at most {most_header:,} are expected within the file")


def printable(value: object, most: int = 300) -> str:
    """Return text on one line without control characters, cut off at `most` characters."""
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(value)[: most + 1])
    return text if len(text) <= most else text[:most] + "..."


def one_line(error: Exception) -> str:
    """Return what an error says; for one of pydantic, the first faulty place, what must be there and what is there."""
    if not isinstance(error, ValidationError):
        return printable(repr(error) if isinstance(error, LookupError) else error)
    fault = error.errors(include_url=False)[0]
    place, found = ".".join(map(str, fault["loc"])), fault["input"]
    said = f"{place}: " * bool(place) + fault["msg"].removeprefix("Value error, ")
    if fault["type"] != "missing":
        said += f", got {repr(found) if isinstance(found, str | int | float | None) else f'a {type(found).__name__}'}"
    return printable(said)
