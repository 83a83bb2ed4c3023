"""Acknowledged rounds outlive power cuts and disks that fail, at every operation of a save."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

from flapp.checkpoint import database, store
from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from tests.support.checkpoint_rounds import Digests, digests_of, expected, is_sound, model_of, save_rounds
from tests.support.power_vfs import PowerDisk

DB = "client_1_chunks.db"
SIZE = 2000
BREAKAGES = {
    "synchronous=OFF": ("journal_mode=TRUNCATE", "synchronous=OFF"),
    "synchronous=NORMAL": ("journal_mode=TRUNCATE", "synchronous=NORMAL"),
    "journal_mode=DELETE": ("journal_mode=DELETE", "synchronous=FULL"),
    "journal_mode=MEMORY": ("journal_mode=MEMORY", "synchronous=FULL"),
    # the shared memory of WAL needs a lock of its own here
    "journal_mode=WAL": ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL"),
}


def save_on_a_power_disk(folder: Path, rounds: int = 12) -> PowerDisk:
    """Save rounds with retention, a cleanup and a compaction; the disk is told what was acknowledged."""
    with PowerDisk() as disk, pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "WRITEBACK_BYTES", 10_000)  # begins the early writeback, which promises nothing
        manager = ChunkManager(folder / DB, keep_rounds=3, chunk_bytes=6000)
        for number in range(rounds):
            manager.save_model_chunks(model_of(number, SIZE), number, pinned=(1,))
            disk.acknowledge(digests_of(manager))
            if number == rounds // 2:
                manager.cleanup_old_rounds(1)
                disk.acknowledge(digests_of(manager))
                manager.compact()
                disk.acknowledge(digests_of(manager))
                manager.close()
                manager = ChunkManager(folder / DB, keep_rounds=3)
        manager.save_model_chunks(model_of(99, SIZE), rounds - 1)
        disk.acknowledge(digests_of(manager))
        manager.close()
    return disk


def what_is_left(path: Path) -> Digests | None:
    """Read the store after a power cut; None for one that cannot be read."""
    try:
        with ChunkManager(path) as manager:
            found = digests_of(manager)
        return found if is_sound(path) else None
    except CheckpointError:
        return None


def count_losses(disk: PowerDisk, folder: Path, cuts: int) -> int:
    """Cut the power before operations drawn at random.

    Count the stores that match neither the state before the save nor the state after it.
    """
    rng, losses = random.Random(0), 0
    for cut in range(cuts):
        left = folder / f"after-{cut}"
        left.mkdir()
        position = rng.randrange(len(disk.log) + 1)
        disk.cut(position, rng, left)
        before, after = disk.states_at(position)
        losses += what_is_left(left / DB) not in (before or {}, after or before)
        shutil.rmtree(left)
    return losses


@pytest.mark.parametrize("page_size", [512, 1024, 4096, 16384])
def test_no_power_cut_loses_an_acknowledged_round_or_halves_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_size: int
) -> None:
    monkeypatch.setattr(database, "page_size_for", lambda size: page_size)
    assert count_losses(save_on_a_power_disk(tmp_path), tmp_path, 60) == 0


def test_a_power_cut_while_recovering_from_a_power_cut_loses_nothing(tmp_path: Path) -> None:
    first, rng, recovered = save_on_a_power_disk(tmp_path, 8), random.Random(1), 0
    while recovered < 6:
        left = tmp_path / "left"
        left.mkdir()
        position = rng.randrange(len(first.log) + 1)
        first.cut(position, rng, left)
        allowed = [state or {} for state in first.states_at(position)]
        if (left / f"{DB}-journal").exists() and (left / f"{DB}-journal").stat().st_size:
            recovered += 1
            with PowerDisk() as second:
                second.find(left)
                begin = len(second.log)
                with ChunkManager(left / DB) as manager:
                    assert digests_of(manager) in allowed
            for again in range(begin, len(second.log) + 1):
                shutil.rmtree(left)
                left.mkdir()
                second.cut(again, rng, left)
                assert what_is_left(left / DB) in allowed
        shutil.rmtree(left)


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_power_cuts_catch_a_store_that_promises_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breakage: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(database, "PRAGMAS", BREAKAGES[breakage])
        disk = save_on_a_power_disk(tmp_path, 6)
    assert count_losses(disk, tmp_path, 40) > 0


def test_a_store_has_the_settings_that_the_power_cuts_have_tried(tmp_path: Path) -> None:
    names = ("journal_mode", "synchronous", "auto_vacuum", "secure_delete", "encoding", "locking_mode")
    with ChunkManager(tmp_path / DB) as manager:
        save_rounds(manager, 1)
        found = [manager._store.execute(f"PRAGMA {name}")[0][0] for name in names]
    assert found == ["truncate", 2, 2, 0, "UTF-8", "normal"]


def test_the_folders_made_for_a_store_are_on_the_disk_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    ChunkManager(tmp_path / "run" / "client_1" / DB).close()
    assert {tmp_path, tmp_path / "run", tmp_path / "run" / "client_1"} <= set(synced)


@pytest.fixture
def two_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a store of rounds 1 and 2, whose pages are large, so that there are few operations."""
    monkeypatch.setattr(database, "page_size_for", lambda size: 4096)
    folder = tmp_path / "sound"
    with ChunkManager(folder / DB, chunk_bytes=6000) as manager:
        save_rounds(manager, 0, 1, 2, size=SIZE)
        manager.cleanup_old_rounds(2)
    return folder


def save_third(manager: ChunkManager) -> None:
    save_rounds(manager, 3, size=SIZE)


def failures(folder: Path, of: tuple[str, ...], act: Callable[[ChunkManager], object], **how: int) -> list[str]:
    """Let every operation that `act` asks the disk for fail, one after the other, and return what each was.

    When the last operation fails, `act` may be complete already: it is the sync that truncates the journal, and
    readers already see the commit.
    """
    before, after = expected([1, 2], SIZE), expected([2, 3], SIZE)
    kinds: list[str] = []
    done: list[int] = []
    while True:
        work = folder.with_name("work")
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        with PowerDisk() as disk:
            with ChunkManager(work / DB, keep_rounds=2) as manager:
                disk.fail_at(len(kinds), of=of, **how)
                try:
                    act(manager)
                    problem = ""
                except CheckpointError as error:
                    problem = str(error)
                disk.recover()
                if not disk.failed:
                    assert set(done) <= {len(kinds) - 1}
                    return kinds
                kinds.append(disk.failed)
                assert problem, f"the {disk.failed} numbered {len(kinds) - 1} failed, and nothing was said"
                assert "\n" not in problem
                assert str(work / DB) in problem
                found = digests_of(manager)
                assert found in (before, after)
                done += [len(kinds) - 1] if found != before else []
            with ChunkManager(work / DB, keep_rounds=2) as manager:
                assert digests_of(manager) == found
                save_third(manager)
                assert digests_of(manager) == after
            assert is_sound(work / DB)


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("code", [apsw.SQLITE_IOERR, apsw.SQLITE_FULL], ids=["I/O error", "full"])
def test_a_save_on_a_disk_that_fails_anywhere_says_so_and_keeps_older_rounds(
    two_rounds: Path, code: int, sticky: bool
) -> None:
    kinds = failures(two_rounds, ("write", "truncate", "sync", "open", "delete"), save_third, code=code, sticky=sticky)
    assert {"write", "truncate", "sync"} <= set(kinds)
    assert len(kinds) > 20


def test_a_disk_that_cannot_be_read_gives_no_tensors_but_one_line(two_rounds: Path) -> None:
    assert "read" in failures(two_rounds, ("read",), lambda manager: manager.reconstruct_model_from_chunks(2))
    assert "read" in failures(two_rounds, ("read",), save_third)
    assert "read" in failures(two_rounds, ("read",), ChunkManager.rounds)
