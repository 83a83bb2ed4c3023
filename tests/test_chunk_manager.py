"""A model comes back from the chunk store bit for bit, or not at all."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flapp.checkpoint import CheckpointError, ChunkManager, digest_of

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
