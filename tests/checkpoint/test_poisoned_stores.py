"""A checkpoint store that somebody else made expands nothing, runs nothing and never hangs."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn

from flapp.checkpoint import chunks
from flapp.checkpoint.chunks import Part, Spec, encode_parts, facts_digest, round_digest
from flapp.checkpoint.manager import ChunkManager
from tests.support.checkpoint_rounds import ask_every_command, edit, refused
from tests.support.poison import ask, peak
from tools import checkpoints

MIB = 1 << 20


def save(path: Path, model: dict[str, torch.Tensor]) -> None:
    with ChunkManager(path) as store:
        store.save_model_chunks(model, 1, {"loss": 0.5})


def restate(path: Path, tensors: int) -> None:
    """Let round 1 refer to its only chunk `tensors` times, with all digests made to fit."""
    with closing(sqlite3.connect(path)) as db, db:
        ((digest, size),) = db.execute("SELECT hash, size FROM chunk_metadata").fetchall()
        db.execute("DELETE FROM chunk_metadata")
        written = []
        for i in range(tensors):
            parts = [Part(f"layer{i}", 0, size, Spec("uint8", (size,)))]
            db.execute("INSERT INTO chunk_metadata VALUES (1, ?, ?, ?, ?)", (i, digest, encode_parts(parts), size))
            written.append((digest, parts))
        ((*facts, _, _),) = db.execute("SELECT * FROM rounds").fetchall()
        record = [*facts, round_digest(written)]
        db.execute("UPDATE rounds SET model_digest = ?, facts_digest = ?", (record[-1], facts_digest(*record)))


def test_a_chunk_that_is_referred_to_4000_times_is_refused_before_memory_is_taken(path: Path, tmp_path: Path) -> None:
    save(path, {"a": torch.zeros(MIB, dtype=torch.uint8)})
    restate(path, 4000)
    before, out = peak(), tmp_path / "out"
    claims = r"claims tensors of 4,194,304,000 bytes.*hold 1,048,576,.*pass the model that it belongs to"
    with ChunkManager(path, create=False) as store:
        asked = [store.reconstruct_model_from_chunks, store.load_chunks_by_round]
        for ask_for in (*asked, lambda number: store.export(number, out), lambda n: store.diff(n, n)):
            with refused(path, claims):
                ask_for(1)  # type: ignore[operator]
        assert "claims tensors of" in store.verify().problems[0]
    for command in (("verify", path), ("show", path, 1), ("export", path, 1, out), ("list", path)):
        ask(checkpoints.main, *command)
    assert peak() - before < 200 * MIB
    assert not out.exists()


def test_a_model_of_equal_bytes_is_loaded_as_it_was_saved(path: Path) -> None:
    model = {f"layer{i}": torch.zeros(4 * MIB) for i in range(4)}  # 64 MiB in one chunk of 1 MiB
    save(path, model)
    assert path.stat().st_size < 3 * MIB
    with ChunkManager(path, create=False) as store:
        loaded = store.reconstruct_model_from_chunks(1)
        assert all(torch.equal(loaded[key], tensor) for key, tensor in model.items())
        assert store.verify().problems == ()


def test_a_larger_model_of_equal_bytes_is_loaded_into_a_model_of_its_size(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "ALWAYS_BELIEVED", MIB)
    model = nn.Linear(1 << 11, 2 << 10, bias=False)  # 16 MiB
    nn.init.zeros_(model.weight)
    save(path, model.state_dict())
    nn.init.ones_(model.weight)
    with ChunkManager(path, create=False) as store:
        with refused(path, "pass the model that it belongs to"):
            store.reconstruct_model_from_chunks(1)
        store.reconstruct_model_from_chunks(1, model)
        with refused(path, "another model"):
            store.reconstruct_model_from_chunks(1, nn.Linear(2, 2, bias=False))
    assert not model.weight.any()


REPLACED = (
    "PRAGMA writable_schema=ON; UPDATE sqlite_schema SET sql = replace(sql, '{}', '{}'); PRAGMA writable_schema=OFF"
)
SCHEMAS = {
    "a trigger": "CREATE TRIGGER t AFTER INSERT ON rounds BEGIN DELETE FROM rounds; DELETE FROM chunk_metadata; END",
    "a temporary name": 'CREATE TABLE "temp" (a)',
    "a view": "CREATE VIEW v AS SELECT * FROM rounds",
    "a view in place of a table": "DROP TABLE rounds; CREATE VIEW rounds AS SELECT 1 AS round",
    "an index": "CREATE INDEX i ON rounds(saved)",
    "an index on an expression": "CREATE UNIQUE INDEX i ON rounds(abs(saved))",
    "a virtual table": "CREATE VIRTUAL TABLE f USING fts5(a)",
    "a table": "CREATE TABLE more (a)",
    "no table": "DROP TABLE chunk_data",
    "a column": "ALTER TABLE rounds ADD COLUMN more TEXT",
    "a generated column": "ALTER TABLE rounds ADD COLUMN more TEXT AS (upper(metrics))",
    "a check": REPLACED.format("saved INTEGER", "saved INTEGER CHECK (saved < 1)"),
    "a conflict clause": REPLACED.format("round INTEGER PRIMARY KEY,", "round INTEGER PRIMARY KEY ON CONFLICT IGNORE,"),
    "a default": REPLACED.format("metrics TEXT", "metrics TEXT DEFAULT (randomblob(1000000000))"),
    "statistics": "ANALYZE",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_store_with_any_other_schema_is_refused_and_left_alone(path: Path, tmp_path: Path, name: str) -> None:
    save(path, {"a": torch.ones(9)})
    edit(path, SCHEMAS[name])
    content = path.read_bytes()
    with refused(path, "does not have the schema of a flapp checkpoint store.*restore the file from a copy"):
        ChunkManager(path)
    for command in ("list", "verify", "compact"):
        assert ask(checkpoints.main, command, tmp_path)
    assert path.read_bytes() == content


def test_a_trigger_that_comes_while_the_store_is_open_does_not_let_a_save_succeed(path: Path) -> None:
    save(path, {"a": torch.ones(9)})
    with ChunkManager(path) as store:
        edit(path, SCHEMAS["a trigger"])
        with refused(path, "does not have the schema"):
            store.save_model_chunks({"a": torch.zeros(9)}, 2)


def test_a_save_whose_round_would_expire_at_once_is_refused(path: Path) -> None:
    save(path, {"a": torch.ones(9)})
    edit(path, "UPDATE rounds SET saved = 'the last of all'")
    with ChunkManager(path, keep_rounds=1) as store, refused(path, "did not keep round 2"):
        store.save_model_chunks({"a": torch.zeros(9)}, 2)


ODD_ROWS = [
    "UPDATE chunk_metadata SET hash = 'text'",
    "UPDATE chunk_metadata SET hash = 7",
    "UPDATE chunk_metadata SET size = 36.0",
    "UPDATE chunk_metadata SET size = -1",
    "UPDATE chunk_metadata SET size = 9223372036854775807",
    "UPDATE chunk_metadata SET chunk_id = x'00'",
    "UPDATE chunk_metadata SET round = 'text'",
    "UPDATE chunk_metadata SET parts = replace(hex(zeroblob(4000)), '0', '[')",
    "UPDATE chunk_metadata SET parts = replace(parts, '\"a\"', '\"\\u001b[2J\\n\"')",
    "UPDATE chunk_data SET data = 'text'",
    "UPDATE chunk_data SET hash = 'text'",
    "UPDATE rounds SET metrics = replace(hex(zeroblob(4000)), '0', '[')",
    "UPDATE rounds SET created_at = char(27) || '[2J'",
    "UPDATE rounds SET round = -5",
    "UPDATE rounds SET round = 9223372036854775807",
    "UPDATE store_meta SET value = 'text'",
    "UPDATE store_meta SET value = x'00' WHERE key = 'hash'",
    "UPDATE store_meta SET value = hex(zeroblob(100000)) WHERE key = 'format_version'",
    "UPDATE store_meta SET value = char(27) || '[2J' WHERE key = 'hash'",
    "DELETE FROM store_meta",
]


@pytest.mark.parametrize("statement", ODD_ROWS)
def test_rows_of_other_types_give_a_one_line_error_in_every_command(path: Path, statement: str) -> None:
    save(path, {"a": torch.ones(9)})
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(statement)
        for number, *facts, _ in db.execute("SELECT * FROM rounds").fetchall():  # an attacker can hash, too
            db.execute("UPDATE rounds SET facts_digest = ?", (facts_digest(number, *facts),))
    ask_every_command(path, 1, 1)
