"""Damaged files give one clear line, never a wrong tensor."""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.tensors import digest_of
from tests.support.checkpoint_rounds import expected, model_of

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
@pytest.mark.parametrize(
    ("column", "value"),
    [
        *itertools.product(
            ("created_at", "metrics", "config_digest", "input_digest", "model_digest"), ("x'7b7d'", "NULL")
        ),
        *(("metrics", value) for value in ("'[}'", "'[]'", "'null'", "''", "replace(metrics, '0.4', '0.5')")),
        ("created_at", "replace(created_at, '2', '3')"),
        *((name, "'another'") for name in ("config_digest", "input_digest", "model_digest", "facts_digest")),
        *(("saved", value) for value in ("saved + 1", "saved - 4", "NULL", "'text'", "x'00'")),
        *(("facts_digest", value) for value in ("NULL", "''", "x'00'")),
    ],
)
def test_facts_of_a_round_that_are_not_those_saved_are_refused_and_seen_by_verify(
    tmp_path: Path, sound: bytes, engine: str, column: str, value: str
) -> None:
    (tmp_path / "store.db").write_bytes(sound)
    with ChunkManager(tmp_path / "store.db", engine=engine) as manager:
        manager._store.execute(f"UPDATE rounds SET {column} = {value} WHERE round = 3")
        with pytest.raises(CheckpointError, match="round 3: its metadata is damaged"):
            manager.rounds()
        for ask in (manager.find_round, manager.reconstruct_model_from_chunks, manager.load_chunks_by_round):
            with pytest.raises(CheckpointError, match="round 3: its metadata is damaged") as error:
                ask(3)
            assert str(tmp_path / "store.db") in str(error.value)
            assert "\n" not in str(error.value)
        assert manager.find_round(4)
        assert any("round 3: its metadata is damaged" in problem for problem in manager.verify().problems)
        assert digest_of(manager.reconstruct_model_from_chunks(4)) == ROUNDS[4]
