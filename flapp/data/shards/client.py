"""The shard: all that one client holds, in a folder of its own.

    client_<id>/train.safetensors     images uint8 (n, 28, 28), labels int64 (n,); so too val and test
                val.safetensors
                test.safetensors
                meta.json             client_id, num_samples per split, label_hist (training samples of each class),
                                      writers, sha256 of each file, and the recipe: seed, fractions, SHA-256 of source;
                                      digest, the SHA-256 of all the rest

Equal samples, seed and fractions give equal bytes: JSON keys are sorted, nothing is dated, and the safetensors files
carry no metadata (of which two entries would come in a random order).
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapp.data.artifact import DataError
from flapp.data.assign import SPLITS
from flapp.data.shards.split_file import (
    REMEDY,
    SplitFacts,
    SplitWriter,
    digest_of,
    inspect_split,
    sync_folder,
    write_synced,
)
from flapp.untrusted import printable, read_json

if TYPE_CHECKING:
    from flapp.data.shards.dataset import ShardSplit, ShardStream

FORMAT_VERSION = 1
_META_TYPES: dict[str, Any] = {
    "client_id": str,
    "num_samples": dict,
    "label_hist": list,
    "writers": list,
    "sha256": dict,
    "recipe": dict,
    "digest": str,
}

SHARD_FILES = ("meta.json", *(f"{split}.safetensors" for split in SPLITS))

log = logging.getLogger(__name__)


class DistributedShardLoader:
    """Check and read the shard of one client, and nothing outside its folder.

    strict_check refuses a shard whose meta.json does not fit its tensors or expected_client_id, False warns and goes
    by the tensors; streaming reads block by block. num_samples: by split; label_hist: training samples of each of the
    62 classes; last_modified: seconds since the epoch; digest: SHA-256 that names client and content. Raises
    DataError, in one line, also for a shard that is missing or cannot be read at all.
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
        meta, found, faults = _inspect(self.path)
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
        real = _real(found)
        self.num_samples: dict[str, int] = real["num_samples"]
        self.label_hist: list[int] = real["label_hist"]
        self.sha256: dict[str, str] = real["sha256"]
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
    wrong = _wrong_key(meta)
    if wrong:
        raise DataError(
            f"{path} is not of a shard of format {FORMAT_VERSION} ({printable(wrong)}): make it with {REMEDY}"
        )
    return meta


def verified_meta(folder: Path) -> dict[str, Any] | None:
    """Return the meta of a shard that is whole, None for one that is damaged or missing."""
    try:
        meta, _, faults = _inspect(folder)
    except DataError:
        return None
    return None if faults else meta


def write_shard(
    folder: Path, recipe: Mapping[str, Any], counts: Mapping[str, int], parts: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Write one client's shard whole or not at all, a writer at a time, and return its meta.

    recipe: client_id, writers, and what else decides the content; counts: samples per split; parts: for each writer
    the (images, labels) of every split. The files are on disk when it returns, the folder's name once the folder
    above it is synced.
    """
    partial = folder.with_name(f".{folder.name}.tmp")
    partial.mkdir(parents=True)
    files = {split: SplitWriter(partial / f"{split}.safetensors", count) for split, count in counts.items()}
    for part in parts:
        for split, (images, labels) in part.items():
            files[split].add(images, labels)
    hashes = {f"{split}.safetensors": file.close() for split, file in files.items()}
    rest = {key: value for key, value in recipe.items() if key not in ("client_id", "writers")}
    meta = {
        "format_version": FORMAT_VERSION,
        "dataset": "femnist",
        "client_id": recipe["client_id"],
        "writers": recipe["writers"],
        "recipe": rest,
        "num_samples": dict(counts),
        "label_hist": files["train"].histogram(),
        "sha256": hashes,
    }
    meta["digest"] = digest_of(meta)
    write_synced(partial / "meta.json", (json.dumps(meta, indent=1, sort_keys=True) + "\n").encode())
    sync_folder(partial)
    os.rename(partial, folder)
    return meta


def _inspect(folder: Path) -> tuple[dict[str, Any], dict[str, SplitFacts], list[str]]:
    meta = read_meta(folder)
    found = {split: inspect_split(folder / f"{split}.safetensors") for split in SPLITS}
    return meta, found, _faults(meta, found)


def _real(found: Mapping[str, SplitFacts]) -> dict[str, Any]:
    """Return what a meta says of its tensors, as the tensors themselves say it."""
    return {
        "num_samples": {split: facts.count for split, facts in found.items()},
        "label_hist": found["train"].histogram,
        "sha256": {f"{split}.safetensors": facts.sha256 for split, facts in found.items()},
    }


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
