"""A model comes back from the chunk store bit for bit, or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.store import VERIFY_BYTES
from flapp.checkpoint.tensors import digest_of


def every_kind() -> dict[str, Tensor]:
    """Return tensors of every dtype and shape that needs care."""
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


@pytest.mark.parametrize("chunk_num", [None, 1, 2, 7, 12, 1000])
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path, chunk_num: int | None) -> None:
    state = every_kind()
    with ChunkManager(tmp_path / "store.db", chunk_num=chunk_num) as store:
        store.save_model_chunks(state, 3)
        loaded = store.reconstruct_model_from_chunks(3)
        assert store.verify().problems == ()
    assert list(loaded) == list(state)
    assert digest_of(loaded) == digest_of(state)
    assert loaded["tied"] is loaded["transposed"]


def network(seed: int) -> nn.Sequential:
    """Return a model with buffers, whose statistics have seen data."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(288, 4))
    model(torch.randn(16, 3, 8, 8))
    return model.eval()


def test_a_flipped_byte_is_named_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    path, saved, other = tmp_path / "store.db", network(1), network(2)
    with ChunkManager(path) as store:
        store.save_model_chunks(saved, 0)
    content, data = path.read_bytes(), saved[4].weight.detach().numpy().tobytes()[:300]
    assert content.count(data) == 1
    path.write_bytes(content.replace(data, bytes([data[0] ^ 1]) + data[1:]))
    before = digest_of(other.state_dict())
    with ChunkManager(path) as store:
        with pytest.raises(CheckpointError, match=r"round 0, chunk \d+ \(4.weight\): its bytes are damaged"):
            store.reconstruct_model_from_chunks(0, other)
        assert len(store.verify().problems) == 1
    assert digest_of(other.state_dict()) == before


class Tied(nn.Module):
    """A model with two layers that share a weight."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


def untie(model: nn.Module) -> nn.Module:
    model.b.weight = nn.Parameter(torch.randn(4, 4))
    return model


def large(seed: int) -> nn.Module:
    return nn.Linear(1500, 1100)


def columns_first(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


MODELS: dict[str, tuple[Callable[[int], nn.Module], Callable[[nn.Module], nn.Module], int | None, bool]] = {
    # the model, the change to the model that it is loaded into, the chunk size, and whether it is loaded in place
    "contiguous": (network, nn.Module.eval, 1000, True),
    "not contiguous": (network, columns_first, None, False),
    "tied in both": (Tied, nn.Module.eval, 1000, True),
    "tied in the round": (Tied, untie, None, False),
    "the largest chunk that fits into the cache": (large, nn.Module.eval, VERIFY_BYTES, True),
    "a chunk that is larger": (large, nn.Module.eval, VERIFY_BYTES + 4, False),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_is_loaded_in_place_if_its_memory_allows(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, change, chunk_bytes, in_place = MODELS[case]
    saved, fresh, ways = make(1), change(make(2)), []
    with ChunkManager(tmp_path / "store.db", chunk_bytes=chunk_bytes) as store:
        for name in ("load_into", "read_into"):
            way = getattr(store._store, name)
            monkeypatch.setattr(store._store, name, lambda *given, n=name, w=way: (ways.append(n), w(*given)))
        store.save_model_chunks(saved, 0)
        store.reconstruct_model_from_chunks(0, fresh)
    assert ways == ["load_into" if in_place else "read_into"]
    assert digest_of(fresh.state_dict()) == digest_of(saved.state_dict())


@pytest.mark.parametrize("cause", ["unreadable", "overwritten"])
def test_a_disk_that_fails_during_a_load_is_reported(
    store: ChunkManager, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, fresh = network(1), network(2)
    chunks = store.save_model_chunks(saved, 0).chunks
    read, reads = store._store.read, []

    def failing(entry: object, pieces: list[memoryview]) -> None:
        reads.append(entry)
        if len(reads) == chunks + 3 and cause == "unreadable":
            raise OSError("Input/output error")
        if len(reads) == chunks + 3:
            os.utime(store.path, ns=(0, 0))
        read(entry, pieces)  # type: ignore[arg-type]

    monkeypatch.setattr(store._store, "read", failing)
    with pytest.raises(CheckpointError, match="round 0 could be .* partly overwritten and must be loaded") as error:
        store.reconstruct_model_from_chunks(0, fresh)
    assert str(store.path) in str(error.value)
    monkeypatch.undo()
    store.reconstruct_model_from_chunks(0, fresh)
    assert digest_of(fresh.state_dict()) == digest_of(saved.state_dict())


def test_a_model_with_other_tensors_is_refused_by_name_and_stays_as_it_was(store: ChunkManager) -> None:
    store.save_model_chunks(nn.Linear(4, 2), 0)
    others = {
        "tensor bias is missing in the model": nn.Linear(4, 2, bias=False),
        "tensor num_batches_tracked is missing in the round": nn.BatchNorm1d(2),
        r"tensor weight is float32 \[2, 4\], the model has float32 \[4, 2\]": nn.Linear(2, 4),
        r"tensor weight is float32 \[2, 4\], the model has float64 \[2, 4\]": nn.Linear(4, 2).double(),
    }
    for message, model in others.items():
        before = digest_of(model.state_dict())
        with pytest.raises(CheckpointError, match=f"round 0 .*: {message}"):
            store.reconstruct_model_from_chunks(0, model)
        assert digest_of(model.state_dict()) == before
    with pytest.raises(CheckpointError, match="has no round 5: it holds 0"):
        store.reconstruct_model_from_chunks(5)
