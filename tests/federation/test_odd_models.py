"""Models with bfloat16 and other dtypes, tied weights, and tensors without dimensions or elements."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flapp import client_app
from flapp.base import keep_base, load_base, receive_base
from flapp.checkpoint.tensors import digest_of
from flapp.config.load import compose
from flapp.data.artifact import write_artifact
from flapp.messages import HeldArray, pack, view
from flapp.model.files import load_tensors, read_tensors, save_tensors, to_numpy, widen
from flapp.server import run
from flapp.server.inline import CLIENT_APP, InlineGrid, start_forkserver
from flapp.sums import WeightedSum, weighted_average
from tests.conftest import Federate, break_and_resume, read_clients, read_lines, run_app
from tests.support.federations import nodes, state_after
from tests.support.odd_model import CLASSES, LARGE, TOKENS, OddModel, build
from tests.support.replies import Sent, listen

SETTINGS = (
    *("dataset=custom", "dataset.name=tokens", "dataset.shape=[6]", f"dataset.classes={CLASSES}", "model=linear"),
    *("partition=iid", "num_rounds=4", "train.batch_size=3", "train.optimizer=sgd", "train.lr=0.1", "evaluate.every=4"),
)
SINGLE, GROUPED = (*SETTINGS, "clients=4"), (*SETTINGS, "clients=5", "train.steps=2")
FLOAT32 = {torch.bfloat16: torch.float32}  # how dtypes travel


@pytest.fixture(scope="module", autouse=True)
def odd_model(data_home: Path) -> Iterator[None]:
    """Prepare token ids in three classes, and let server and clients build the odd model."""
    draw = np.random.default_rng(1)
    for split, count in (("train", 240), ("test", 81)):
        labels = np.arange(count) % CLASSES
        tokens = draw.integers(0, TOKENS // CLASSES, (count, 6)) + labels[:, None] * (TOKENS // CLASSES)
        write_artifact(data_home / "data" / "tokens" / split, tokens, labels, ["a", "b", "c"])
    with pytest.MonkeyPatch.context() as patch:
        for module in (client_app, run):
            patch.setattr(module, "build", build)
        for cached in (client_app.cached_model, client_app.cached_adapted_model):
            cached.cache_clear()
        yield
        for cached in (client_app.cached_model, client_app.cached_adapted_model):
            cached.cache_clear()


def in_float64(found: Sent, key: str, counts: dict[str, int]) -> np.ndarray:
    """Return the weighted average of the clients' tensors by numpy in float64."""
    return np.average(
        [each[key].astype(np.float64) for _, each in found], axis=0, weights=[counts[n] for n, _ in found]
    )


def test_the_global_model_is_the_average_of_the_clients_and_the_final_one_has_the_models_own_dtypes(
    federate: Federate,
) -> None:
    seen: Sent = []
    words = (*SINGLE, "num_rounds=1", "evaluate.every=1", "clients=3")
    summary, path = federate(*words, tamper=listen(seen))
    assert (summary["status"], len(seen)) == ("finished", 3)
    counts = {name: line["train"] for name, line in read_clients(path).items()}
    own, saved, final = OddModel().state_dict(), state_after(path, 1), load_file(path / "model.safetensors")
    assert saved.keys() == final.keys() == own.keys()
    for key, like in own.items():
        average = in_float64(seen, key, counts)
        assert saved[key].dtype == FLOAT32.get(like.dtype, like.dtype)
        assert (final[key].dtype, final[key].shape) == (like.dtype, like.shape)
        if key == "codes":
            assert saved[key].tolist() == [LARGE, -3]  # which float64 does not hold
        elif like.is_floating_point():
            wanted = average.astype(to_numpy(like).dtype)
            np.testing.assert_allclose(saved[key].numpy(), wanted, rtol=1e-3 if key == "gain" else 1e-7)
        else:
            np.testing.assert_array_equal(saved[key].numpy(), np.rint(average))
        assert torch.equal(final[key], saved[key].to(like.dtype))
    start = {key: to_numpy(tensor) for key, tensor in run.initial_model(compose([*words])).state_dict().items()}
    floating = [key for key, tensor in own.items() if tensor.is_floating_point()]
    lengths = [sum(((arrays[k] - start[k].astype(float)) ** 2).sum() for k in floating) ** 0.5 for _, arrays in seen]
    assert read_lines(path, "train")[0]["update_norm"] == pytest.approx(sorted(lengths)[1], rel=1e-5)
    changed = [key for key, start in seen[0][1].items() if not np.array_equal(start, seen[1][1][key])]
    assert {"narrow.weight", "scale", "shift", "gain", "norm.running_mean", "first.weight"} <= set(changed)
    assert torch.equal(final["first.weight"], final["second.weight"])
    assert torch.equal(final["narrow.weight"], final["again.weight"])


@pytest.mark.slow
def test_the_odd_model_learns(federate: Federate) -> None:
    summary, path = federate(*SINGLE, "num_rounds=6", "train.epochs=3", "evaluate.central=true", "train.clip_norm=5")
    assert summary["accuracy"] > 0.9
    assert read_lines(path, "central")[-1]["accuracy"] == summary["accuracy"]
    assert load_file(path / "model.safetensors")["seen"].item() == 6 * 3 * 60


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [None, "fedadam"])
def test_a_resumed_run_ends_in_the_same_bytes(federate: Federate, optimizer: str | None) -> None:
    words = [*SINGLE, "train.steps=4", "evaluate.central=true", f"strategy.server_optimizer={optimizer or 'null'}"]
    if optimizer:
        words.append("strategy.server_lr=0.05")
    whole, path = federate(*words)
    words.append(f"run_name=odd-{optimizer}")  # it breaks off after round 2, and the clients' stores have round 3
    resumed, again = break_and_resume(federate, 3, "aggregate_train", *words)
    for server_round in (3, 4):
        assert digest_of(state_after(again, server_round)) == digest_of(state_after(path, server_round))
    assert resumed["model_sha256"] == whole["model_sha256"]
    norms = [[line["update_norm"] for line in read_lines(folder, "train")] for folder in (path, again)]
    assert norms[0] == norms[1]


@pytest.mark.slow
@pytest.mark.usefixtures("in_pairs")
def test_groups_single_messages_and_a_resume_in_groups_end_in_the_same_bytes(federate: Federate) -> None:
    words = (*GROUPED, "checkpoint=off")
    single, path = federate(*words)
    assert {line["replies"] for line in read_lines(path, "train")} == {5}
    in_groups: dict[str, Any] = {"nodes": nodes(3), "any_node": True}
    grouped, _ = federate(*words, **in_groups)
    assert grouped["model_sha256"] == single["model_sha256"]
    in_three = partial(federate, **in_groups)
    resumed, _ = break_and_resume(in_three, 3, "aggregate_train", *words, "run_name=odd-groups")
    assert resumed["model_sha256"] == single["model_sha256"]


@pytest.mark.usefixtures("in_pairs")
def test_the_sums_of_groups_are_float64_numpys(federate: Federate) -> None:
    seen: Sent = []
    words = (*GROUPED, "num_rounds=1", "evaluate.every=1", "checkpoint=off")
    federate(*words, tamper=listen(seen))
    _, path = federate(*words, nodes=nodes(2), any_node=True)
    counts = {name: line["train"] for name, line in read_clients(path).items()}
    saved = state_after(path, 1)
    assert saved["codes"].tolist() == [LARGE, -3]
    for key in ("narrow.weight", "scale", "shift", "norm.running_var"):
        average = in_float64(seen, key, counts).astype(saved[key].numpy().dtype)
        np.testing.assert_allclose(saved[key].numpy(), average, rtol=2e-7, atol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("in_pairs")
def test_workers_end_in_the_same_bytes(tmp_path: Path, data_home: Path, federate: Federate) -> None:
    words = (*GROUPED, "num_rounds=2", "evaluate.every=2", "checkpoint=off")
    single, _ = federate(*words)
    start_forkserver(CLIENT_APP)
    for workers in (0, 2):
        settings = compose([f"home={data_home}", f"run_name=workers-{workers}", *words])
        grid = InlineGrid({}, nodes(1), workers, client_app="tests.support.odd_model")
        try:
            assert run_app(settings, grid)[0]["model_sha256"] == single["model_sha256"]
        finally:
            grid.close()


@pytest.mark.parametrize("weighting", ["uniform", "alignment"])
def test_other_weightings_take_the_odd_model(federate: Federate, weighting: str) -> None:
    summary, path = federate(*SINGLE, "num_rounds=2", "evaluate.every=2", f"strategy.weighting={weighting}")
    assert summary["status"] == "finished"
    assert load_file(path / "model.safetensors")["codes"].tolist() == [LARGE, -3]


# Tensors one by one


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]
    + [torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 2)], ids=str)
def test_a_tensor_of_any_kind_travels_exactly(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 9 - 3).to(dtype)
    for array in (pack(to_numpy(tensor)), HeldArray(to_numpy(tensor))):
        back = torch.from_numpy(view(array).copy())
        assert (back.shape, back.dtype) == (tensor.shape, widen(tensor).dtype)
        assert torch.equal(back.to(dtype).double(), tensor.double())
    turned = tensor.permute(tuple(reversed(range(tensor.ndim))))
    save_tensors({"a": tensor, "b": tensor, "c": turned}, tmp_path / "x.safetensors")
    for found, _ in (load_tensors(tmp_path / "x.safetensors"), read_tensors(tmp_path / "x.safetensors")):
        assert all(found[key].dtype == dtype for key in "abc")
        assert all(torch.equal(found[key].double(), tensor.double()) for key in "ab")
        assert torch.equal(found["c"].double(), turned.double())


def test_tensors_over_one_memory_are_written_each_on_its_own(tmp_path: Path) -> None:
    memory = torch.arange(24.0)
    held = {"a": memory[2:6], "b": memory, "c": memory.view(4, 6), "d": memory.view(4, 6).T, "e": memory[20:]}
    save_tensors(held, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[key], held[key]) for key in held)
    save_tensors({key: tensor.clone() for key, tensor in held.items()}, tmp_path / "y.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_a_base_of_bfloat16_and_tied_tensors_reaches_a_client_whole(tmp_path: Path) -> None:
    state = OddModel().state_dict()
    base = keep_base(tmp_path / "server", state)
    sent = {key: pack(to_numpy(tensor)) for key, tensor in base.tensors.items()}
    receive_base(tmp_path / "client", base.digest, client_app.as_tensors(sent))
    client = OddModel()
    for parameter in client.parameters():
        nn.init.zeros_(parameter)
    client.load_state_dict(load_base(tmp_path / "client", base.digest))
    assert digest_of(client.state_dict()) == digest_of(state)


def test_integers_that_no_client_has_moved_stay_whatever_their_size() -> None:
    values = np.array([LARGE, -(2**63), 2**63 - 1, 2**53 + 1, 7, 0])
    like = {"n": pack(values), "u": pack(np.array([2**64 - 1, 5], np.uint64))}
    weights = [0.1, 3.0, 11.7, 2.2, 5.9]
    total = WeightedSum()
    total.add([(like, weight) for weight in weights[:3]], [(like, weight) for weight in weights[3:]])
    for found in (total.mean(sum(weights), like), weighted_average([like] * 5, weights)):  # type: ignore[list-item]
        assert all(np.array_equal(view(found[key]), view(like[key])) for key in like)


def test_integers_that_clients_have_moved_are_rounded_means() -> None:
    models = [{"n": pack(np.array([3, 10**12, -4]))}, {"n": pack(np.array([5, 10**12 + 4, -5]))}]
    total = WeightedSum()
    total.add([(models[0], 1.0), (models[1], 3.0)])
    assert view(total.mean(4.0, models[0])["n"]).tolist() == [4, 10**12 + 3, -5]
