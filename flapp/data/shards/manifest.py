"""The manifest: what every client's shard holds. docs/formats.md describes its files.

A manifest is read and checked whole, once in a process for as long as its files stay the same.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, NonNegativeInt, Strict
from pydantic.dataclasses import dataclass

from flapp.data.artifact import DataError, check_settings, refusing
from flapp.data.shards.client import REMEDY, SPLITS, digest_of
from flapp.data.shards.source import Kind, Text, read_kind
from flapp.files import Stamp, stamp
from flapp.untrusted import parse_json, printable, read_bytes, read_json

FORMAT_VERSION = 2  # 1 had an index, clients.idx
FILES = ("manifest.json", "clients.jsonl")
MOST_LINES = 256 << 20  # bytes of clients.jsonl; 100,000 clients have about 40 MB
AGAIN = f"make the shards with {REMEDY} overwrite=true"


_Split = Annotated[str, Field(pattern=f"^({'|'.join(SPLITS)})$")]


@dataclass(frozen=True, config=ConfigDict(strict=True))
class ShardRecord:
    """What one client must hold; shard: its folder, relative to the manifest's; writers: how many."""

    client_id: Text
    shard: Text
    num_samples: Annotated[dict[_Split, NonNegativeInt], Field(min_length=len(SPLITS))]
    label_hist: Annotated[tuple[NonNegativeInt, ...], Strict(False)]  # JSON has a list
    writers: NonNegativeInt
    digest: Text


class Manifest(dict[str, ShardRecord]):
    """Records by client id, in counting order; facts: the content of manifest.json; kind: what the samples are."""

    def __init__(self, path: Path, facts: dict[str, Any], kind: Kind, records: dict[str, ShardRecord]) -> None:
        super().__init__(records)
        self.path = path
        self.folder = path.parent
        self.facts = facts
        self.kind = kind

    def shard_path(self, client_id: str) -> Path:
        """Return the absolute folder of a client's shard; raises DataError when it lies outside the manifest's."""
        folder = self.folder.resolve()
        path = (folder / self[client_id].shard).resolve()
        if not path.is_relative_to(folder):
            raise DataError(f"{self.path}: the shard of client {client_id} is {path}, outside {folder}")
        return path


def load_manifest(path: str | Path) -> Manifest:
    """Open and check a manifest, by its file or its folder; raises DataError if it is missing, foreign or damaged."""
    path = Path(path)
    path = path / "manifest.json" if path.is_dir() else path
    return _load(path, stamp(path.parent, FILES))


@lru_cache(maxsize=4)
def _load(path: Path, files: Stamp) -> Manifest:
    facts, kind = read_facts(path)
    records = _read_records(path.with_name("clients.jsonl"), facts)
    if (totals := totals_of(records.values())) != facts["totals"]:
        raise DataError(f"{path} says {printable(facts['totals'])}, its clients add up to {totals}: {AGAIN}")
    return Manifest(path, facts, kind, records)


def open_manifest(path: str | Path, clients: int, strategy: str, settings: tuple[Sequence[int], int, str]) -> Manifest:
    """Open the manifest of the shards of so many clients, cut by `strategy`; raises DataError for any other.

    settings: shape, number of classes and normalization.
    """
    manifest = load_manifest(path)
    check_settings(str(manifest.path), manifest.kind.settings, settings)
    if len(manifest) != clients:
        raise DataError(f"{manifest.path} lists {len(manifest)} clients: set clients={len(manifest)}")
    if manifest.facts["strategy"] != strategy:
        found = printable(manifest.facts["strategy"])
        raise DataError(f"{manifest.path} is of shards cut by partition={found}: set partition={found}")
    return manifest


def write_manifest(folder: Path, records: Sequence[ShardRecord], facts: Mapping[str, Any]) -> None:
    """Write clients.jsonl and manifest.json, with `facts` and the totals, into a folder that is not yet in place."""
    lines = "".join(json.dumps(asdict(record), sort_keys=True) + "\n" for record in records)
    sha256 = hashlib.sha256(lines.encode()).hexdigest()
    whole = {**facts, "format_version": FORMAT_VERSION, "totals": totals_of(records), "clients_sha256": sha256}
    whole["digest"] = digest_of(whole)
    (folder / "clients.jsonl").write_text(lines)
    (folder / "manifest.json").write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


def totals_of(records: Collection[ShardRecord]) -> dict[str, int]:
    """Add up clients, writers and the samples of each split."""
    samples = {split: sum(record.num_samples[split] for record in records) for split in SPLITS}
    return {"clients": len(records), "writers": sum(record.writers for record in records), **samples}


def check_claim(
    record: ShardRecord | None,
    client_id: str,
    train: int,
    val: int | None,
    test: int,
    label_hist: Sequence[int],
    shard_digest: str,
) -> str | None:
    """Return how a client's claim differs from its record, in words, or None if it does not; val=None is ignored."""
    if record is None:
        return f"client {client_id} is not in the manifest"
    if record.client_id != client_id:
        return f"claims to be client {client_id}, the manifest's record is of client {record.client_id}"
    claimed = {"train": train, "val": val, "test": test}
    for split, count in claimed.items():
        if count is not None and count != record.num_samples[split]:
            return f"claims {count} {split} samples, the manifest says {record.num_samples[split]}"
    if tuple(label_hist) != record.label_hist:
        differing = [c for c, (a, b) in enumerate(zip(label_hist, record.label_hist, strict=False)) if a != b]
        where = f"first at class {differing[0]}" if differing else f"{len(label_hist)} classes"
        return f"claims a different label histogram from the manifest's ({where})"
    if shard_digest != record.digest:
        return f"its shard has digest {shard_digest[:12]}, the manifest says {record.digest[:12]}"
    return None


def read_facts(path: Path) -> tuple[dict[str, Any], Kind]:
    """Read manifest.json alone; raises DataError if it is missing, foreign or damaged."""
    with refusing(path, AGAIN, f"no manifest at {path}: {AGAIN}"):
        facts = read_json(path)
    version = facts.get("format_version") if isinstance(facts, dict) else type(facts).__name__
    if version != FORMAT_VERSION:
        raise DataError(f"{path} is not a manifest of format {FORMAT_VERSION} (found {printable(version)}): {AGAIN}")
    if not isinstance(facts.get("totals"), dict) or not {"clients_sha256", "strategy"} <= facts.keys():
        raise DataError(f"{path} lacks totals, strategy or digests: {AGAIN}")
    if facts.get("digest") != digest_of(facts):
        raise DataError(f"{path} was changed: it does not have the digest it states; {AGAIN}")
    with refusing(path, AGAIN):
        return facts, read_kind(facts)


def _read_records(path: Path, facts: dict[str, Any]) -> dict[str, ShardRecord]:
    records: dict[str, ShardRecord] = {}
    with refusing(path, AGAIN):
        content = read_bytes(path, MOST_LINES)
        if hashlib.sha256(content).hexdigest() != facts["clients_sha256"]:
            raise ValueError("it has a different SHA-256 from the one in manifest.json")
        for line in content.splitlines():
            record = _parse(line)
            if record.client_id in records:
                raise ValueError(f"it has client {record.client_id} twice")
            records[record.client_id] = record
    return records


def _parse(line: bytes) -> ShardRecord:
    record = ShardRecord(**parse_json(line))
    shard = Path(record.shard)
    if shard.is_absolute() or ".." in shard.parts:
        raise ValueError(f"the shard of client {record.client_id} is {shard}, outside the manifest's folder")
    return record
