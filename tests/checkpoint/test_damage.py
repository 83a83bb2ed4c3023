"""Damaged files give one clear line, never a wrong tensor."""

import itertools
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.tensors import digest_of
from tests.support.checkpoint_rounds import ask_every_command, edit, expected, model_of, refused, save_rounds
from tests.support.poison import refuses

SIZE = 1500
ROUNDS = expected([2, 3, 4], SIZE)
Damage = Callable[[bytearray, random.Random], None]


def flip_a_bit(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def flip_a_bit_of_the_header(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(100)] ^= 1 << rng.randrange(8)


def flip_a_bit_of_a_page_head(content: bytearray, rng: random.Random) -> None:
    page = content[16] << 8 | content[17]
    content[rng.randrange(len(content) // page) * page + rng.randrange(100)] ^= 1 << rng.randrange(8)


def spoil_text(content: bytearray, rng: random.Random) -> None:
    words = (b"format_version", b'"loss"', b"blake3", b"CREATE TABLE rounds", b"body.weight", b"+00:00")
    word = rng.choice(words)
    content[content.index(word) + rng.randrange(len(word))] |= 0x80  # no longer UTF-8


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


def ask_damaged(path: Path, fully: bool) -> bool:
    """Read all rounds of a damaged store; with `fully`, also run every command and write.

    Return whether a round was lost.
    """
    said = []
    try:
        with ChunkManager(path) as manager:
            for number, digest in ROUNDS.items():
                try:
                    assert digest_of(manager.reconstruct_model_from_chunks(number)) == digest, "a wrong tensor"
                except CheckpointError as error:
                    said.append(str(error))
            lost = bool(said)
            assert manager.verify().problems or not lost, "verify saw nothing"
            for act in (lambda: save_rounds(manager, 8, size=SIZE), lambda: manager.cleanup_old_rounds(1)):
                said.append(refuses(CheckpointError, act) if fully else "")
    except CheckpointError as error:
        lost = True
        said.append(str(error))
    assert not any("\n" in line for line in said)
    said += ask_every_command(path, 2, 4) if fully else []
    assert all(str(path) in line for line in filter(None, said))
    return lost


@pytest.mark.parametrize(
    ("damage", "times"),
    [
        *((flip_a_bit, 32), (flip_a_bit_of_the_header, 16), (flip_a_bit_of_a_page_head, 24), (spoil_text, 12)),
        *((lose_the_end, 12), (zero_a_sector, 12), (swap_two_sectors, 12)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_store_gives_right_tensors_or_one_line(path: Path, sound: bytes, damage: Damage, times: int) -> None:
    rng, lost = random.Random(times), 0
    for attempt in range(times):
        content = bytearray(sound)
        damage(content, rng)
        path.write_bytes(content)
        lost += ask_damaged(path, fully=attempt % 4 == 0)
        for each in path.parent.iterdir():
            each.unlink()
    assert lost > times // 10


NOT_STORES = {
    "empty": b"",
    "one byte": b"x",
    "text": b"text " * 1000,
    "a zip": b"PK\x03\x04" + bytes(3000),
    "a header cut off": b"SQLite format 3\x00",
    "a header and zeros": b"SQLite format 3\x00" + bytes(5000),
}


@pytest.mark.parametrize("content", NOT_STORES.values(), ids=NOT_STORES)
def test_a_file_that_is_not_a_store_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with suppress(CheckpointError), ChunkManager(path) as manager:
        assert manager.rounds() == []  # SQLite also takes very short files for new databases
    assert path.read_bytes() == content
    assert all(str(path) in line for line in ask_every_command(path, 0, 1))


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
def test_changed_facts_of_a_round_are_refused_and_verify_sees_them(
    path: Path, sound: bytes, column: str, value: str
) -> None:
    path.write_bytes(sound)
    edit(path, f"UPDATE rounds SET {column} = {value} WHERE round = 3")
    with ChunkManager(path) as manager:
        with refused(path, "round 3: its metadata is damaged"):
            manager.rounds()
        for ask in (manager.find_round, manager.reconstruct_model_from_chunks, manager.load_chunks_by_round):
            with refused(path, "round 3: its metadata is damaged"):
                ask(3)
        assert manager.find_round(4)
        assert any("round 3: its metadata is damaged" in problem for problem in manager.verify().problems)
        assert digest_of(manager.reconstruct_model_from_chunks(4)) == ROUNDS[4]


DAMAGES = {  # of round 1, whose second chunk is the tensor body.weight
    "UPDATE chunk_data SET data = zeroblob(length(data)) WHERE id = 2": "its bytes are damaged",
    "UPDATE chunk_data SET data = x'00' WHERE id = 2": r"chunk 1 \(body.weight\): its sizes or types",
    "UPDATE chunk_data SET data = NULL WHERE id = 2": r"chunk 1 \(body.weight\): its sizes or types",
    "UPDATE chunk_data SET codec = 9 WHERE id = 2": r"chunk 1 \(body.weight\): it is stored by codec 9",
    "UPDATE chunk_data SET hash = 'text' WHERE id = 2": r"chunk 1 \(body.weight\): its bytes are not in the store",
    "DELETE FROM chunk_data WHERE id = 2": r"chunk 1 \(body.weight\): its bytes are not in the store",
    "DELETE FROM chunk_metadata WHERE chunk_id = 1": "its metadata is not what was saved",
    "DELETE FROM chunk_metadata WHERE chunk_id = 3": "its metadata is not what was saved",
    "UPDATE chunk_metadata SET parts = '{' WHERE chunk_id = 1": "chunk 1: its parts are not what flapp writes",
    "UPDATE chunk_metadata SET parts = replace(parts, '0,9000,', '0,9000000000000000,') WHERE chunk_id = 1": "sizes or",
    "UPDATE chunk_metadata SET parts = replace(parts, '[90,100]', '[100,90]') WHERE chunk_id = 1": "another model dig",
    "UPDATE chunk_metadata SET parts = replace(parts, '[90,100]', '[91,100]') WHERE chunk_id = 1": "ends at element 9,",
    "UPDATE chunk_metadata SET parts = replace(parts, 'float32', 'int32') WHERE chunk_id = 1": "another model digest",
    "UPDATE chunk_metadata SET parts = replace(parts, 'body', 'last') WHERE chunk_id = 1": "another model digest",
    "UPDATE chunk_metadata SET size = 9000000000000000 WHERE chunk_id = 1": r"\(body.weight\): its sizes or types",
    "UPDATE chunk_metadata SET hash = x'00' WHERE chunk_id = 1": r"\(body.weight\): its bytes are not in the store",
    "UPDATE chunk_metadata SET hash = 5 WHERE chunk_id = 1": r"\(body.weight\): its bytes are not in the store",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_by_round_chunk_and_tensor_and_repaired_by_a_save(store: ChunkManager, damage: str) -> None:
    save_rounds(store, 1)
    store.close()
    edit(store.path, damage)
    with ChunkManager(store.path) as again:
        with refused(store.path, f"round 1.*{DAMAGES[damage]}"):
            again.reconstruct_model_from_chunks(1)
        with refused(store.path):
            again.load_chunks_by_round(1)
        assert again.verify().problems
        save_rounds(again, 1)
        if "chunk_data SET" not in damage:
            assert digest_of(again.reconstruct_model_from_chunks(1)) == expected([1])[1]


def test_verify_continues_after_the_first_defect(store: ChunkManager) -> None:
    save_rounds(store, 0, 1, 2)
    good = store.verify()
    assert (good.rounds, good.chunks, good.problems) == (3, store.get_storage_stats()["unique_chunks"], ())
    assert good.bytes == store.get_storage_stats()["stored_bytes"]
    lost = store.get_chunk_by_id(2, 2).hash
    store.close()
    edit(
        store.path,
        "UPDATE chunk_data SET data = zeroblob(length(data)) WHERE id = 2",
        "DELETE FROM chunk_metadata WHERE round = 1 AND chunk_id = 1",
        f"DELETE FROM chunk_data WHERE hash = x'{lost}'",
        "INSERT INTO chunk_data(hash, codec, data) VALUES (x'77', 0, x'77')",
        "INSERT INTO chunk_metadata SELECT 9, chunk_id, hash, parts, size FROM chunk_metadata WHERE round = 0",
    )
    with ChunkManager(store.path) as again:
        problems = "\n".join(again.verify().problems)
    for text in ("round 0, chunk 1", "round 1: ", "round 2, chunk 2", "belong to no round", "round 9"):
        assert text in problems
