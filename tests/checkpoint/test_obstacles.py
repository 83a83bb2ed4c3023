"""Full disks, locks, permissions and other obstacles give one clear line, and earlier rounds stay."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flapp.checkpoint import database
from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.store import Store
from tests.support.checkpoint_rounds import digests_of, expected, is_sound, refused, save_rounds
from tests.support.faults import largest_file


@pytest.fixture
def store(path: Path) -> Iterator[ChunkManager]:
    """Return an open store of rounds 1 and 2."""
    with ChunkManager(path, chunk_bytes=6000) as manager:
        save_rounds(manager, 1, 2)
        yield manager


def check_refused_save(store: ChunkManager, message: str) -> None:
    """Round 3 is refused in one line, and rounds 1 and 2 are there."""
    with refused(store.path, f"cannot take round 3 .*{message}"):
        save_rounds(store, 3)
    assert digests_of(store) == expected([1, 2])


def check_saves_again(store: ChunkManager) -> None:
    save_rounds(store, 3)
    assert digests_of(store) == expected([1, 2, 3])
    store.close()
    assert is_sound(store.path)


def test_a_store_that_stays_locked_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0)
    with ChunkManager(path) as store, ChunkManager(path) as other:
        save_rounds(store, 1, 2)
        with other._store.transaction("BEGIN IMMEDIATE"):
            check_refused_save(store, "another process has held its lock")
        check_saves_again(store)


@pytest.mark.parametrize("room", [0, 1, 5, 8])
def test_a_full_database_says_so(store: ChunkManager, room: int) -> None:
    ((pages,),) = store._store.execute("PRAGMA page_count")
    store._store.execute(f"PRAGMA max_page_count={pages + room}")
    check_refused_save(store, "its disk is full, earlier rounds are intact: make room")
    store._store.execute("PRAGMA max_page_count=1000000")
    check_saves_again(store)


def test_a_file_that_may_not_grow_keeps_the_rounds_before(store: ChunkManager) -> None:
    with largest_file(store.path.stat().st_size + 9000):
        check_refused_save(store, "")
    check_saves_again(store)


def test_a_first_round_that_does_not_fit_leaves_a_store_that_takes_the_next(path: Path) -> None:
    with ChunkManager(path) as manager:
        with largest_file(20_000), refused(path, "cannot take round 3"):
            save_rounds(manager, 3)
        assert manager.rounds() == []
        save_rounds(manager, 3)
        assert digests_of(manager) == expected([3])


@pytest.mark.parametrize("cause", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("rounds", [[], [1]], ids=["first round", "later round"])
@pytest.mark.parametrize("chunks", [0, 2])
def test_a_save_that_is_interrupted_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, rounds: list[int], chunks: int, cause: type[BaseException]
) -> None:
    write, written = Store.write, []

    def interrupted(*given: object) -> None:
        if len(written) == chunks:
            raise cause
        written.append(given)
        write(*given)  # type: ignore[arg-type]

    with ChunkManager(path, keep_rounds=1, chunk_bytes=6000) as manager:
        save_rounds(manager, *rounds)
        monkeypatch.setattr(Store, "write", interrupted)
        with pytest.raises(cause):
            save_rounds(manager, 2)
        monkeypatch.undo()
        assert digests_of(manager) == expected(rounds)
        save_rounds(manager, 2)
        assert digests_of(manager) == expected([2])
    assert is_sound(path)


@pytest.fixture
def locked_folder() -> Iterator[Path]:
    """Return a folder with a store of rounds 1 and 2 that we may not write, even as root."""
    folder = Path(tempfile.mkdtemp())
    with ChunkManager(folder / "store.db") as manager:
        save_rounds(manager, 1, 2)
    folder.chmod(0o555)
    (folder / "store.db").chmod(0o444)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)  # root may write everything
    yield folder
    os.seteuid(me)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_store_that_may_not_be_written_is_read_and_refuses_to_save(locked_folder: Path) -> None:
    with ChunkManager(locked_folder / "store.db", create=False) as manager:
        assert manager.verify().problems == ()
        check_refused_save(manager, "it may not be written: check the permissions")


def test_a_folder_that_may_not_be_written_takes_no_new_store(locked_folder: Path) -> None:
    for path in (locked_folder / "new.db", locked_folder / "client_1" / "new.db"):
        with refused(path, "cannot be opened"):
            ChunkManager(path)


@pytest.mark.parametrize("create", [False, True])
def test_a_path_that_cannot_be_a_file_is_refused(tmp_path: Path, create: bool) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "file" / "store.db", Path("/proc/store.db"), tmp_path / ("x" * 300)):
        with refused(path):
            ChunkManager(path, create=create)


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a loop", "a journal that is a pipe"])
def test_what_is_not_a_regular_file_is_refused_and_never_waited_for(path: Path, kind: str) -> None:
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a loop":
        path.symlink_to(path.name)
    else:
        ChunkManager(path).close()
        Path(f"{path}-journal").unlink(missing_ok=True)
        os.mkfifo(f"{path}-journal")
    for create in (False, True):
        with refused(path, "give the path of a checkpoint store"):
            ChunkManager(path, create=create)


def test_a_missing_store_is_not_made_unless_that_is_allowed(path: Path) -> None:
    with refused(path, "is not there"):
        ChunkManager(path, create=False)
    assert not path.exists()
