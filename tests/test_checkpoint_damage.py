"""Damaged files, full disks and what else stands in the way give one clear line, never a wrong tensor."""

import itertools
import os
import random
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flapp.checkpoint import CheckpointError, ChunkManager, digest_of, engines
from tests.checkpoint_rounds import digests_of, expected, is_sound, model_of

ENGINES = ["stdlib", "fast"]
SIZE = 1500
ROUNDS = expected([2, 3, 4], SIZE)


def flip_a_bit(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def flip_a_bit_of_the_header(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(100)] ^= 1 << rng.randrange(8)


def flip_a_bit_of_a_page_head(content: bytearray, rng: random.Random) -> None:
    page = content[16] << 8 | content[17]
    content[rng.randrange(len(content) // page) * page + rng.randrange(100)] ^= 1 << rng.randrange(8)


def spoil_text(content: bytearray, rng: random.Random) -> None:
    words = (b"format_version", b'"loss"', b"sha256", b"blake3", b"CREATE TABLE rounds", b"body.weight", b"+00:00")
    word = rng.choice([word for word in words if word in content])
    content[content.index(word) + rng.randrange(len(word))] |= 0x80  # no UTF-8 any more


def lose_the_end(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def zero_a_sector(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content) // 512) * 512
    content[start : start + 512] = bytes(512)


def swap_two_sectors(content: bytearray, rng: random.Random) -> None:
    a, b = (rng.randrange(len(content) // 512) * 512 for _ in range(2))
    content[a : a + 512], content[b : b + 512] = content[b : b + 512], content[a : a + 512]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the file of a store of rounds 2, 3 and 4 with metadata, blobs and free pages."""
    path = tmp_path_factory.mktemp("sound") / "store.db"
    with ChunkManager(path, chunk_bytes=2000) as manager:
        for number in range(5):
            manager.save_model_chunks(model_of(number, SIZE), number, {"loss": number / 7, "names": ["a", "b"]})
        manager.cleanup_old_rounds(3)
    content = path.read_bytes()
    assert int.from_bytes(content[36:40], "big") > 3, "the store must have free pages"
    return content


def questions(manager: ChunkManager) -> Iterator[Callable[[], object]]:
    """Yield everything else that can be asked of a store."""
    yield manager.rounds
    yield manager.get_storage_stats
    for number in (*ROUNDS, 7):
        yield lambda n=number: manager.find_round(n)  # type: ignore[misc]
        yield lambda n=number: manager.load_chunks_by_round(n)  # type: ignore[misc]
    yield lambda: manager.get_chunk_by_id(3, 1)
    yield lambda: manager.diff(2, 4)


def changes(manager: ChunkManager) -> Iterator[Callable[[], object]]:
    """Yield what writes to a store."""
    yield manager.compact
    yield lambda: manager.save_model_chunks(model_of(8, SIZE), 8)
    yield lambda: manager.cleanup_old_rounds(1)


def read_rounds(manager: ChunkManager) -> Iterator[str]:
    """Read each round right, or yield why not; verify sees whatever is wrong with them."""
    lost = False
    for number, digest in ROUNDS.items():
        try:
            assert digest_of(manager.reconstruct_model_from_chunks(number)) == digest, "a wrong tensor"
        except CheckpointError as error:
            lost = True
            yield str(error)
    try:
        assert manager.verify().problems or not lost, "verify saw nothing"
    except CheckpointError as error:
        yield str(error)


def ask_damaged(path: Path, engine: str, change: bool) -> bool:
    """Ask a damaged store for all that it has, and change it; return whether a round was lost."""
    said: list[str] = []
    try:
        with ChunkManager(path, engine=engine) as manager:
            said += read_rounds(manager)
            lost = bool(said)
            for attempt in (*questions(manager), *(changes(manager) if change else ())):
                try:
                    attempt()
                except CheckpointError as error:
                    said.append(str(error))
    except CheckpointError as error:
        lost = True
        said.append(str(error))
    assert not any("\n" in line for line in said)
    assert all(str(path) in line for line in said)
    return lost


@pytest.mark.parametrize(
    ("damage", "times"),
    [
        (flip_a_bit, 100),
        (flip_a_bit_of_the_header, 40),
        (flip_a_bit_of_a_page_head, 60),
        (spoil_text, 20),
        (lose_the_end, 20),
        (zero_a_sector, 20),
        (swap_two_sectors, 20),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_store_gives_the_right_tensors_or_one_line(
    tmp_path: Path, sound: bytes, damage: Callable[[bytearray, random.Random], None], times: int
) -> None:
    rng, lost = random.Random(times), 0
    for attempt in range(times):
        content = bytearray(sound)
        damage(content, rng)
        (tmp_path / "store.db").write_bytes(content)
        lost += ask_damaged(tmp_path / "store.db", ENGINES[attempt % 2], change=attempt % 5 == 0)
        for path in tmp_path.iterdir():
            path.unlink()
    assert lost > times // 10


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"PK\x03\x04" + bytes(3000), b"SQLite format 3\x00", b"SQLite format 3\x00" + bytes(5000)],
    ids=["empty", "one byte", "a zip", "a header cut off", "a header and zeros"],
)
def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path, engine: str, content: bytes) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(content)
    try:
        with ChunkManager(path, engine=engine) as manager:
            assert manager.rounds() == []
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017 - an empty file may also be taken for a new store
    assert path.read_bytes() == content


@pytest.mark.parametrize("engine", ENGINES)
def test_a_store_that_stays_locked_says_so_and_keeps_the_rounds_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sound: bytes, engine: str
) -> None:
    monkeypatch.setattr(engines, "BUSY_SECONDS", 0)
    (tmp_path / "store.db").write_bytes(sound)
    with (
        ChunkManager(tmp_path / "store.db", engine=engine) as other,
        ChunkManager(tmp_path / "store.db", engine=engine) as manager,
    ):
        with (
            other._store.transaction("BEGIN IMMEDIATE"),
            pytest.raises(CheckpointError, match="cannot take round 5 .*: another process has held its lock"),
        ):
            manager.save_model_chunks(model_of(5, SIZE), 5)
        assert digests_of(manager) == ROUNDS
        manager.save_model_chunks(model_of(5, SIZE), 5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("column", "value"),
    [
        *itertools.product(
            ("created_at", "metrics", "config_digest", "input_digest", "model_digest"), ("x'7b7d'", "NULL")
        ),
        *(("metrics", value) for value in ("'[}'", "'[]'", "'null'", "''")),
    ],
)
def test_facts_of_a_round_that_are_no_facts_are_refused_and_seen_by_verify(
    tmp_path: Path, sound: bytes, engine: str, column: str, value: str
) -> None:
    (tmp_path / "store.db").write_bytes(sound)
    with ChunkManager(tmp_path / "store.db", engine=engine) as manager:
        manager._store.execute(f"UPDATE rounds SET {column} = {value} WHERE round = 3")
        with pytest.raises(CheckpointError, match="round 3: its metrics"):
            manager.rounds()
        assert any("round 3: its metrics" in problem for problem in manager.verify().problems)
        assert digest_of(manager.reconstruct_model_from_chunks(4)) == ROUNDS[4]


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


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes, which a write is then told."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.fixture(params=ENGINES)
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ChunkManager]:
    """Return an open store of rounds 1 and 2."""
    with ChunkManager(tmp_path / "store.db", engine=request.param, chunk_bytes=6000) as manager:
        for number in (1, 2):
            manager.save_model_chunks(model_of(number), number)
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
    with ChunkManager(folder / "store.db", chunk_bytes=6000) as manager:
        for number in (1, 2):
            manager.save_model_chunks(model_of(number), number)
    folder.chmod(0o555)
    (folder / "store.db").chmod(0o444)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
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
