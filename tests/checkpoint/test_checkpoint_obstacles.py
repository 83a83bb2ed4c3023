"""Full disks, locks, permissions and what else stands in the way give one clear line, and earlier rounds stay."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flapp.checkpoint import engines
from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from tests.support.checkpoint_rounds import digests_of, expected, is_sound, model_of
from tests.support.full_disk import largest_file

ENGINES = ["stdlib", "fast"]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_engines_in_one_process_never_share_a_file(tmp_path: Path, engine: str) -> None:
    (other,) = set(ENGINES) - {engine}
    with ChunkManager(tmp_path / "store.db", engine=engine) as manager:
        manager.save_model_chunks(model_of(1), 1)
        with pytest.raises(CheckpointError, match=f"is open in this process with engine={engine}: give the same"):
            ChunkManager(tmp_path / ".." / tmp_path.name / "store.db", engine=other)
        ChunkManager(tmp_path / "store.db", engine=engine).close()
    with ChunkManager(tmp_path / "store.db", engine=other) as manager:
        assert digests_of(manager) == expected([1])


def two_rounds(folder: Path, engine: str = "auto") -> ChunkManager:
    """Return an open store of rounds 1 and 2."""
    manager = ChunkManager(folder / "store.db", engine=engine, chunk_bytes=6000)
    for number in (1, 2):
        manager.save_model_chunks(model_of(number), number)
    return manager


@pytest.fixture(params=ENGINES)
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ChunkManager]:
    """Return two_rounds by each engine."""
    with two_rounds(tmp_path, request.param) as manager:
        yield manager


def check_refused_save(store: ChunkManager, message: str) -> None:
    """Round 3 is refused in one line, and rounds 1 and 2 are there."""
    with pytest.raises(CheckpointError, match=message) as caught:
        store.save_model_chunks(model_of(3), 3)
    assert "\n" not in str(caught.value)
    assert str(store.path) in str(caught.value)
    assert digests_of(store) == expected([1, 2])


def check_saves_again(store: ChunkManager) -> None:
    store.save_model_chunks(model_of(3), 3)
    assert digests_of(store) == expected([1, 2, 3])
    store.close()
    assert is_sound(store.path)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_store_that_stays_locked_says_so_and_keeps_the_rounds_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setattr(engines, "BUSY_SECONDS", 0)
    store = two_rounds(tmp_path, engine)
    with ChunkManager(store.path, engine=engine) as other, other._store.transaction("BEGIN IMMEDIATE"):
        check_refused_save(store, "cannot take round 3 .*: another process has held its lock")
    check_saves_again(store)


@pytest.mark.parametrize("room", [0, 1, 5, 8])
def test_a_full_database_says_so_and_keeps_the_rounds_before(store: ChunkManager, room: int) -> None:
    ((pages,),) = store._store.execute("PRAGMA page_count")
    store._store.execute(f"PRAGMA max_page_count={pages + room}")
    check_refused_save(store, r"cannot take round 3 .*: its disk is full, earlier rounds are intact: make room")
    store._store.execute("PRAGMA max_page_count=1000000")
    check_saves_again(store)


def test_a_file_that_may_not_grow_keeps_the_rounds_before(store: ChunkManager) -> None:
    with largest_file(store.path.stat().st_size + 9000):
        check_refused_save(store, "cannot take round 3")
    check_saves_again(store)


def test_a_first_round_that_does_not_fit_leaves_a_store_that_takes_the_next(tmp_path: Path) -> None:
    with ChunkManager(tmp_path / "store.db") as manager:
        with largest_file(20_000), pytest.raises(CheckpointError, match="cannot take round 3"):
            manager.save_model_chunks(model_of(3), 3)
        assert manager.rounds() == []
        manager.save_model_chunks(model_of(3), 3)
        assert digests_of(manager) == expected([3])


@pytest.fixture
def locked_folder() -> Iterator[Path]:
    """Return a folder with a store of rounds 1 and 2 whose owner we are not, root or not."""
    folder = Path(tempfile.mkdtemp())
    two_rounds(folder).close()
    folder.chmod(0o555)
    (folder / "store.db").chmod(0o444)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)  # root may write everything
    yield folder
    os.seteuid(me)
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_store_that_may_not_be_written_is_read_and_refuses_to_save(locked_folder: Path, engine: str) -> None:
    with ChunkManager(locked_folder / "store.db", engine=engine, create=False) as manager:
        assert digests_of(manager) == expected([1, 2])
        assert manager.verify().problems == ()
        with pytest.raises(CheckpointError, match="it may not be written: check the permissions"):
            manager.save_model_chunks(model_of(3), 3)
        assert digests_of(manager) == expected([1, 2])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_folder_that_may_not_be_written_takes_no_new_store(locked_folder: Path, engine: str) -> None:
    for path in (locked_folder / "new.db", locked_folder / "client_1" / "new.db"):
        with pytest.raises(CheckpointError, match="cannot be opened") as caught:
            ChunkManager(path, engine=engine)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("create", [False, True])
def test_a_path_that_can_be_no_file_is_named_in_one_line(tmp_path: Path, engine: str, create: bool) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "folder", tmp_path / "file" / "store.db", Path("/proc/store.db"), tmp_path / ("x" * 300)):
        with pytest.raises(CheckpointError) as caught:
            ChunkManager(path, engine=engine, create=create)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_store_that_is_not_there_is_not_made_when_it_must_exist(tmp_path: Path, engine: str) -> None:
    with pytest.raises(CheckpointError, match=r"none\.db is not there"):
        ChunkManager(tmp_path / "none.db", engine=engine, create=False)
    assert list(tmp_path.iterdir()) == []
