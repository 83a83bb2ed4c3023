"""The file of one split of a shard: images uint8 (n, 28, 28) and labels int64 (n,) in safetensors.

Written as the samples come, read whole or block by block; the header is our own, so that equal samples give equal
bytes and memory is bounded by one writer's samples, not by one client's.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from flapp.data.artifact import DataError
from flapp.data.leaf import CLASSES, PIXELS, SIDE
from flapp.untrusted import check_safetensors, printable

SAMPLE_BYTES = PIXELS + 8
REMEDY = "python -m tools.prepare_data dataset=femnist dataset.source=DIR clients=N partition=natural"
MOST_HEADER = 64 << 10  # bytes; ours has about 150
_BLOCK = 4096


class SplitWriter:
    """Write one safetensors file whose size is known, images as they come and labels at the end."""

    def __init__(self, path: Path, count: int) -> None:
        images = {"dtype": "U8", "shape": [count, SIDE, SIDE], "data_offsets": [0, count * PIXELS]}
        labels = {"dtype": "I64", "shape": [count], "data_offsets": [count * PIXELS, count * SAMPLE_BYTES]}
        header = json.dumps({"images": images, "labels": labels}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self.path = path
        self.blank = count > 0
        self.labels: list[np.ndarray] = []
        self.file = path.open("wb")
        self.hash = hashlib.sha256()
        self._write(len(header).to_bytes(8, "little") + header)

    def add(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.blank = self.blank and not images.any()
        self._write(np.ascontiguousarray(images).tobytes())
        self.labels.append(labels.astype("<i8"))

    def histogram(self) -> list[int]:
        return np.bincount(np.concatenate(self.labels), minlength=CLASSES).tolist()

    def close(self) -> str:
        for labels in self.labels:
            self._write(labels.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.blank:
            raise DataError(f"every image of {self.path} would be all zero: remove blank images from the source")
        return self.hash.hexdigest()

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self.hash.update(content)


@dataclass(frozen=True)
class SplitFacts:
    """What a split's file really holds; fault: what is wrong with its values, if anything."""

    count: int
    histogram: list[int]
    sha256: str
    fault: str | None


def inspect_split(path: Path) -> SplitFacts:
    """Read and hash a split's file, a block at a time; raises DataError when it is not such a file at all."""
    try:
        check_safetensors(path, MOST_HEADER)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with safe_open(path, framework="numpy") as tensors:
            kinds = {name: _kind(tensors.get_slice(name)) for name in tensors.keys()}  # noqa: SIM118
            count = kinds.get("labels", ("", [-1]))[1][:1]
            if kinds != {"images": ("U8", [*count, SIDE, SIDE]), "labels": ("I64", count)}:
                found = ", ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in sorted(kinds.items()))
                found = printable(found)
                raise DataError(
                    f"{path} holds {found or 'nothing'} instead of images U8 [n, 28, 28] and labels I64 [n]: "
                    f"make it again with {REMEDY}"
                )
            labels = tensors.get_tensor("labels")
    except FileNotFoundError:
        raise DataError(f"{path} is missing: make the shard again with {REMEDY}") from None
    except DataError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({printable(error)}): make the shard again with {REMEDY}") from error
    known = (labels >= 0) & (labels < CLASSES)
    fault = None
    if not known.all():
        fault = f"{path.name} has label {labels[~known][0]}, FEMNIST has 0 to {CLASSES - 1}"
    elif len(labels) and not any(images.any() for images, _ in read_blocks(path, len(labels), _BLOCK)):
        fault = f"every image of {path.name} is all zero"
    return SplitFacts(len(labels), np.bincount(labels[known], minlength=CLASSES).tolist(), sha256, fault)


def count_rows(path: Path) -> int:
    """Return how many samples a split's file holds."""
    with safe_open(path, framework="numpy") as tensors:
        return tensors.get_slice("labels").get_shape()[0]


def read_blocks(path: Path, count: int, rows: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yield images and labels block by block; the file is mapped anew for each, so that pages do not pile up."""
    return (read_rows(path, start, min(start + rows, count)) for start in range(0, count, rows))


def read_rows(path: Path, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 (n, 28, 28), and labels, int64 (n,), of the samples from start to before end."""
    if start == end:  # which safetensors refuses to slice out of an empty tensor
        return np.empty((0, SIDE, SIDE), np.uint8), np.empty(0, np.int64)
    with safe_open(path, framework="numpy") as tensors:
        return tensors.get_slice("images")[start:end], tensors.get_slice("labels")[start:end]


def digest_of(facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON facts, all but the `digest` that states it."""
    rest = {key: value for key, value in facts.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _kind(tensor: Any) -> tuple[str, list[int]]:
    return tensor.get_dtype(), tensor.get_shape()
