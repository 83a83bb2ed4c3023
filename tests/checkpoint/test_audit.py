"""A diff of two rounds has the right figures, and safetensors reads an exported round."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from flapp.checkpoint.audit import TensorChange
from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.tensors import digest_of
from tests.support.checkpoint_rounds import refused


def two_models() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return models whose tensors are in part changed, new, gone, of another kind, or the same."""
    torch.manual_seed(0)
    same = {"same": torch.randn(500), "zero": torch.zeros(3), "half": torch.randn(40).to(torch.bfloat16)}
    old = same | {"gone": torch.ones(5), "shape": torch.ones(2, 3), "dtype": torch.ones(4), "scalar": torch.tensor(3)}
    old |= {"floats": torch.randn(30, 20), "bool": torch.tensor([True, False, True])}
    new = old | {"floats": old["floats"].clone(), "half": old["half"] * 2, "bool": torch.tensor([True, True, False])}
    new["floats"][3, 4:9] += 1.5
    new |= {"zero": torch.tensor([0.0, 2.0, 0.0]), "scalar": torch.tensor(8), "shape": torch.ones(3, 2)}
    new |= {"dtype": torch.ones(4, dtype=torch.float64), "fresh": torch.ones(7, 2)}
    del new["gone"]
    return old, new


def in_numpy(old: Tensor, new: Tensor) -> tuple[float, float, int]:
    a, b = (np.asarray(tensor.float().numpy(), np.float64) for tensor in (old, new))
    norm, base = float(np.sqrt(np.sum((b - a) ** 2))), float(np.sqrt(np.sum(a**2)))
    return norm, norm / base if base else math.inf, int((a != b).sum())


@pytest.mark.parametrize("cut", [{}, {"chunk_bytes": 600}, {"chunk_num": 3}, {"chunk_num": 1}], ids=str)
def test_a_diff_has_the_figures_of_numpy_in_float64(path: Path, cut: dict[str, int]) -> None:
    old, new = two_models()
    with ChunkManager(path, **cut) as store:  # type: ignore[arg-type]
        store.save_model_chunks(old, 1)
        store.save_model_chunks(new, 2)
        found = {change.key: change for change in store.diff(1, 2)}
        back = {change.key: change.kind for change in store.diff(2, 1)}
        assert store.diff(2, 2) == []
    changed = {key: change for key, change in found.items() if change.kind == "changed"}
    assert sorted(changed) == ["bool", "floats", "half", "scalar", "zero"]
    for key, change in changed.items():
        norm, relative, count = in_numpy(old[key], new[key])
        assert (change.norm, change.relative_norm) == pytest.approx((norm, relative), rel=1e-12)
        assert change.changed == count
    others = {key: (change.kind, change.changed) for key, change in found.items() if key not in changed}
    assert others == {
        "gone": ("removed", 5),
        "fresh": ("added", 14),
        "shape": ("reshaped", 6),
        "dtype": ("reshaped", 4),
    }
    assert all(math.isnan(found[key].norm) and math.isnan(found[key].relative_norm) for key in others)
    assert (back["gone"], back["fresh"]) == ("added", "removed")


def test_a_diff_reads_no_unchanged_tensor_and_verifies_those_it_reads(store: ChunkManager) -> None:
    old, new = two_models()
    store.save_model_chunks(old, 1)
    store.save_model_chunks(new, 2)
    before = store.diff(1, 2)
    spoil = "UPDATE chunk_data SET data = zeroblob(length(data)) WHERE hash IN (SELECT hash FROM chunk_metadata"
    store._store.execute(f"{spoil} WHERE parts LIKE '%\"same\"%')")
    assert repr(store.diff(1, 2)) == repr(before)
    with refused(store.path, r"\(same\): its bytes are damaged"):
        store.reconstruct_model_from_chunks(1)
    store._store.execute(f"{spoil} WHERE parts LIKE '%\"floats\"%' AND round = 2)")
    with refused(store.path, r"round 2, chunk \d+ \(floats\): its bytes are damaged"):
        store.diff(1, 2)


def test_tied_tensors_differ_each_on_its_own(store: ChunkManager) -> None:
    shared = torch.ones(6)
    store.save_model_chunks({"a": shared, "b": shared}, 1)
    store.save_model_chunks({"a": torch.ones(6), "b": torch.full((6,), 2.0)}, 2)
    store.save_model_chunks({"a": torch.ones(6), "b": torch.ones(6)}, 3)
    assert store.diff(1, 2) == [TensorChange("b", "changed", math.sqrt(6), 1.0, 6)]
    assert store.diff(1, 3) == []


def test_safetensors_reads_an_exported_round_and_its_digest_is_the_files(store: ChunkManager, tmp_path: Path) -> None:
    old, _ = two_models()
    old |= {"tied": old["floats"], "empty": torch.empty(0, 5), "int64": torch.arange(9)}
    out = tmp_path / "out" / "round.safetensors"
    out.parent.mkdir()
    store.save_model_chunks(old, 4)
    sha256 = store.export(4, out)
    loaded = load_file(out)
    assert digest_of(loaded) == digest_of(old)
    assert (loaded["half"].dtype, loaded["bool"].dtype, loaded["scalar"].shape) == (torch.bfloat16, torch.bool, ())
    assert sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["flapp"]) == {"format_version": 1, "round": 4}
    assert list(out.parent.iterdir()) == [out]
