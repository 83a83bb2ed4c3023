"""A model comes back from the chunk store bit for bit, or not at all."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flapp.checkpoint import streams
from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.tensors import digest_of

ENGINES = ["stdlib", "fast"]


def every_kind() -> dict[str, Tensor]:
    """Return tensors of every dtype and shape that asks for care."""
    torch.manual_seed(0)
    floats = torch.randn(7, 5)
    state = {f"float.{dtype}": floats.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)}
    state |= {
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "complex": torch.randn(3, dtype=torch.cfloat).conj(),
    }
    state |= {"scalar": torch.tensor(7), "empty": torch.empty(0, 5), "int8": torch.arange(-3, 3, dtype=torch.int8)}
    state |= {"bool": torch.tensor([True, False]), "transposed": floats.t(), "float8": floats.to(torch.float8_e4m3fn)}
    return state | {"tied": state["transposed"]}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk_num", [None, *range(2, 13), 1000])
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path, engine: str, chunk_num: int | None) -> None:
    state = every_kind()
    with ChunkManager(tmp_path / "store.db", chunk_num=chunk_num, engine=engine) as store:
        store.save_model_chunks(state, 3)
        loaded = store.reconstruct_model_from_chunks(3)
        assert store.verify().problems == ()
    assert list(loaded) == list(state)
    assert digest_of(loaded) == digest_of(state)
    assert loaded["tied"] is loaded["transposed"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_flipped_byte_is_named_and_the_model_stays_as_it_was(tmp_path: Path, engine: str) -> None:
    model = nn.Sequential(nn.Linear(10, 64), nn.BatchNorm1d(64), nn.Linear(64, 1))
    with ChunkManager(tmp_path / "store.db", engine=engine) as store:
        store.save_model_chunks(model, 0)
        content = (tmp_path / "store.db").read_bytes()
        data = model[2].weight.detach().numpy().tobytes()
        assert content.count(data) == 1
    (tmp_path / "store.db").write_bytes(content.replace(data, bytes([data[0] ^ 1]) + data[1:]))
    other = nn.Sequential(nn.Linear(10, 64), nn.BatchNorm1d(64), nn.Linear(64, 1))
    before = digest_of(other.state_dict())
    with ChunkManager(tmp_path / "store.db", engine=engine) as store:
        with pytest.raises(CheckpointError, match=r"round 0, chunk \d+ \(2.weight\): its bytes are damaged"):
            store.reconstruct_model_from_chunks(0, other)
        assert len(store.verify().problems) == 1
    assert digest_of(other.state_dict()) == before


def network(seed: int) -> nn.Sequential:
    """Return a model with buffers, whose statistics have seen data."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(288, 4))
    model(torch.randn(16, 3, 8, 8))
    return model.eval()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk_bytes", [None, 1000])
def test_a_fresh_model_predicts_the_same_after_loading_in_place(
    tmp_path: Path, engine: str, chunk_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, fresh = network(1), network(2)
    images = torch.randn(5, 3, 8, 8)
    pointers = [tensor.data_ptr() for tensor in fresh.state_dict().values()]
    with ChunkManager(tmp_path / "store.db", engine=engine, chunk_bytes=chunk_bytes) as store:
        store.save_model_chunks(saved, 0)
        monkeypatch.setattr(streams, "read", None)  # the way by the arena is not taken
        assert store.reconstruct_model_from_chunks(0, fresh) is fresh
    assert torch.equal(saved(images), fresh(images))
    assert [tensor.data_ptr() for tensor in fresh.state_dict().values()] == pointers
    assert int(fresh[1].num_batches_tracked) == 1


class Tied(nn.Module):
    """A model whose second name for a tensor a store need not know."""

    def __init__(self, seed: int, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        if tied:
            self.b.weight = self.a.weight


def columns_first(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


MODELS = {
    "not contiguous": (lambda: network(1), lambda: columns_first(network(2)), False),
    "tied in both": (lambda: Tied(1, True), lambda: Tied(2, True), True),
    "tied in the round": (lambda: Tied(1, True), lambda: Tied(2, False), False),
    "buffers": (lambda: nn.BatchNorm1d(7), lambda: nn.BatchNorm1d(7), True),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", MODELS)
def test_every_model_is_loaded_whichever_way_its_memory_allows(
    tmp_path: Path, engine: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_saved, make_fresh, in_place = MODELS[case]
    saved, fresh, ways = make_saved(), make_fresh(), []
    for name in ("load", "read"):
        way = getattr(streams, name)
        monkeypatch.setattr(streams, name, lambda *given, n=name, w=way: (ways.append(n), w(*given)))
    with ChunkManager(tmp_path / "store.db", engine=engine) as store:
        store.save_model_chunks(saved, 0)
        store.reconstruct_model_from_chunks(0, fresh)
    assert ways == (["load"] if in_place else ["read"])
    assert digest_of(fresh.state_dict()) == digest_of(saved.state_dict())


@pytest.mark.parametrize("engine", ENGINES)
def test_chunks_too_large_to_verify_in_the_cache_are_loaded_too(tmp_path: Path, engine: str) -> None:
    saved, fresh = nn.Linear(1500, 1100), nn.Linear(1500, 1100)
    for i, chunk_bytes in enumerate((streams.VERIFY_BYTES, streams.VERIFY_BYTES + 4, None)):
        with ChunkManager(tmp_path / f"{i}.db", engine=engine, chunk_bytes=chunk_bytes) as store:
            store.save_model_chunks(saved, 0)
            nn.init.zeros_(fresh.weight)
            store.reconstruct_model_from_chunks(0, fresh)
            assert digest_of(fresh.state_dict()) == digest_of(saved.state_dict())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cause", ["unreadable", "overwritten"])
def test_a_disk_that_fails_while_a_model_is_overwritten_is_not_kept_quiet(
    tmp_path: Path, engine: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, fresh = network(1), network(2)
    with ChunkManager(tmp_path / "store.db", engine=engine) as store:
        chunks = store.save_model_chunks(saved, 0).chunks
        read, reads = store._store.read, []

        def failing(entry: object, pieces: list[memoryview]) -> None:
            reads.append(entry)
            if len(reads) == chunks + 3 and cause == "unreadable":
                raise OSError("Input/output error")
            if len(reads) == chunks + 3:
                os.utime(tmp_path / "store.db", ns=(0, 0))
            read(entry, pieces)  # type: ignore[arg-type]

        monkeypatch.setattr(store._store, "read", failing)
        with pytest.raises(CheckpointError, match="round 0 could be .* partly overwritten and must be loaded") as error:
            store.reconstruct_model_from_chunks(0, fresh)
        assert str(tmp_path / "store.db") in str(error.value)
        monkeypatch.undo()
        store.reconstruct_model_from_chunks(0, fresh)
    assert digest_of(fresh.state_dict()) == digest_of(saved.state_dict())
