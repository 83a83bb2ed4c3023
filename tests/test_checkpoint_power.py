"""Acknowledged rounds outlive power cuts and disks that fail, at every operation of a save."""

import random
from pathlib import Path

import apsw
import pytest

from tests.power_vfs import PowerDisk


def fill_table(folder: Path, pragmas: str) -> PowerDisk:
    """Commit thirty rows of a raw database, each replacing an older one, through a disk that logs it."""
    rng = random.Random(1)
    with PowerDisk() as disk:
        db = apsw.Connection(str(folder / "raw.db"))
        db.execute(f"{pragmas}; CREATE TABLE rows(id INTEGER PRIMARY KEY, data BLOB)")
        for i in range(30):
            with db:
                db.execute("DELETE FROM rows WHERE id = ?", (i - 4,))
                db.execute("INSERT INTO rows VALUES(?, ?)", (i, rng.randbytes(rng.randrange(20_000))))
            disk.acknowledge(rows(db))
        db.close()
    return disk


def rows(db: apsw.Connection) -> list[tuple[int, bytes]]:
    return db.execute("SELECT id, data FROM rows ORDER BY id").fetchall()


def lost_rows(disk: PowerDisk, folder: Path, cuts: int) -> int:
    """Count the power cuts, at random operations, after which a database is neither before nor after its transaction."""
    lost = 0
    rng = random.Random(2)
    first = next(i for i, op in enumerate(disk.log) if op.kind == "acknowledge") + 1
    for cut in range(cuts):
        position = rng.randrange(first, len(disk.log))
        left = folder / str(cut)
        left.mkdir()
        disk.cut(position, rng, left)
        try:
            db = apsw.Connection(str(left / "raw.db"))
            lost += rows(db) not in disk.states_at(position)
            lost += db.execute("PRAGMA integrity_check").get != "ok"
        except apsw.Error:
            lost += 1
    return lost


def test_the_simulated_disk_loses_nothing_that_was_synced(tmp_path: Path) -> None:
    disk = fill_table(tmp_path, "PRAGMA journal_mode = TRUNCATE; PRAGMA synchronous = FULL")
    assert lost_rows(disk, tmp_path, 200) == 0


@pytest.mark.parametrize(
    ("journal", "synchronous"),
    [("TRUNCATE", "OFF"), ("TRUNCATE", "NORMAL"), ("DELETE", "FULL"), ("MEMORY", "FULL"), ("WAL", "NORMAL")],
)
def test_the_simulated_disk_catches_a_database_that_does_not_sync(
    tmp_path: Path, journal: str, synchronous: str
) -> None:
    lock = "PRAGMA locking_mode = EXCLUSIVE" if journal == "WAL" else ""  # its shared memory has no VFS here
    disk = fill_table(tmp_path, f"{lock}; PRAGMA journal_mode = {journal}; PRAGMA synchronous = {synchronous}")
    lost = lost_rows(disk, tmp_path, 200)
    print(journal, synchronous, lost, len(disk.log))
    assert lost > 0
