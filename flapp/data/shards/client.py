"""The shard: everything that one client holds, in a folder of its own. docs/formats.md describes its files.

Equal samples, seed and fractions give equal bytes: JSON keys are sorted, no file contains a date, and the safetensors
files have a header of our own without metadata. They are written as the samples come and read block by block, so that
memory is bounded.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pydantic
from safetensors import safe_open

from flapp.data.artifact import DataError, refusing
from flapp.data.shards.source import Kind, Text, block_rows, read_kind
from flapp.files import replacing_folder, sha256_of_file
from flapp.untrusted import check_safetensors, printable, read_json

if TYPE_CHECKING:
    from flapp.data.shards.dataset import ShardSplit, ShardStream

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")
SHARD_FILES = ("meta.json", *(f"{split}.safetensors" for split in SPLITS))
REMEDY = "python -m tools.prepare_data dataset=DATASET dataset.source=DIR clients=N partition=natural"
AGAIN = f"make it again with {REMEDY}"
MOST_HEADER = 64 << 10  # bytes; ours has about 150

Part = tuple[str, np.ndarray, np.ndarray]  # split, images, labels

log = logging.getLogger(__name__)


class DistributedShardLoader:
    """Check and read the shard of one client, and nothing outside its folder.

    A shard whose meta.json does not fit its tensors or expected_client_id is refused; with strict_check=False there is
    only a warning, and what the tensors say is used. streaming reads block by block. kind: the shape of the images, and
    the classes; num_samples: by split; label_hist: training samples of each class; last_modified: seconds since the
    epoch; digest: the SHA-256 that names client and content. Raises DataError for a shard that is missing or cannot be
    read at all.
    """

    def __init__(
        self,
        shard_path: str | Path,
        strict_check: bool = True,
        streaming: bool = False,
        expected_client_id: str | None = None,
        normalization: str = "half",
    ) -> None:
        self.path = Path(shard_path)
        self.strict_check = strict_check
        self.streaming = streaming
        self.normalization = normalization
        meta = read_meta(self.path)
        with refusing(self.path / "meta.json", AGAIN):
            self.kind = read_kind(meta)
        found = {split: inspect_split(self.path / f"{split}.safetensors", self.kind) for split in SPLITS}
        self.client_id: str = meta["client_id"]
        if expected_client_id not in (None, self.client_id):
            fault = f"is the shard of client {self.client_id}, not of client {expected_client_id}"
            self._refuse(fault, f"set shard-path to the shard of client {expected_client_id}")
        if faults := _faults(meta, found):
            self._refuse(f"cannot be used: {'; '.join(faults)}", AGAIN)
        real = _facts_of(found)
        self.num_samples: dict[str, int] = real["num_samples"]
        self.label_hist: list[int] = real["label_hist"]
        self.sha256: dict[str, str] = real["sha256"]
        self.digest = digest_of(meta | real)
        self.last_modified = max((self.path / name).stat().st_mtime for name in SHARD_FILES)
        counts = ", ".join(f"{count} {split}" for split, count in self.num_samples.items())
        log.info("client %s: %s samples from %s", self.client_id, counts, self.path)

    def _refuse(self, fault: str, fix: str) -> None:
        if self.strict_check:
            raise DataError(f"{self.path} {fault}: {fix}")
        log.warning("%s %s", self.path, fault)

    def split(self, name: str) -> "ShardSplit | ShardStream":
        """Return train, val or test: a map-style dataset, or with streaming an iterable one in bounded memory."""
        from flapp.data.shards.dataset import ShardSplit, ShardStream

        if name not in SPLITS:
            raise DataError(f"{self.path} has no split {name}: choose one of {', '.join(SPLITS)}")
        path = self.path / f"{name}.safetensors"
        if self.streaming:
            return ShardStream(path, self.normalization, kind=self.kind)
        return ShardSplit(path, self.normalization, self.sha256[path.name], self.kind)


@pydantic.dataclasses.dataclass(config={"strict": True})
class _Meta:
    """What the meta.json of a shard must have, whatever else it says."""

    format_version: Literal[1]
    client_id: Text
    num_samples: dict[str, Any]
    label_hist: list[Any]
    writers: list[str]
    sha256: dict[str, Any]
    recipe: dict[str, Any]
    digest: str


def read_meta(folder: Path) -> dict[str, Any]:
    """Read the meta.json of a shard; raises DataError when it is missing or is not one."""
    path = folder / "meta.json"
    with refusing(path, AGAIN, f"no shard at {folder} (meta.json is missing): make it with {REMEDY}"):
        meta = read_json(path)
        _Meta(**meta)
    return meta


def write_shard(
    folder: Path, kind: Kind, recipe: Mapping[str, Any], counts: Mapping[str, int], parts: Iterable[Part]
) -> dict[str, Any]:
    """Write one client's shard whole or not at all, as its samples come, and return its meta.

    recipe: client_id, writers, and what else decides the content; counts: samples per split; parts: see Part.
    """
    with replacing_folder(folder) as partial:
        paths = {split: partial / f"{split}.safetensors" for split in counts}
        labels: dict[str, list[np.ndarray]] = {split: [] for split in counts}
        with ExitStack() as stack:
            files = {split: stack.enter_context(path.open("wb")) for split, path in paths.items()}
            for split, file in files.items():
                file.write(_header(kind, counts[split]))
            for split, images, names in parts:
                files[split].write(images.tobytes())
                labels[split].append(names)
            for split, file in files.items():
                file.write(b"".join(names.astype("<i8").tobytes() for names in labels[split]))
        found = {split: inspect_split(path, kind) for split, path in paths.items()}
        if faults := [facts.fault for facts in found.values() if facts.fault]:
            raise DataError(f"{folder} cannot be used: {faults[0]}; remove such images from the source")
        rest = {key: value for key, value in recipe.items() if key not in ("client_id", "writers")}
        meta = {"format_version": FORMAT_VERSION, "client_id": recipe["client_id"]} | kind.facts()
        meta |= {"writers": recipe["writers"], "recipe": rest} | _facts_of(found)
        meta["digest"] = digest_of(meta)
        (partial / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")
    return meta


def _header(kind: Kind, count: int) -> bytes:
    """Return the first bytes of a safetensors file that holds images and, behind them, labels."""
    end = count * kind.pixels
    images = {"dtype": "U8", "shape": [count, *kind.stored], "data_offsets": [0, end]}
    labels = {"dtype": "I64", "shape": [count], "data_offsets": [end, end + count * 8]}
    header = json.dumps({"images": images, "labels": labels}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


@dataclass(frozen=True)
class SplitFacts:
    """What a split's file really holds; fault: what is wrong with its values, if anything."""

    count: int
    histogram: list[int]
    sha256: str
    fault: str | None


def inspect_split(path: Path, kind: Kind) -> SplitFacts:
    """Read and hash a split's file, a block at a time; raises DataError when it is not such a file at all."""
    with refusing(path, AGAIN):
        check_safetensors(path, MOST_HEADER)
        sha256 = sha256_of_file(path)
        with safe_open(path, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            kinds = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
            count = kinds.get("labels", ("", [-1]))[1][:1]
            if kinds != {"images": ("U8", [*count, *kind.stored]), "labels": ("I64", count)}:
                found = ", ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in sorted(kinds.items()))
                wanted = f"images U8 [n, {', '.join(map(str, kind.stored))}] and labels I64 [n]"
                raise DataError(f"{path} holds {printable(found or 'nothing')} instead of {wanted}: {AGAIN}")
            labels = tensors.get_tensor("labels")
    classes = len(kind.classes)
    known = (labels >= 0) & (labels < classes)
    fault = None
    if not known.all():
        fault = f"{path.name} has label {labels[~known][0]}, {kind.dataset} has 0 to {classes - 1}"
    elif len(labels) and not any(images.any() for images, _ in read_blocks(path, len(labels), kind)):
        fault = f"every image of {path.name} is all zero"
    return SplitFacts(len(labels), np.bincount(labels[known], minlength=classes).tolist(), sha256, fault)


def count_rows(path: Path) -> int:
    """Return how many samples a split's file holds."""
    with safe_open(path, framework="numpy") as tensors:
        return tensors.get_slice("labels").get_shape()[0]


def read_blocks(path: Path, count: int, kind: Kind) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield images and labels in blocks; the file is mapped anew for each, so that pages do not pile up."""
    size = block_rows(kind)
    return (read_rows(path, start, min(start + size, count), kind) for start in range(0, count, size))


def read_rows(path: Path, start: int, end: int, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 (n, *kind.stored), and labels, int64 (n,), of the samples from start to before end."""
    if start == end:  # safetensors refuses to slice an empty tensor
        return np.empty((0, *kind.stored), np.uint8), np.empty(0, np.int64)
    with safe_open(path, framework="numpy") as tensors:
        return tensors.get_slice("images")[start:end], tensors.get_slice("labels")[start:end]


def digest_of(facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON facts without the `digest` that states it."""
    rest = {key: value for key, value in facts.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _facts_of(found: Mapping[str, SplitFacts]) -> dict[str, Any]:
    """Return what meta.json must say of these files."""
    return {
        "num_samples": {split: facts.count for split, facts in found.items()},
        "label_hist": found["train"].histogram,
        "sha256": {f"{split}.safetensors": facts.sha256 for split, facts in found.items()},
    }


def _faults(meta: Mapping[str, Any], found: Mapping[str, SplitFacts]) -> list[str]:
    """Say where meta.json and the tensors differ, and which values cannot be."""
    faults = []
    for split, facts in found.items():
        name = f"{split}.safetensors"
        if facts.fault:
            faults.append(facts.fault)
        if (said := meta["num_samples"].get(split)) != facts.count:
            faults.append(f"{name} has {facts.count} samples, meta.json says {said}")
        if (said := meta["sha256"].get(name)) != facts.sha256:
            faults.append(f"{name} has SHA-256 {facts.sha256[:12]}, meta.json says {str(said)[:12]}")
    if meta["label_hist"] != found["train"].histogram:
        faults.append("label_hist of meta.json is not the histogram of the training labels")
    if not faults and meta["digest"] != digest_of(meta):
        faults.append("meta.json was changed: it does not have the digest it states")
    return faults
