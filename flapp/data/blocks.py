"""Blocks of an array's rows: hashed one by one, written one by one, and gone on with after a crash.

While <folder>/images.npy is written, <folder>/journal holds the plan, a line that says what is written, and then the
SHA-256 of each block that is on disk, a line each. Whoever comes after a crash with the same plan checks those blocks
and goes on behind the last good one.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np

BLOCK_BYTES = 16 << 20
JOURNAL = "journal"

ReadRows = Callable[[int, int], np.ndarray]


class DataError(ValueError):
    """Data that is missing, damaged or not what was asked for, said in one line with its remedy."""


def block_rows(row_bytes: int) -> int:
    """Return how many rows make a block: as many as fit into BLOCK_BYTES, and at least one."""
    return max(1, BLOCK_BYTES // max(1, row_bytes))


def block_hashes(array: np.ndarray) -> list[str]:
    """Return the SHA-256 of every block of `array`."""
    rows = block_rows(array[:1].nbytes)
    return [_sha256(array[start : start + rows]) for start in range(0, len(array), rows)]


def damaged_blocks(array: np.ndarray, hashes: Sequence[str], blocks: Sequence[int] | None = None) -> list[int]:
    """Return which of `blocks` (None: all) have another SHA-256 than in `hashes`, or are not there."""
    rows = block_rows(array[:1].nbytes)
    count = -(-len(array) // rows)
    wanted = range(max(count, len(hashes))) if blocks is None else blocks
    return [
        block
        for block in wanted
        if not block < min(count, len(hashes)) or _sha256(array[block * rows : (block + 1) * rows]) != hashes[block]
    ]


def write_npy(
    folder: Path,
    read: ReadRows,
    shape: Sequence[int],
    dtype: np.dtype,
    plan: str,
    progress: Callable[[int], object] = lambda rows: None,
) -> list[str]:
    """Write images.npy into `folder` where blocks that are there and good stay, and return the SHA-256s of all blocks.

    read(start, stop) returns those rows; `plan` is one line that says what is written: what was left by another plan
    is deleted. progress(n) is called for every n rows on disk. Raises DataError for a full disk and wrong rows.
    """
    row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
    rows = block_rows(row_bytes)
    hashes = _good_blocks(folder, plan, shape, dtype, rows)
    done = min(len(hashes) * rows, shape[0])
    _check_space(folder, (shape[0] - done) * row_bytes + 8 * shape[0] + 4096)
    progress(done)
    if not done:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    with (folder / JOURNAL).open("w") as journal:
        journal.writelines(f"{line}\n" for line in (plan, *hashes))
    with (folder / "images.npy").open("r+b" if done else "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + done * row_bytes)
        file.seek(0, os.SEEK_END)
        for start in range(done, shape[0], rows):
            stop = min(start + rows, shape[0])
            block = np.ascontiguousarray(read(start, stop))
            if block.dtype != dtype or block.shape != (stop - start, *shape[1:]):
                raise DataError(f"{folder}: images {start} to {stop} came as {block.dtype} {block.shape}")
            file.write(block.data)
            file.flush()
            hashes.append(_sha256(block))
            with (folder / JOURNAL).open("a") as journal:
                journal.write(f"{hashes[-1]}\n")
            progress(stop - start)
    return hashes


def _good_blocks(folder: Path, plan: str, shape: Sequence[int], dtype: np.dtype, rows: int) -> list[str]:
    """Return the hashes of the blocks that an earlier writer of the same plan left whole, up to the first bad one."""
    good: list[str] = []
    try:
        lines = (folder / JOURNAL).read_text().splitlines()
        with (folder / "images.npy").open("rb") as file:
            if lines[:1] != [plan] or np.lib.format.read_magic(file) != (1, 0):
                return []
            if np.lib.format.read_array_header_1_0(file) != (tuple(shape), False, dtype):
                return []
            for number, expected in enumerate(lines[1:]):
                count = min(rows, shape[0] - number * rows) * int(np.prod(shape[1:])) * dtype.itemsize
                if count <= 0 or hashlib.sha256(file.read(count)).hexdigest() != expected:
                    break
                good.append(expected)
    except (FileNotFoundError, ValueError, SyntaxError, TokenError):
        return []
    return good


def _check_space(folder: Path, needed: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DataError(
            f"{folder.with_suffix('')} needs {needed:,} bytes and its disk has {free:,} free: make room or set home"
        )


def _sha256(block: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(block).data).hexdigest()
