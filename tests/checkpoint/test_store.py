"""A store's rounds and its file: small, bounded, and refused when it is not ours."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flapp.checkpoint import database
from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.tensors import digest_of
from tests.support.checkpoint_rounds import digests_of, edit, expected, refused, save_rounds


def tensors(seed: int, size: int = 3000) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}.weight": torch.randn(size, generator=generator) for i in range(4)}


def test_eleven_parameters_take_at_most_5120_bytes(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "client_7_chunks.db"
    with ChunkManager(path) as store:
        store.save_model_chunks(nn.Linear(10, 1), 0)
        stats = store.get_storage_stats()
    store.close()  # a second time, which does nothing
    assert path.stat().st_size <= 5120
    assert (stats["client_id"], stats["unique_chunks"], stats["round_range"]) == ("7", 2, (0, 0))
    assert (stats["logical_bytes"], stats["stored_bytes"], stats["dedup_ratio"]) == (44, 44, 1.0)


def test_the_file_keeps_its_size_over_many_rounds_and_compacting_gives_space_back(path: Path) -> None:
    with ChunkManager(path, keep_rounds=2) as store:
        for number in range(30):
            store.save_model_chunks(tensors(number, 60_000), number)
        stats = store.get_storage_stats()
        assert path.stat().st_size <= 3.1 * 4 * 240_000
        assert (stats["rounds"], stats["round_range"], stats["unique_chunks"]) == (2, (28, 29), 8)
        store.cleanup_old_rounds(1)
        before, after = store.compact()
        assert after == path.stat().st_size < before / 2
        assert store.verify().problems == ()
        assert digest_of(store.reconstruct_model_from_chunks(29)) == digest_of(tensors(29, 60_000))


def test_only_what_changed_is_stored_again(store: ChunkManager) -> None:
    state = tensors(0)
    first = store.save_model_chunks(state, 0)
    state["layer1.weight"] = state["layer1.weight"] + 1
    second = store.save_model_chunks(state, 1)
    third = store.save_model_chunks(state, 2)
    assert first.new_bytes == first.bytes == 4 * 12_000
    assert (second.new_bytes, second.new_chunks, third.new_bytes) == (12_000, 1, 0)
    assert first.model_digest != second.model_digest == third.model_digest


def test_retention_goes_by_the_order_of_saving_and_spares_pinned_rounds(path: Path) -> None:
    with ChunkManager(path, keep_rounds=2) as store:
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


def test_a_round_saved_again_replaces_the_whole_of_it(store: ChunkManager) -> None:
    store.save_model_chunks(tensors(0), 3, {"loss": 1.0}, config_digest="c", input_digest="i")
    store.save_model_chunks({"only": torch.ones(3)}, 3, {"loss": 0.5})
    (found,) = store.rounds()
    assert (found.metrics, found.chunks, found.bytes, found.config_digest) == ({"loss": 0.5}, 1, 12, "")
    assert list(store.reconstruct_model_from_chunks(3)) == ["only"]
    assert store.get_storage_stats()["unique_chunks"] == 1
    assert store.find_round(4) is None


def test_an_empty_file_is_a_store_without_rounds(path: Path) -> None:
    path.touch()
    with ChunkManager(path, create=False) as store:
        assert (store.rounds(), store.verify().problems, store.get_storage_stats()["round_range"]) == ([], (), None)
        store.save_model_chunks(tensors(0), 0)
        assert store.find_round(0)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE store_meta SET value = 2 WHERE key = 'format_version'", "has format 2, this flapp reads 1: update"),
        ("UPDATE store_meta SET value = 'md5' WHERE key = 'hash'", "hashes by 'md5', which this flapp does not know"),
        ("UPDATE store_meta SET value = -5 WHERE key = 'chunk_bytes'", "chunk_bytes"),
        ("DELETE FROM store_meta", "has format None"),
        ("DROP TABLE store_meta", "is an SQLite database of another program.* not a flapp checkpoint store: move it"),
    ],
)
def test_a_store_of_another_format_is_refused(store: ChunkManager, statement: str, message: str) -> None:
    store.save_model_chunks(tensors(0), 0)
    store.close()
    edit(store.path, statement)
    with refused(store.path, message):
        ChunkManager(store.path)


def test_an_old_store_with_sha256_is_read_and_continued(store: ChunkManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "HASH", "sha256")
    save_rounds(store, 1)
    monkeypatch.undo()
    with ChunkManager(store.path) as again:
        assert again.save_model_chunks(again.reconstruct_model_from_chunks(1), 2).new_chunks == 0
        save_rounds(again, 3)
        assert digests_of(again) == expected({1: 1, 2: 1, 3: 3})
        assert again.verify().problems == ()
        assert len(again.get_chunk_by_id(3, 0).hash) == 64


def test_settings_and_round_numbers_out_of_range_are_refused(store: ChunkManager) -> None:
    for name in ("keep_rounds", "chunk_bytes", "chunk_num"):
        for value in (0, -1, "ten", 1.5):
            with pytest.raises(CheckpointError, match=name):
                ChunkManager(store.path, **{name: value})  # type: ignore[arg-type]
    for number in (-1, 1 << 63, "1", None):
        with pytest.raises(CheckpointError, match="round_num"):
            store.save_model_chunks(tensors(0), number)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="metrics of round 0 are not JSON"):
        store.save_model_chunks(tensors(0), 0, {"loss": object()})
    assert store.rounds() == []
