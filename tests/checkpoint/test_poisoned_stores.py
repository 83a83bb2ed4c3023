"""A checkpoint store that somebody else made expands nothing, runs nothing and never hangs."""

import os
import sqlite3
from pathlib import Path

import pytest
import torch
from torch import nn

from flapp.checkpoint.chunks import CheckpointError, Part, Spec, encode_parts, round_digest
from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.records import facts_digest
from tests.support.poison import ask, peak
from tools import checkpoints

ENGINES = ["stdlib", "fast"]
MIB = 1 << 20


def save(path: Path, model: dict[str, torch.Tensor], engine: str = "stdlib", **settings: int) -> Path:
    with ChunkManager(path, engine=engine, **settings) as store:  # type: ignore[arg-type]
        store.save_model_chunks(model, 1, {"loss": 0.5})
    return path


def restate(path: Path, tensors: int) -> None:
    """Let round 1 refer to its only chunk `tensors` times, with all digests made to fit."""
    with sqlite3.connect(path) as db:
        ((digest, size),) = db.execute("SELECT hash, size FROM chunk_metadata").fetchall()
        db.execute("DELETE FROM chunk_metadata")
        chunks = []
        for i in range(tensors):
            parts = [Part(f"layer{i}", 0, size, Spec("uint8", (size,)))]
            db.execute("INSERT INTO chunk_metadata VALUES (1, ?, ?, ?, ?)", (i, digest, encode_parts(parts), size))
            chunks.append((digest, parts))
        ((*facts, _, _),) = db.execute("SELECT * FROM rounds").fetchall()
        record = [*facts, round_digest(chunks)]
        db.execute("UPDATE rounds SET model_digest = ?, facts_digest = ?", (record[-1], facts_digest(*record)))
    db.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_chunk_that_is_referred_to_4000_times_is_refused_before_memory_is_taken(tmp_path: Path, engine: str) -> None:
    path = save(tmp_path / "client_0_chunks.db", {"a": torch.zeros(MIB, dtype=torch.uint8)}, engine)
    restate(path, 4000)
    before = peak()
    with ChunkManager(path, engine=engine, create=False) as store:
        asked = [store.reconstruct_model_from_chunks, store.load_chunks_by_round]
        for ask_for in (*asked, lambda number: store.export(number, tmp_path / "out"), lambda n: store.diff(n, n)):
            with pytest.raises(
                CheckpointError, match=r"claims tensors of 4,194,304,000 bytes.*hold 1,048,576"
            ) as error:
                ask_for(1)  # type: ignore[operator]
            assert "pass the model that it belongs to" in str(error.value)
        assert "claims tensors of" in store.verify().problems[0]
    for command in (("verify", path), ("show", path, 1), ("export", path, 1, tmp_path / "out"), ("list", path)):
        ask(checkpoints.main, *command)
    assert peak() - before < 200 * MIB
    assert not (tmp_path / "out").exists()


def test_a_model_of_equal_bytes_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    model = {f"layer{i}": torch.zeros(4 * MIB) for i in range(4)}  # 64 MiB in one chunk of 1 MiB
    path = save(tmp_path / "store.db", model)
    assert path.stat().st_size < 3 * MIB
    with ChunkManager(path, create=False) as store:
        loaded = store.reconstruct_model_from_chunks(1)
        assert all(torch.equal(loaded[key], tensor) for key, tensor in model.items())
        assert store.verify().problems == ()


def test_a_larger_model_of_equal_bytes_is_loaded_into_a_model_of_its_size(tmp_path: Path) -> None:
    model = nn.Linear(1 << 13, 6 << 10, bias=False)  # 192 MiB
    nn.init.zeros_(model.weight)
    path = save(tmp_path / "store.db", model.state_dict())
    nn.init.ones_(model.weight)
    with ChunkManager(path, create=False) as store:
        with pytest.raises(CheckpointError, match="pass the model that it belongs to"):
            store.reconstruct_model_from_chunks(1)
        store.reconstruct_model_from_chunks(1, model)
        with pytest.raises(CheckpointError, match="is of another model"):
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


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_store_with_any_other_schema_is_refused_in_one_line_and_left_alone(
    tmp_path: Path, engine: str, name: str
) -> None:
    path = save(tmp_path / "client_0_chunks.db", {"a": torch.ones(9)}, engine)
    db = sqlite3.connect(path)
    db.executescript(SCHEMAS[name])
    db.close()
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match="does not have the schema of a flapp checkpoint store") as error:
        ChunkManager(path, engine=engine)
    assert str(path) in str(error.value)
    assert "restore the file from a copy" in str(error.value)
    for command in ("list", "verify", "compact"):
        assert ask(checkpoints.main, command, tmp_path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trigger_that_comes_while_the_store_is_open_does_not_let_a_save_succeed(tmp_path: Path, engine: str) -> None:
    path = save(tmp_path / "store.db", {"a": torch.ones(9)}, engine)
    with ChunkManager(path, engine=engine) as store:
        db = sqlite3.connect(path)
        db.executescript(SCHEMAS["a trigger"])
        db.close()
        with pytest.raises(CheckpointError, match="does not have the schema"):
            store.save_model_chunks({"a": torch.zeros(9)}, 2)


def test_a_save_whose_round_would_expire_at_once_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "store.db", {"a": torch.ones(9)})
    with sqlite3.connect(path) as db:
        db.execute("UPDATE rounds SET saved = 'the last of all'")
    db.close()
    with (
        ChunkManager(path, keep_rounds=1, engine="stdlib") as store,
        pytest.raises(CheckpointError, match="did not keep round 2"),
    ):
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
    "UPDATE chunk_metadata SET parts = replace(parts, '[[0', '[[-1')",
    "UPDATE chunk_metadata SET parts = replace(parts, '[[0', '[[true')",
    "UPDATE chunk_metadata SET parts = replace(parts, '9,[9]', '1e99,[1e99]')",
    "UPDATE chunk_metadata SET parts = replace(parts, '[9]', '[1' || replace(hex(zeroblob(3000)), '0', '1') || ']')",
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
def test_rows_of_other_types_are_one_line_from_every_command(tmp_path: Path, statement: str) -> None:
    path = save(tmp_path / "client_0_chunks.db", {"a": torch.ones(9)})
    with sqlite3.connect(path) as db:
        db.execute(statement)
        for number, *facts, _ in db.execute("SELECT * FROM rounds").fetchall():  # an attacker can hash, too
            db.execute("UPDATE rounds SET facts_digest = ?", (facts_digest(number, *facts),))
    db.close()
    commands = [("list", path), ("list", tmp_path), ("show", path, 1), ("verify", path), ("diff", path, 1, 1)]
    for command in (*commands, ("export", path, 1, tmp_path / "out"), ("compact", path)):
        ask(checkpoints.main, *command)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a loop", "a journal that is a pipe"])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path, engine: str, kind: str) -> None:
    path = tmp_path / "client_0_chunks.db"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a loop":
        path.symlink_to(path.name)
    else:
        save(path, {"a": torch.ones(9)}, engine)
        Path(f"{path}-journal").unlink(missing_ok=True)
        os.mkfifo(f"{path}-journal")
    with pytest.raises(CheckpointError, match="give the path of a checkpoint store") as error:
        ChunkManager(path, engine=engine)
    assert str(path) in str(error.value)
    ask(checkpoints.main, "verify", tmp_path)
