"""A disk that loses power: an SQLite VFS that works on real files and logs every operation.

    with PowerDisk() as disk:            # every apsw connection opened inside goes through it
        ...work...; disk.acknowledge(state)
    disk.cut(position, random, folder)   # the files as a power cut before operation `position` may leave them

Nothing is on the disk until a sync confirms it. Any subset of the sectors of 512 bytes written since the last sync may
have arrived, in any order; where a file has grown but its new sectors are missing, it may contain garbage. The same
goes for truncations, and for the names of files made and deleted since their folder was last synced. Files are
identified by name only, so use one PowerDisk per folder. os.fsync is logged too. Early writeback guarantees nothing, so
it is not logged.
"""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import pytest

SECTOR = 512
WRITES = ("write", "truncate", "sync", "open", "delete")


@dataclass(frozen=True)
class Operation:
    """One request to the disk: `file` is a number that identifies the content, `name` an entry in the folder."""

    kind: str  # create, write, truncate, sync, unlink, syncdir or acknowledge
    name: str = ""
    file: int = -1
    offset: int = 0  # of a write, or the size left by a truncation
    data: bytes = b""
    state: Any = None


class PowerDisk(apsw.VFS):
    """Log every operation; fail_at(n) makes the n-th one from now (counted from 0) fail."""

    def __init__(self) -> None:
        self.log: list[Operation] = []
        self.files: dict[str, int] = {}
        self.countdown: int | None = None
        self.counted: tuple[str, ...] = ()
        self.code, self.sticky, self.failed = apsw.SQLITE_IOERR, False, ""
        super().__init__("power", "unix", makedefault=True)

    def __enter__(self) -> "PowerDisk":
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fsync", self._fsync(os.fsync))
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()
        self.unregister()

    def acknowledge(self, state: Any) -> None:
        """Note that the caller has been told that `state` is saved."""
        self.log.append(Operation("acknowledge", state=state))

    def fail_at(
        self, n: int, code: int = apsw.SQLITE_IOERR, sticky: bool = False, of: tuple[str, ...] = WRITES
    ) -> None:
        """Make the n-th operation of the kinds in `of` fail with an SQLite code; sticky: all later ones fail too."""
        self.countdown, self.counted, self.code, self.sticky, self.failed = n, of, code, sticky, ""

    def recover(self) -> None:
        """Stop making operations fail."""
        self.countdown = None

    def ask(self, kind: str) -> None:
        """Count an operation, and raise if it is the one to fail."""
        if self.countdown is None or kind not in self.counted:
            return
        self.countdown -= 1
        if self.countdown == -1 or (self.countdown < -1 and self.sticky):
            self.failed = self.failed or kind
            raise apsw.exception_for(self.code)

    def find(self, folder: Path) -> None:
        """Start with the existing files of a folder, all of them synced."""
        for path in folder.iterdir():
            self.log.append(Operation("write", file=self.create(path.name), data=path.read_bytes()))
            self.log.append(Operation("sync", file=self.files[path.name]))
        self.log.append(Operation("syncdir"))

    def create(self, name: str) -> int:
        """Return the number of the file with this name, or a new number if there is none."""
        if name not in self.files:
            self.files[name] = sum(op.kind == "create" for op in self.log)
            self.log.append(Operation("create", name, self.files[name]))
        return self.files[name]

    def xOpen(self, name: apsw.URIFilename | str | None, flags: list[int]) -> apsw.VFSFile:
        self.ask("open")
        return PowerFile(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        self.ask("delete")
        super().xDelete(filename, syncdir)
        self.log.append(Operation("unlink", Path(filename).name, self.files.pop(Path(filename).name, -1)))
        if syncdir:
            self.log.append(Operation("syncdir"))

    def _fsync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            real(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path.is_dir():
                self.log.append(Operation("syncdir"))
            elif path.name in self.files:
                self.log.append(Operation("sync", file=self.files[path.name]))

        return fsync

    def states_at(self, position: int) -> tuple[Any, Any]:
        """Return the last state acknowledged before `position`, and the one that was being saved (None: neither)."""
        before = [op.state for op in self.log[:position] if op.kind == "acknowledge"]
        after = [op.state for op in self.log[position:] if op.kind == "acknowledge"]
        return (before[-1] if before else None), (after[0] if after else None)

    def cut(self, position: int, rng: random.Random, folder: Path) -> None:
        """Write to `folder` the files as a power cut before operation `position` may leave them."""
        for name, content in after_cut(self.log[:position], rng).items():
            (folder / name).write_bytes(content)


class PowerFile(apsw.VFSFile):
    """A file of a PowerDisk."""

    def __init__(self, disk: PowerDisk, name: apsw.URIFilename | str | None, flags: list[int]) -> None:
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        super().__init__("unix", name, flags)
        self.disk = disk
        self.file = disk.create(Path(path).name) if path else -1  # an unnamed temporary file is lost
        journals = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_SUPER_JOURNAL | apsw.SQLITE_OPEN_WAL
        # As in SQLite's own VFS: the first sync of a journal syncs the folder too.
        self.names_unsynced = bool(flags[0] & apsw.SQLITE_OPEN_CREATE and flags[0] & journals)

    def note(self, kind: str, offset: int = 0, data: bytes = b"") -> None:
        if self.file >= 0:
            self.disk.log.append(Operation(kind, file=self.file, offset=offset, data=data))

    def xRead(self, amount: int, offset: int) -> bytes:
        self.disk.ask("read")
        return super().xRead(amount, offset)

    def xWrite(self, data: bytes, offset: int) -> None:
        try:
            self.disk.ask("write")
        except apsw.Error:
            half = bytes(data)[: len(data) // 2]  # a write that fails is done in part
            super().xWrite(half, offset)
            self.note("write", offset, half)
            raise
        super().xWrite(data, offset)
        self.note("write", offset, bytes(data))

    def xTruncate(self, newsize: int) -> None:
        self.disk.ask("truncate")
        super().xTruncate(newsize)
        self.note("truncate", newsize)

    def xSync(self, flags: int) -> None:
        self.disk.ask("sync")
        # Skip the real sync: nobody cuts the real power, and a thousand syncs take a minute.
        self.note("sync")
        if self.names_unsynced:
            self.disk.log.append(Operation("syncdir"))
            self.names_unsynced = False


@dataclass
class Content:
    """A file's durable bytes, and the operations since the last sync."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[Operation] = field(default_factory=list)

    def settle(self, rng: random.Random, arrives: float) -> None:
        """Apply each pending sector and truncation with probability `arrives`."""
        for op in self.pending:
            if op.kind == "truncate" and (arrives >= 1 or rng.random() < arrives):
                self.resize(op.offset, rng if arrives < 1 else None)
            for start, piece in sectors(op) if op.kind == "write" else ():
                if arrives >= 1 or rng.random() < arrives:
                    self.resize(max(len(self.durable), start + len(piece)), rng if arrives < 1 else None)
                    self.durable[start : start + len(piece)] = piece
        self.pending = []

    def resize(self, size: int, rng: random.Random | None) -> None:
        """Cut the file to `size`, or extend it with zeros or with garbage drawn from `rng`."""
        grown = max(0, size - len(self.durable))
        self.durable[size:] = b""
        self.durable += rng.randbytes(grown) if rng and grown and rng.random() < 0.5 else bytes(grown)


def sectors(op: Operation) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of every sector that a write touches."""
    start, end = op.offset, op.offset + len(op.data)
    while start < end:
        stop = min(end, (start // SECTOR + 1) * SECTOR)
        yield start, op.data[start - op.offset : stop - op.offset]
        start = stop


def after_cut(log: list[Operation], rng: random.Random) -> dict[str, bytes]:
    """Return name -> content of the files that are left when the power goes after these operations."""
    files: dict[int, Content] = {}
    names: dict[str, int] = {}
    unsynced: list[Operation] = []
    for op in log:
        if op.kind == "create":
            files[op.file] = Content()
        if op.kind in ("create", "unlink"):
            unsynced.append(op)
        elif op.kind in ("write", "truncate"):
            files[op.file].pending.append(op)
        elif op.kind == "sync":
            files[op.file].settle(rng, 1)
        elif op.kind == "syncdir":
            enter(names, unsynced)
            unsynced = []
    enter(names, unsynced[: rng.randint(0, len(unsynced))])  # a folder's own journal keeps the order of its entries
    for content in files.values():
        content.settle(rng, rng.choice((0, 0.1, 0.5, 0.9, 0.99, 1)))
    return {name: bytes(files[file].durable) for name, file in names.items()}


def enter(names: dict[str, int], changes: list[Operation]) -> None:
    """Apply changes to a folder's entries."""
    for op in changes:
        if op.kind == "unlink":
            names.pop(op.name, None)
        else:
            names[op.name] = op.file
