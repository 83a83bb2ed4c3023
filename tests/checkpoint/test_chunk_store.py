"""The store's file: small, bounded, refused when it is not ours, and never half written."""

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.store import Store
from flapp.checkpoint.tensors import digest_of

ENGINES = ["stdlib", "fast"]
engines = pytest.mark.parametrize("engine", ENGINES)


def tensors(seed: int, size: int = 3000) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}.weight": torch.randn(size, generator=generator) for i in range(4)}


def edit(path: Path, *statements: str) -> None:
    """Change a database behind the store's back."""
    with sqlite3.connect(path) as db:
        for statement in statements:
            db.execute(statement)
    db.close()


def one_line(error: pytest.ExceptionInfo[CheckpointError], path: Path) -> bool:
    return "\n" not in str(error.value) and str(path) in str(error.value)


@engines
def test_eleven_parameters_take_at_most_5120_bytes(tmp_path: Path, engine: str) -> None:
    with ChunkManager(tmp_path / "client_7_chunks.db", engine=engine) as store:
        store.save_model_chunks(nn.Linear(10, 1), 0)
        stats = store.get_storage_stats()
    assert (tmp_path / "client_7_chunks.db").stat().st_size <= 5120
    assert (stats["client_id"], stats["unique_chunks"], stats["round_range"]) == ("7", 2, (0, 0))
    assert (stats["logical_bytes"], stats["stored_bytes"], stats["dedup_ratio"]) == (44, 44, 1.0)


@engines
def test_the_file_is_durable_and_keeps_its_size_over_many_rounds(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "store.db"
    size = sum(tensor.nbytes for tensor in tensors(0, 60_000).values())
    with ChunkManager(path, keep_rounds=2, engine=engine) as store:
        for number in range(60):
            store.save_model_chunks(tensors(number, 60_000), number)
        stats = store.get_storage_stats()
        found = {name: store._store.execute(f"PRAGMA {name}")[0][0] for name in ("journal_mode", "synchronous")}
        found |= {name: store._store.execute(f"PRAGMA {name}")[0][0] for name in ("auto_vacuum", "secure_delete")}
        assert store.verify().problems == ()
    assert found == {"journal_mode": "truncate", "synchronous": 2, "auto_vacuum": 2, "secure_delete": 0}
    assert path.stat().st_size <= 3.1 * size
    assert (stats["rounds"], stats["round_range"], stats["unique_chunks"]) == (2, (58, 59), 8)


@engines
def test_only_what_changed_is_stored_again(tmp_path: Path, engine: str) -> None:
    state = tensors(0)
    with ChunkManager(tmp_path / "store.db", engine=engine) as store:
        first = store.save_model_chunks(state, 0)
        state["layer1.weight"] = state["layer1.weight"] + 1
        second = store.save_model_chunks(state, 1)
        third = store.save_model_chunks(state, 2)
    assert first.new_bytes == first.bytes == 4 * 12_000
    assert (second.new_bytes, second.new_chunks, third.new_bytes) == (12_000, 1, 0)
    assert first.model_digest != second.model_digest == third.model_digest


@engines
def test_retention_goes_by_the_order_of_saving_and_spares_pinned_rounds(tmp_path: Path, engine: str) -> None:
    with ChunkManager(tmp_path / "store.db", keep_rounds=2, engine=engine) as store:
        for number in (7, 8, 9, 0, 1):
            store.save_model_chunks(tensors(number), number, pinned=(8,))
        assert [found.round for found in store.rounds()] == [0, 1, 8]
        store.save_model_chunks(tensors(5), 0, pinned=(8,))  # saved again, 0 is the newest
        store.save_model_chunks(tensors(6), 2)
        assert [found.round for found in store.rounds()] == [0, 2]
        assert digest_of(store.reconstruct_model_from_chunks(0)) == digest_of(tensors(5))
        store.cleanup_old_rounds(1)
        assert [found.round for found in store.rounds()] == [2]
        assert store.get_storage_stats()["unique_chunks"] == 4


@engines
def test_a_round_saved_again_replaces_the_whole_of_it(tmp_path: Path, engine: str) -> None:
    with ChunkManager(tmp_path / "store.db", engine=engine) as store:
        store.save_model_chunks(tensors(0), 3, {"loss": 1.0}, config_digest="c", input_digest="i")
        store.save_model_chunks({"only": torch.ones(3)}, 3, {"loss": 0.5})
        (found,) = store.rounds()
        assert (found.metrics, found.chunks, found.bytes, found.config_digest) == ({"loss": 0.5}, 1, 12, "")
        assert list(store.reconstruct_model_from_chunks(3)) == ["only"]
        assert store.get_storage_stats()["unique_chunks"] == 1
        assert store.find_round(4) is None


@engines
def test_compacting_gives_back_what_was_dropped(tmp_path: Path, engine: str) -> None:
    with ChunkManager(tmp_path / "store.db", engine=engine) as store:
        for number in range(5):
            store.save_model_chunks(tensors(number, 60_000), number)
        store.cleanup_old_rounds(1)
        before, after = store.compact()
        assert after < before / 4
        assert after == (tmp_path / "store.db").stat().st_size
        assert store.verify().problems == ()
        assert digest_of(store.reconstruct_model_from_chunks(4)) == digest_of(tensors(4, 60_000))


DAMAGES = {
    "UPDATE chunk_data SET data = zeroblob(length(data)) WHERE id = 2": "its bytes are damaged",
    "DELETE FROM chunk_data WHERE id = 2": r"round 1, chunk 1 \(layer1.weight\): its bytes are not in the store",
    "UPDATE chunk_data SET data = x'00' WHERE id = 2": r"round 1, chunk 1 \(layer1.weight\): its sizes differ",
    "UPDATE chunk_data SET data = NULL WHERE id = 2": r"round 1, chunk 1 \(layer1.weight\): its sizes differ",
    "UPDATE chunk_data SET codec = 9 WHERE id = 2": r"round 1, chunk 1 \(layer1.weight\): it is stored by codec 9",
    "DELETE FROM chunk_metadata WHERE chunk_id = 1": "round 1: its metadata is not what was saved",
    "DELETE FROM chunk_metadata WHERE chunk_id = 3": "round 1: its metadata is not what was saved",
    "UPDATE chunk_metadata SET parts = '{' WHERE chunk_id = 1": "round 1, chunk 1: its parts are not what flapp writes",
    "UPDATE chunk_metadata SET parts = replace(parts, '3000', '9000000000000000') WHERE chunk_id = 1": (
        r"round 1, chunk 1 \(layer1.weight\): its sizes differ"
    ),
    "UPDATE chunk_metadata SET parts = replace(parts, '[3000]', '[30,100]') WHERE chunk_id = 1": "another model digest",
    "UPDATE chunk_metadata SET parts = replace(parts, '[3000]', '[3001]') WHERE chunk_id = 1": "ends at element 3,000",
    "UPDATE chunk_metadata SET parts = replace(parts, 'float32', 'int32') WHERE chunk_id = 1": "another model digest",
    "UPDATE chunk_metadata SET parts = replace(parts, 'layer1', 'layer9') WHERE chunk_id = 1": "another model digest",
    "UPDATE chunk_metadata SET size = 9000000000000000 WHERE chunk_id = 1": r"layer1.weight\): its sizes differ",
    "UPDATE chunk_metadata SET hash = x'00' WHERE chunk_id = 1": r"layer1.weight\): its bytes are not in the store",
    "UPDATE chunk_metadata SET hash = 5 WHERE chunk_id = 1": r"layer1.weight\): its bytes are not in the store",
    "UPDATE chunk_data SET hash = 'text' WHERE id = 2": r"layer1.weight\): its bytes are not in the store",
    "UPDATE rounds SET model_digest = 'x'": "round 1: its metadata is damaged",
}


@engines
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_by_round_chunk_and_tensor_and_reported_by_verify(
    tmp_path: Path, engine: str, damage: str
) -> None:
    path = tmp_path / "store.db"
    with ChunkManager(path, engine=engine) as store:
        store.save_model_chunks(tensors(0), 1)
    edit(path, damage)
    with ChunkManager(path, engine=engine) as store:
        with pytest.raises(CheckpointError, match=DAMAGES[damage]) as error:
            store.reconstruct_model_from_chunks(1)
        assert one_line(error, path)
        with pytest.raises(CheckpointError):
            store.load_chunks_by_round(1)
        assert store.verify().problems
        store.save_model_chunks(tensors(0), 1)
        if "chunk_data SET" not in damage:
            assert digest_of(store.reconstruct_model_from_chunks(1)) == digest_of(tensors(0)), "saving again mends it"


@engines
def test_verify_goes_on_after_the_first_defect(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "store.db"
    with ChunkManager(path, engine=engine) as store:
        for number in range(3):
            store.save_model_chunks(tensors(number), number)
        good = store.verify()
    assert (good.rounds, good.chunks, good.bytes, good.problems) == (3, 12, 12 * 12_000, ())
    edit(
        path,
        "UPDATE chunk_data SET data = zeroblob(length(data)) WHERE id = 2",
        "DELETE FROM chunk_metadata WHERE round = 1 AND chunk_id = 0",
        "DELETE FROM chunk_data WHERE id = 12",
        "INSERT INTO chunk_data(hash, codec, data) VALUES (x'77', 0, x'77')",
        "INSERT INTO chunk_metadata SELECT 9, chunk_id, hash, parts, size FROM chunk_metadata WHERE round = 0",
    )
    with ChunkManager(path, engine=engine) as store:
        problems = "\n".join(store.verify().problems)
    for text in ("round 0, chunk 1", "round 1: ", "round 2, chunk 3", "belong to no round", "round 9"):
        assert text in problems


@engines
def test_a_foreign_model_is_refused_by_tensor_and_stays_as_it_was(tmp_path: Path, engine: str) -> None:
    with ChunkManager(tmp_path / "store.db", engine=engine) as store:
        store.save_model_chunks(nn.Linear(4, 2), 0)
        others = {
            "tensor bias is missing in the model": nn.Linear(4, 2, bias=False),
            "tensor num_batches_tracked is missing in the round": nn.BatchNorm1d(2),
            r"tensor weight is float32 \[2, 4\], the model has float32 \[4, 2\]": nn.Linear(2, 4),
            r"tensor weight is float32 \[2, 4\], the model has float64 \[2, 4\]": nn.Linear(4, 2).double(),
        }
        for message, model in others.items():
            before = digest_of(model.state_dict())
            with pytest.raises(CheckpointError, match=f"round 0 is of another model: {message}"):
                store.reconstruct_model_from_chunks(0, model)
            assert digest_of(model.state_dict()) == before
        with pytest.raises(CheckpointError, match="has no round 5: it holds 0"):
            store.reconstruct_model_from_chunks(5)


@engines
def test_files_that_are_no_store_are_refused_in_one_line(tmp_path: Path, engine: str) -> None:
    text, other, folder = tmp_path / "text.db", tmp_path / "other.db", tmp_path / "folder.db"
    text.write_text("not a database at all, but long enough to look at " * 50)
    edit(other, "CREATE TABLE songs(title)")
    folder.mkdir()
    for path in (text, other, folder, text / "below.db"):
        with pytest.raises(CheckpointError) as error:
            ChunkManager(path, engine=engine)
        assert one_line(error, path)
    with pytest.raises(CheckpointError, match="is not there"):
        ChunkManager(tmp_path / "missing.db", engine=engine, create=False)
    assert not (tmp_path / "missing.db").exists()
    (tmp_path / "empty.db").touch()
    with ChunkManager(tmp_path / "empty.db", engine=engine, create=False) as store:
        assert (store.rounds(), store.verify().problems, store.get_storage_stats()["round_range"]) == ([], (), None)
        store.save_model_chunks(tensors(0), 0)
        assert store.find_round(0)


@engines
@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE store_meta SET value = 2 WHERE key = 'format_version'", "has format 2, this flapp reads 1: update"),
        ("UPDATE store_meta SET value = 'md5' WHERE key = 'hash'", "hashes by 'md5', which this flapp does not know"),
        ("UPDATE store_meta SET value = -5 WHERE key = 'chunk_bytes'", "chunk_bytes"),
        ("DELETE FROM store_meta", "has format None"),
        ("DROP TABLE rounds", "rounds"),
    ],
)
def test_a_store_of_another_format_is_refused(tmp_path: Path, engine: str, statement: str, message: str) -> None:
    with ChunkManager(tmp_path / "store.db", engine=engine) as store:
        store.save_model_chunks(tensors(0), 0)
    edit(tmp_path / "store.db", statement)
    with pytest.raises(CheckpointError, match=message) as error:
        ChunkManager(tmp_path / "store.db", engine=engine).save_model_chunks(tensors(1), 1)
    assert one_line(error, tmp_path / "store.db")


def test_each_engine_reads_and_continues_what_the_other_wrote(tmp_path: Path) -> None:
    for first, second in (ENGINES, ENGINES[::-1]):
        path = tmp_path / f"{first}.db"
        with ChunkManager(path, engine=first) as store:
            store.save_model_chunks(tensors(0), 0)
        with ChunkManager(path, engine=second) as store:
            assert digest_of(store.reconstruct_model_from_chunks(0)) == digest_of(tensors(0))
            assert store.save_model_chunks(tensors(0), 1).new_chunks == 0


def test_without_the_extra_a_blake3_store_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ChunkManager(tmp_path / "store.db", engine="fast") as store:
        store.save_model_chunks(tensors(0), 0)
    monkeypatch.setitem(sys.modules, "blake3", None)
    needed = r"this store needs the extra 'fast': pip install \"flapp\[fast\]\""
    with pytest.raises(CheckpointError, match=needed):
        ChunkManager(tmp_path / "store.db", engine="stdlib")


@engines
def test_a_full_disk_leaves_the_earlier_rounds(tmp_path: Path, engine: str) -> None:
    with ChunkManager(tmp_path / "store.db", engine=engine) as store:
        store.save_model_chunks(tensors(0), 0)
        ((pages,),) = store._store.execute("PRAGMA page_count")
        store._store.execute(f"PRAGMA max_page_count={pages + 2}")
        with pytest.raises(CheckpointError, match="cannot take round 1 .*full.*: make room and save again"):
            store.save_model_chunks(tensors(1), 1)
        assert [found.round for found in store.rounds()] == [0]
        assert store.verify().problems == ()
        store._store.execute("PRAGMA max_page_count=1000000")
        store.save_model_chunks(tensors(1), 1)
        assert digest_of(store.reconstruct_model_from_chunks(1)) == digest_of(tensors(1))


@engines
def test_a_save_that_fails_in_the_middle_leaves_nothing(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ChunkManager(tmp_path / "store.db", engine=engine) as store:
        write = store._store._db.write_blob
        for existing in (False, True):
            written: list[int] = []

            def write_two(rowid: int, pieces: object, written: list[int] = written) -> None:
                if len(written) == 2:
                    raise RuntimeError("interrupted")
                written.append(rowid)
                write(rowid, pieces)  # type: ignore[arg-type]

            with monkeypatch.context() as patch:
                patch.setattr(store._store._db, "write_blob", write_two)
                with pytest.raises(RuntimeError, match="interrupted"):
                    store.save_model_chunks(tensors(5), 0)
            assert bool(store.rounds()) == existing
            store.save_model_chunks(tensors(0), 0)
            assert digest_of(store.reconstruct_model_from_chunks(0)) == digest_of(tensors(0))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that everybody may read; tmp_path's parents are closed again whenever another pytest starts."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@engines
def test_a_file_that_may_not_be_written_can_be_read(open_folder: Path, engine: str) -> None:
    with ChunkManager(open_folder / "store.db", engine=engine) as store:
        store.save_model_chunks(tensors(0), 0)
    program = f"""
import os
import apsw, blake3, torch  # which somebody else might not find
from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.tensors import digest_of
digest_of(dict())
os.setuid(65534)
store = ChunkManager({str(open_folder / "store.db")!r}, engine={engine!r})
state = store.reconstruct_model_from_chunks(0)
print(digest_of(state))
try:
    store.save_model_chunks(state, 1)
except CheckpointError as error:
    print(error)
try:
    ChunkManager({str(open_folder / "new" / "store.db")!r}, engine={engine!r})
except CheckpointError as error:
    print(error)
"""
    if os.getuid() != 0:
        pytest.skip("needs root, to become somebody who may not write")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    digest, refused, new = done.stdout.splitlines()
    assert digest == digest_of(tensors(0))
    assert "cannot take round 1" in refused
    assert "may not be written" in refused
    assert "Permission denied" in new


@engines
def test_threads_and_managers_on_one_file_take_turns(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "store.db"
    shared = ChunkManager(path, engine=engine)
    errors: list[Exception] = []

    def save(store: ChunkManager, first: int) -> None:
        try:
            for number in range(first, first + 5):
                store.save_model_chunks(tensors(number), number)
                store.reconstruct_model_from_chunks(number)
        except CheckpointError as error:
            errors.append(error)

    stores = [shared, shared, ChunkManager(path, engine=engine), ChunkManager(path, engine=engine)]
    threads = [threading.Thread(target=save, args=(store, 10 * i)) for i, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(shared.rounds()) == 20
    assert shared.verify().problems == ()


@engines
def test_a_round_number_or_setting_that_makes_no_sense_is_refused(tmp_path: Path, engine: str) -> None:
    for name in ("keep_rounds", "chunk_bytes", "chunk_num"):
        for value in (0, -1, "ten", 1.5):
            with pytest.raises(CheckpointError, match=name):
                ChunkManager(tmp_path / "store.db", engine=engine, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="engine=quick is not known"):
        ChunkManager(tmp_path / "store.db", engine="quick")
    with ChunkManager(tmp_path / "store.db", engine=engine) as store:
        for number in (-1, 1 << 63, "1", None):
            with pytest.raises(CheckpointError, match="round_num"):
                store.save_model_chunks(tensors(0), number)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="metrics of round 0 are not JSON"):
            store.save_model_chunks(tensors(0), 0, {"loss": object()})
        assert store.rounds() == []


def test_looking_at_a_store_does_not_import_torch(tmp_path: Path) -> None:
    with ChunkManager(tmp_path / "store.db") as store:
        store.save_model_chunks(tensors(0), 0, {"loss": 1.5})
    program = f"""
import json, sys
from flapp.checkpoint.manager import ChunkManager
with ChunkManager({str(tmp_path / "store.db")!r}, create=False) as store:
    print(json.dumps([store.rounds()[0].metrics, store.verify().problems, "torch" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [{"loss": 1.5}, [], False]


def test_a_store_can_be_closed_twice(tmp_path: Path) -> None:
    store = ChunkManager(tmp_path / "deep" / "folder" / "store.db")
    store.close()
    store.close()
    assert isinstance(store._store, Store)
