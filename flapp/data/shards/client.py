"""The shard: everything that one client holds, in a folder of its own.

    client_<id>/train.safetensors     images uint8 (n, 28, 28), labels int64 (n,); val and test likewise
                val.safetensors
                test.safetensors
                meta.json             client_id, num_samples per split, label_hist (training samples of each class),
                                      writers, sha256 of each file, and the recipe: seed, fractions, SHA-256 of source;
                                      digest, the SHA-256 of all the rest

Equal samples, seed and fractions give equal bytes: JSON keys are sorted, nothing is dated, and the safetensors files
have a header of our own without metadata. They are written as the samples come and read block by block, so that memory
is bounded by the samples of one writer, not by those of the client.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from flapp.data.artifact import DataError
from flapp.data.shards.leaf import CLASSES, PIXELS, SIDE
from flapp.files import replacing_folder, sha256_of_file
from flapp.untrusted import check_safetensors, printable, read_json

if TYPE_CHECKING:
    from flapp.data.shards.dataset import ShardSplit, ShardStream

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")
SHARD_FILES = ("meta.json", *(f"{split}.safetensors" for split in SPLITS))
SAMPLE_BYTES = PIXELS + 8
REMEDY = "python -m tools.prepare_data dataset=femnist dataset.source=DIR clients=N partition=natural"
MOST_HEADER = 64 << 10  # bytes; ours has about 150
_BLOCK = 4096
_META_TYPES: dict[str, Any] = {
    "client_id": str,
    "num_samples": dict,
    "label_hist": list,
    "writers": list,
    "sha256": dict,
    "recipe": dict,
    "digest": str,
}

log = logging.getLogger(__name__)


class DistributedShardLoader:
    """Check and read the shard of one client, and nothing outside its folder.

    A shard whose meta.json does not fit its tensors or expected_client_id is refused; with strict_check=False this is
    a warning and the tensors count. streaming reads block by block. num_samples: by split; label_hist: training samples
    of each of the 62 classes; last_modified: seconds since the epoch; digest: the SHA-256 that names client and
    content. Raises DataError for a shard that is missing or cannot be read at all.
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
        self.streaming = streaming
        self.normalization = normalization
        meta = read_meta(self.path)
        found = {split: inspect_split(self.path / f"{split}.safetensors") for split in SPLITS}
        faults = _faults(meta, found)
        self.client_id: str = meta["client_id"]
        if expected_client_id is not None and self.client_id != expected_client_id:
            other = f"{self.path} is the shard of client {self.client_id}, not of client {expected_client_id}"
            if strict_check:
                raise DataError(f"{other}: set shard-path to the shard of client {expected_client_id}")
            log.warning(other)
        if faults and strict_check:
            raise DataError(f"{self.path} cannot be used: {'; '.join(faults)}; make it again with {REMEDY}")
        for fault in faults:
            log.warning("%s: %s", self.path, fault)
        self.num_samples: dict[str, int] = {split: facts.count for split, facts in found.items()}
        self.label_hist: list[int] = found["train"].histogram
        self.sha256: dict[str, str] = {f"{split}.safetensors": facts.sha256 for split, facts in found.items()}
        real = {"num_samples": self.num_samples, "label_hist": self.label_hist, "sha256": self.sha256}
        self.digest = digest_of(meta | real)
        self.last_modified = max((self.path / name).stat().st_mtime for name in SHARD_FILES)
        counts = ", ".join(f"{count} {split}" for split, count in self.num_samples.items())
        log.info("client %s: %s samples from %s", self.client_id, counts, self.path)

    def split(self, name: str) -> "ShardSplit | ShardStream":
        """Return train, val or test: a map-style dataset, or with streaming an iterable one in bounded memory."""
        from flapp.data.shards.dataset import ShardSplit, ShardStream

        if name not in SPLITS:
            raise DataError(f"{self.path} has no split {name}: choose one of {', '.join(SPLITS)}")
        path = self.path / f"{name}.safetensors"
        if self.streaming:
            return ShardStream(path, self.normalization)
        return ShardSplit(path, self.normalization, self.sha256[path.name])


def read_meta(folder: Path) -> dict[str, Any]:
    """Read the meta.json of a shard; raises DataError when it is missing or is not one."""
    path = folder / "meta.json"
    try:
        meta = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"no shard at {folder} (meta.json is missing): make it with {REMEDY}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): let this user read it") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): make the shard again with {REMEDY}") from error
    if wrong := _wrong_key(meta):
        raise DataError(
            f"{path} is not of a shard of format {FORMAT_VERSION} ({printable(wrong)}): make it with {REMEDY}"
        )
    return meta


def write_shard(
    folder: Path, recipe: Mapping[str, Any], counts: Mapping[str, int], parts: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Write one client's shard whole or not at all, a writer at a time, and return its meta.

    recipe: client_id, writers, and what else decides the content; counts: samples per split; parts: for each writer
    the (images, labels) of every split.
    """
    with replacing_folder(folder) as partial:
        files = {split: _SplitWriter(partial / f"{split}.safetensors", count) for split, count in counts.items()}
        for part in parts:
            for split, (images, labels) in part.items():
                files[split].add(images, labels)
        meta = {
            "format_version": FORMAT_VERSION,
            "dataset": "femnist",
            "client_id": recipe["client_id"],
            "writers": recipe["writers"],
            "recipe": {key: value for key, value in recipe.items() if key not in ("client_id", "writers")},
            "num_samples": dict(counts),
            "sha256": {f"{split}.safetensors": file.close() for split, file in files.items()},
            "label_hist": files["train"].histogram(),
        }
        meta["digest"] = digest_of(meta)
        (partial / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")
    return meta


class _SplitWriter:
    """Write one safetensors file whose size is known: images as they come and labels at the end."""

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
        """Write the labels and return the SHA-256 of the file."""
        for labels in self.labels:
            self._write(labels.tobytes())
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
        sha256 = sha256_of_file(path)
        with safe_open(path, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            kinds = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
            count = kinds.get("labels", ("", [-1]))[1][:1]
            if kinds != {"images": ("U8", [*count, SIDE, SIDE]), "labels": ("I64", count)}:
                found = ", ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in sorted(kinds.items()))
                raise DataError(
                    f"{path} holds {printable(found or 'nothing')} instead of images U8 [n, 28, 28] and labels "
                    f"I64 [n]: make it again with {REMEDY}"
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
    elif len(labels) and not any(images.any() for images, _ in read_blocks(path, len(labels))):
        fault = f"every image of {path.name} is all zero"
    return SplitFacts(len(labels), np.bincount(labels[known], minlength=CLASSES).tolist(), sha256, fault)


def count_rows(path: Path) -> int:
    """Return how many samples a split's file holds."""
    with safe_open(path, framework="numpy") as tensors:
        return tensors.get_slice("labels").get_shape()[0]


def read_blocks(path: Path, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield images and labels in blocks; the file is mapped anew for each, so that pages do not pile up."""
    return (read_rows(path, start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


def read_rows(path: Path, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 (n, 28, 28), and labels, int64 (n,), of the samples from start to before end."""
    if start == end:  # safetensors refuses to slice an empty tensor
        return np.empty((0, SIDE, SIDE), np.uint8), np.empty(0, np.int64)
    with safe_open(path, framework="numpy") as tensors:
        return tensors.get_slice("images")[start:end], tensors.get_slice("labels")[start:end]


def digest_of(facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON facts without the `digest` that states it."""
    rest = {key: value for key, value in facts.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _wrong_key(meta: Any) -> str | None:
    if not isinstance(meta, dict) or meta.get("format_version") != FORMAT_VERSION:
        return f"format_version {meta.get('format_version') if isinstance(meta, dict) else 'missing'}"
    wrong = [key for key, kind in _META_TYPES.items() if not isinstance(meta.get(key), kind)]
    wrong += [] if wrong or all(isinstance(name, str) for name in meta["writers"]) else ["writers"]
    wrong += [] if wrong or meta["client_id"].isprintable() else ["client_id"]
    return f"{wrong[0]} is missing or of a wrong type" if wrong else None


def _faults(meta: Mapping[str, Any], found: Mapping[str, SplitFacts]) -> list[str]:
    """Say where meta.json and the tensors differ, and which values cannot be FEMNIST's."""
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
