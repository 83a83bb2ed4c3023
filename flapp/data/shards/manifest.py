"""The manifest: what every client's shard holds, looked up without reading the whole.

    manifest.json    format_version, dataset, strategy, seed, fractions, totals, SHA-256s of the two files below and,
                     as digest, of all the rest
    clients.jsonl    one line a client, in counting order: client_id, shard (its folder, relative), num_samples per
                     split, label_hist (training samples of each class), writers (how many), digest
    clients.idx      for each client 32 bytes, sorted: the first 8 of its id's SHA-256, the offset of its line
                     (8 bytes, big-endian), the first 16 of the line's SHA-256

Opening hashes clients.idx (3.2 MB for 100,000 clients), a look-up hashes its line: a record that comes out is the one
that manifest.json vouches for.
"""

import hashlib
import json
import mmap
import struct
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from flapp.data.artifact import DataError
from flapp.data.shards.split_file import REMEDY, digest_of, sync_folder, write_synced
from flapp.untrusted import check_regular, parse_json, printable, read_json

FORMAT_VERSION = 1
MOST_LINE = 1 << 20  # bytes of a line of clients.jsonl
_ENTRY = struct.Struct(">8sQ16s")


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
    """Map client ids to records, reading one line of clients.jsonl a look-up; facts: what manifest.json says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent
        self.facts = _read_facts(path)
        index = self.folder / "clients.idx"
        self._index: mmap.mmap | bytes = b""
        try:
            size = check_regular(index)
            with index.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                if found == self.facts["index_sha256"] and len(self) and size:
                    self._index = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(
                f"{index} cannot be read ({error.strerror}): make the shards again with {REMEDY}"
            ) from error
        if found != self.facts["index_sha256"] or len(self._index) != len(self) * _ENTRY.size:
            raise DataError(
                f"{index} is damaged or of another manifest than {path}: make the shards again with {REMEDY}"
            )

    def __len__(self) -> int:
        return self.facts["totals"]["clients"]

    def __iter__(self) -> Iterator[str]:
        for line in self._lines():
            yield _parse(line, self._clients).client_id

    def __getitem__(self, client_id: str) -> ShardRecord:
        key = _key(client_id)
        at = bisect_left(range(len(self)), key, key=lambda i: self._entry(i)[0])
        while at < len(self) and self._entry(at)[0] == key:
            _, offset, line_hash = self._entry(at)
            record = self._read(offset, line_hash)
            if record.client_id == client_id:
                return record
            at += 1
        raise KeyError(client_id)

    def shard_path(self, client_id: str) -> Path:
        """Return the absolute folder of a client's shard; raises DataError when it lies outside the manifest's."""
        folder = self.folder.resolve()
        path = (folder / self[client_id].shard).resolve()
        if not path.is_relative_to(folder):
            raise DataError(f"{self.path}: the shard of client {client_id} is {path}, outside {folder}")
        return path

    def verify(self) -> None:
        """Check all of clients.jsonl against its digest, the index and the totals; raises DataError."""
        content, entries, offset = hashlib.sha256(), [], 0
        totals = totals_of(())
        for line in self._lines():
            record = _parse(line, self._clients)
            content.update(line)
            entries.append(_pack(record, offset, line))
            offset += len(line)
            _add(totals, record)
        if content.hexdigest() != self.facts["clients_sha256"]:
            raise DataError(f"{self._clients} has another SHA-256 than {self.path} says: make the shards again")
        if hashlib.sha256(b"".join(sorted(entries))).hexdigest() != self.facts["index_sha256"]:
            raise DataError(f"{self.folder / 'clients.idx'} does not index {self._clients}: make the shards again")
        if totals != self.facts["totals"]:
            said = printable(self.facts["totals"])
            raise DataError(f"{self._clients} adds up to {totals}, {self.path} says {said}")

    def _lines(self) -> Iterator[bytes]:
        """Yield the lines of clients.jsonl, at most one more than there are clients."""
        with self._open() as file:
            for _ in range(len(self) + 1):
                if not (line := file.readline(MOST_LINE)):
                    return
                yield line

    def _open(self) -> BinaryIO:
        try:
            check_regular(self._clients)
            return self._clients.open("rb")
        except OSError as error:
            raise DataError(f"{self._clients} cannot be read ({error.strerror}): make the shards again") from error

    @property
    def _clients(self) -> Path:
        return self.folder / "clients.jsonl"

    def _entry(self, number: int) -> tuple[bytes, int, bytes]:
        return _ENTRY.unpack_from(self._index, number * _ENTRY.size)

    def _read(self, offset: int, line_hash: bytes) -> ShardRecord:
        with self._open() as file:
            file.seek(min(offset, sys.maxsize))
            line = file.readline(MOST_LINE)
        if hashlib.sha256(line).digest()[:16] != line_hash:
            raise DataError(f"{self._clients} is damaged at byte {offset}: make the shards again with {REMEDY}")
        return _parse(line, self._clients)


def load_manifest(path: str | Path) -> Manifest:
    """Open a manifest, by its file or its folder; raises DataError for one that is missing, foreign or damaged."""
    path = Path(path)
    return Manifest(path / "manifest.json" if path.is_dir() else path)


def open_manifest(path: str | Path, clients: int, strategy: str) -> Manifest:
    """Open a manifest of the shards of `clients` clients, cut by `strategy`, and verify it; raises DataError."""
    manifest = load_manifest(path)
    if len(manifest) != clients:
        raise DataError(f"{manifest.path} lists {len(manifest)} clients: set clients={len(manifest)}")
    if (found := manifest.facts["strategy"]) != strategy:
        raise DataError(f"{manifest.path} is of shards cut by partition={found}: set partition={found}")
    manifest.verify()
    return manifest


def write_manifest(folder: Path, records: Sequence[ShardRecord], facts: Mapping[str, Any]) -> Manifest:
    """Write clients.jsonl, clients.idx and, last, manifest.json with `facts` and the totals; return it opened."""
    lines = [(json.dumps(asdict(record), sort_keys=True) + "\n").encode() for record in records]
    entries, offset = [], 0
    for record, line in zip(records, lines, strict=True):
        entries.append(_pack(record, offset, line))
        offset += len(line)
    contents = {"clients.jsonl": b"".join(lines), "clients.idx": b"".join(sorted(entries))}
    whole = dict(facts) | {
        "format_version": FORMAT_VERSION,
        "totals": totals_of(records),
        "clients_sha256": hashlib.sha256(contents["clients.jsonl"]).hexdigest(),
        "index_sha256": hashlib.sha256(contents["clients.idx"]).hexdigest(),
    }
    whole["digest"] = digest_of(whole)
    contents["manifest.json"] = (json.dumps(whole, indent=1, sort_keys=True) + "\n").encode()
    for name, content in contents.items():
        partial = folder / f".{name}.tmp"
        write_synced(partial, content)
        partial.replace(folder / name)
    sync_folder(folder)
    return Manifest(folder / "manifest.json")


def totals_of(records: Iterable[ShardRecord]) -> dict[str, int]:
    """Add up clients, writers and the samples of each split."""
    totals = {"clients": 0, "writers": 0, "train": 0, "val": 0, "test": 0}
    for record in records:
        _add(totals, record)
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
    """Return what is wrong with a client's claim against its record, in words, or None; val=None is not compared."""
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
        raise DataError(f"no manifest at {path} ({error.strerror}): make the shards with {REMEDY}") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): make the shards again with {REMEDY}") from error
    if not isinstance(facts, dict) or facts.get("format_version") != FORMAT_VERSION:
        found = facts.get("format_version") if isinstance(facts, dict) else type(facts).__name__
        found = printable(found)
        raise DataError(f"{path} is not a manifest of format {FORMAT_VERSION} (found {found}): make it with {REMEDY}")
    totals = facts.get("totals")
    clients = totals.get("clients") if isinstance(totals, dict) else None
    if type(clients) is not int or not 0 <= clients < 1 << 31 or not {"index_sha256", "clients_sha256"} <= facts.keys():
        raise DataError(f"{path} lacks totals or digests: make the shards again with {REMEDY}")
    if facts.get("digest") != digest_of(facts):
        raise DataError(f"{path} was changed: it does not have the digest it states; make the shards with {REMEDY}")
    return facts


def _parse(line: bytes, path: Path) -> ShardRecord:
    try:
        values = parse_json(line)
        record = ShardRecord(**values | {"label_hist": tuple(values["label_hist"])})
        counts = [record.num_samples[split] for split in ("train", "val", "test")]
        sound = all(type(n) is int and n >= 0 for n in [*counts, *record.label_hist, record.writers])
        sound = sound and all(isinstance(text, str) for text in (record.client_id, record.shard, record.digest))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} has a line that is not a record ({printable(repr(error))}): make the shards again with {REMEDY}"
        ) from error
    if not sound:
        raise DataError(f"{path} has a record of wrong types ({printable(record.client_id)}): make the shards again")
    if not record.client_id.isprintable() or not record.shard.isprintable():
        said = f"client {printable(record.client_id)} with shard {printable(record.shard)}"
        raise DataError(f"{path} has control characters in a name ({said}): make the shards again")
    shard = Path(record.shard)
    if shard.is_absolute() or ".." in shard.parts:
        raise DataError(f"{path}: the shard of client {record.client_id} is {shard}, outside the manifest's folder")
    return record


def _add(totals: dict[str, int], record: ShardRecord) -> None:
    totals["clients"] += 1
    totals["writers"] += record.writers
    for split in ("train", "val", "test"):
        totals[split] += record.num_samples[split]


def _pack(record: ShardRecord, offset: int, line: bytes) -> bytes:
    return _ENTRY.pack(_key(record.client_id), offset, hashlib.sha256(line).digest()[:16])


def _key(client_id: str) -> bytes:
    return hashlib.sha256(client_id.encode()).digest()[:8]
