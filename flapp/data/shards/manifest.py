"""The manifest: what every client's shard holds.

    manifest.json    format_version, dataset, strategy, seed, fractions, totals, SHA-256 of all recipes and of
                     clients.jsonl and, as digest, of all the rest
    clients.jsonl    one line a client, in counting order: client_id, shard (its folder, relative), num_samples per
                     split, label_hist (training samples of each class), writers (how many), digest

A manifest is read and checked whole, once in a process for as long as its files stay the same.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from flapp.data.artifact import DataError, Stamp, stamp
from flapp.data.shards.client import REMEDY, SPLITS, digest_of
from flapp.untrusted import check_regular, parse_json, printable, read_json

FORMAT_VERSION = 2  # 1 had an index, clients.idx
FILES = ("manifest.json", "clients.jsonl")
MOST_LINES = 256 << 20  # bytes of clients.jsonl; 100,000 clients have about 40 MB
AGAIN = f"make the shards with {REMEDY} overwrite=true"


@dataclass(frozen=True)
class ShardRecord:
    """What one client must hold; shard: its folder, relative to the manifest's; writers: how many."""

    client_id: str
    shard: str
    num_samples: Mapping[str, int]
    label_hist: tuple[int, ...]
    writers: int
    digest: str


class Manifest(Mapping[str, ShardRecord]):
    """Map client ids to records, in counting order; facts: the content of manifest.json."""

    def __init__(self, path: Path, facts: dict[str, Any], records: dict[str, ShardRecord]) -> None:
        self.path = path
        self.folder = path.parent
        self.facts = facts
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __getitem__(self, client_id: str) -> ShardRecord:
        return self._records[client_id]

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
    facts = _read_facts(path)
    records = _read_records(path.with_name("clients.jsonl"), facts)
    if (totals := totals_of(records.values())) != facts["totals"]:
        raise DataError(f"{path} says {printable(facts['totals'])}, its clients add up to {totals}: {AGAIN}")
    return Manifest(path, facts, records)


def open_manifest(path: str | Path, clients: int, strategy: str) -> Manifest:
    """Open a manifest of the shards of `clients` clients, cut by `strategy`; raises DataError for another one."""
    manifest = load_manifest(path)
    if len(manifest) != clients:
        raise DataError(f"{manifest.path} lists {len(manifest)} clients: set clients={len(manifest)}")
    if manifest.facts["strategy"] != strategy:
        found = printable(manifest.facts["strategy"])
        raise DataError(f"{manifest.path} is of shards cut by partition={found}: set partition={found}")
    return manifest


def write_manifest(folder: Path, records: Sequence[ShardRecord], facts: Mapping[str, Any]) -> None:
    """Write clients.jsonl and manifest.json, with `facts` and the totals, into a folder that is not yet in place."""
    lines = "".join(json.dumps(asdict(record), sort_keys=True) + "\n" for record in records)
    whole = dict(facts) | {
        "format_version": FORMAT_VERSION,
        "totals": totals_of(records),
        "clients_sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }
    whole["digest"] = digest_of(whole)
    (folder / "clients.jsonl").write_text(lines)
    (folder / "manifest.json").write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


def totals_of(records: Iterable[ShardRecord]) -> dict[str, int]:
    """Add up clients, writers and the samples of each split."""
    totals = {"clients": 0, "writers": 0, "train": 0, "val": 0, "test": 0}
    for record in records:
        totals["clients"] += 1
        totals["writers"] += record.writers
        for split in SPLITS:
            totals[split] += record.num_samples[split]
    return totals


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
        return f"claims another label histogram than the manifest says ({where})"
    if shard_digest != record.digest:
        return f"its shard has digest {shard_digest[:12]}, the manifest says {record.digest[:12]}"
    return None


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = read_json(path)
    except OSError as error:
        raise DataError(f"no manifest at {path} ({error.strerror}): {AGAIN}") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): {AGAIN}") from error
    version = facts.get("format_version") if isinstance(facts, dict) else type(facts).__name__
    if version != FORMAT_VERSION:
        raise DataError(f"{path} is not a manifest of format {FORMAT_VERSION} (found {printable(version)}): {AGAIN}")
    if not isinstance(facts.get("totals"), dict) or not {"clients_sha256", "strategy"} <= facts.keys():
        raise DataError(f"{path} lacks totals, strategy or digests: {AGAIN}")
    if facts.get("digest") != digest_of(facts):
        raise DataError(f"{path} was changed: it does not have the digest it states; {AGAIN}")
    return facts


def _read_records(path: Path, facts: dict[str, Any]) -> dict[str, ShardRecord]:
    try:
        if (size := check_regular(path)) > MOST_LINES:
            raise DataError(f"{path} has {size:,} bytes, at most {MOST_LINES:,} are expected: {AGAIN}")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {AGAIN}") from error
    if hashlib.sha256(content).hexdigest() != facts["clients_sha256"]:
        raise DataError(f"{path} has another SHA-256 than manifest.json says: {AGAIN}")
    records: dict[str, ShardRecord] = {}
    for line in content.splitlines():
        record = _parse(line, path)
        if record.client_id in records:
            raise DataError(f"{path} has client {record.client_id} twice: {AGAIN}")
        records[record.client_id] = record
    return records


def _parse(line: bytes, path: Path) -> ShardRecord:
    try:
        values = parse_json(line)
        record = ShardRecord(**values | {"label_hist": tuple(values["label_hist"])})
        counts = [record.num_samples[split] for split in SPLITS]
        sound = all(type(n) is int and n >= 0 for n in [*counts, *record.label_hist, record.writers])
        sound = sound and all(isinstance(text, str) for text in (record.client_id, record.shard, record.digest))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} has a line that is not a record ({printable(repr(error))}): {AGAIN}") from error
    if not sound:
        raise DataError(f"{path} has a record of wrong types ({printable(record.client_id)}): {AGAIN}")
    if not record.client_id.isprintable() or not record.shard.isprintable():
        said = f"client {printable(record.client_id)} with shard {printable(record.shard)}"
        raise DataError(f"{path} has control characters in a name ({said}): {AGAIN}")
    shard = Path(record.shard)
    if shard.is_absolute() or ".." in shard.parts:
        raise DataError(f"{path}: the shard of client {record.client_id} is {shard}, outside the manifest's folder")
    return record
