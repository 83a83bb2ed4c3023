"""FedLoRA: what clients keep, are sent and send back; test_lora_own_models.py has what each rule computes."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

from flapp import base, client_app
from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.tensors import digest_of
from flapp.model.files import load_tensors
from flapp.server.roster import FederationError
from tests.conftest import Federate, break_off, read_lines
from tests.support.federations import sites, state_after
from tests.support.replies import Sent, failures, listen, trained_in
from tests.support.split_models import write_vit

LORA = (
    *("strategy=fedlora", "lora=default", "lora.rank=4", "lora.alpha=8", "clients=3", "num_rounds=2"),
    *("train.steps=3", "evaluate.personal_epochs=0", "train.schedule=constant", "model.image_size=16"),
)
FEDSA = ("strategy.aggregation=fedsa", "evaluate.objective=personal_accuracy")


def homes_with_digits(folder: Path, data_home: Path, count: int) -> list[Path]:
    """Return homes of so many nodes, each with the prepared data and nothing else."""
    homes = [folder / f"site_{i}" for i in range(count)]
    for home in homes:
        shutil.copytree(data_home / "data" / "digits", home / "data" / "digits")
    return homes


def nodes_of(homes: list[Path]) -> list[dict[str, Any]]:
    return [site | {"home": str(home)} for site, home in zip(sites("012"), homes, strict=False)]


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_the_error_of_a_round_is_that_of_the_model_that_is_stored(federate: Federate, rule: str) -> None:
    seen: Sent = []
    _, path = federate(
        *LORA, f"strategy.aggregation={rule}", "lora.alpha=0.01", "strategy.weighting=uniform", tamper=listen(seen)
    )
    before, after = (
        {key: tensor.double().numpy() for key, tensor in state_after(path, number).items()} for number in (1, 2)
    )
    squares = np.zeros(2)
    for key in [key.removesuffix("A") for key in after if key.endswith(".lora_A")]:
        weight = key.removesuffix("lora_") + "weight"
        sent = [{ab: arrays[key + ab].astype(np.float64) for ab in "AB"} for _, arrays in seen[3:]]
        ideal = np.mean([each["B"] @ each["A"] for each in sent], axis=0)
        applied = (after[weight] - before[weight]) / (0.01 / 4) + after[key + "B"] @ after[key + "A"]
        squares += np.linalg.norm(applied - ideal) ** 2, np.linalg.norm(ideal) ** 2
    line = read_lines(path, "train")[1]
    assert line["aggregation_error"] == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=1e-6)
    assert line["aggregation_error"] > 1e-5  # adapters of so small a scale are lost in the rounding of the base


@pytest.mark.parametrize("rule", ["flexlora", "hetlora"])
def test_rows_that_nobody_trains_are_drawn_anew_so_that_they_can_learn(federate: Federate, rule: str) -> None:
    _, path = federate(*LORA, "clients=1", "num_rounds=1", "lora.rank_by_client=[2]", f"strategy.aggregation={rule}")
    tensors = state_after(path)
    layers = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
    assert len(layers) == 6
    for layer in layers:
        assert tensors[f"{layer}.lora_A"].any(dim=1).all()
        assert tensors[f"{layer}.lora_B"].any(dim=0).tolist() == [True, True, False, False]


@pytest.mark.slow
def test_private_factors_stay_with_their_client_and_personalise_it(federate: Federate, data_home: Path) -> None:
    summary, path = federate(*LORA, *FEDSA, "train.steps=10", "run_name=fedsa")
    assert summary["personal_accuracy"] != summary["accuracy"]
    stores = [data_home / "checkpoints" / "fedsa" / f"client_{i}" / f"client_{i}_chunks.db" for i in range(3)]
    kept = []
    for store in stores:
        with ChunkManager(store, create=False) as manager:
            kept.append(manager.reconstruct_model_from_chunks(2))
    with ChunkManager(path / "server_chunks.db", create=False) as manager:
        assert manager.rounds()[-1].metrics["accepted"] == {"0": 2, "1": 2, "2": 2}
    key = "encoder.layers.encoder_layer_0.self_attention.qkv.lora_B"
    assert key not in load_file(path / "model.safetensors")
    assert not np.array_equal(kept[0][key], kept[1][key])


def test_a_client_that_lost_its_private_factors_says_so(federate: Federate, data_home: Path) -> None:
    lost = data_home / "checkpoints" / "lost" / "client_1"

    def tamper(name: str, reply: Message) -> Message:
        if name == "1" and trained_in(reply) is not None:
            (lost / "client_1_chunks.db").unlink()
        return reply

    _, path = federate(*LORA, *FEDSA, "run_name=lost", tamper=tamper)
    assert failures(path, 2).keys() == {"1"}
    assert "has lost its private tensors of round 1: bring back its checkpoint store" in failures(path, 2)["1"]


@pytest.mark.slow
def test_a_client_without_the_base_gets_it_once_and_one_with_another_is_refused(
    federate: Federate, data_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    real = client_app.receive_base

    def receive(models: Path, *rest: Any) -> None:
        asked.append(models.parent)
        real(models, *rest)

    monkeypatch.setattr(client_app, "receive_base", receive)
    settings = (*LORA, "num_rounds=1")
    here, _ = federate(*settings)
    homes = homes_with_digits(tmp_path, data_home, 3)
    nodes = nodes_of(homes)
    away, path = federate(*settings, nodes=nodes)
    assert away["model_sha256"] == here["model_sha256"]
    assert sorted(asked) == homes
    again, _ = federate(*settings, nodes=nodes)
    assert again["model_sha256"] == here["model_sha256"]
    assert len(asked) == 3

    stored = next((homes[1] / "models").glob("*/base.safetensors"))
    tensors, _ = load_tensors(stored)
    base.save_tensors({key: tensor + 1 for key, tensor in tensors.items()}, stored)
    _, path = federate(*settings, "strategy.min_clients=2", "strategy.wait_for_clients=0.1", nodes=nodes)
    refused = read_lines(path, "roster")[0]["refused"]
    found = base.find_base(homes[1] / "models", stored.parent.name)
    assert refused == {
        "1": f"holds base {found[:12]} of the model, the server's is {stored.parent.name[:12]}: "
        f"remove models/{stored.parent.name} from its home and restart the client, which then receives it again"
    }


@pytest.mark.slow
def test_a_run_is_not_resumed_over_another_base(federate: Federate, tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    write_vit(start, size=16)
    settings = (*LORA, f"model.pretrained={start}", "run_name=rebased")
    break_off(federate, 2, "aggregate_train", *settings)
    write_vit(start, size=16, seed=1)
    with pytest.raises(FederationError, match="the run began over base .*, the base is now"):
        federate(*settings, "resume=true")
    write_vit(start, size=16)
    assert federate(*settings, "resume=true")[0]["status"] == "finished"


def test_a_base_may_not_lie_outside_the_models_folder(tmp_path: Path) -> None:
    with pytest.raises(base.BaseError, match="is not the digest of a base"):
        base.receive_base(tmp_path / "models", "../" * 3 + "etc/x", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_base_that_was_damaged_on_the_way_is_refused_and_sent_again(
    federate: Federate, data_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    asked: list[Path] = []
    real = client_app.receive_base

    def damage(models: Path, digest: str, tensors: dict[str, torch.Tensor]) -> None:
        asked.append(models)
        key = min(tensors)
        real(models, digest, tensors if len(asked) > 1 else tensors | {key: tensors[key] + 1})
        assert [path.name for path in models.iterdir()] == [digest]

    monkeypatch.setattr(client_app, "receive_base", damage)
    federate(*LORA, "num_rounds=1")  # prepares the data
    homes = homes_with_digits(tmp_path, data_home, 2)
    summary, path = federate(*LORA, "clients=2", nodes=nodes_of(homes))
    assert summary["status"] == "finished"
    assert asked == [asked[0], *({home / "models" for home in homes} - {asked[0]}), asked[0]]
    assert re.search("did not take the base: .* has digest .*: the server sends it again", caplog.text)
    assert len(read_lines(path, "roster")[0]["refused"]) == 1
    assert read_lines(path, "train")[-1]["client_bytes_up"].keys() == {"0", "1"}


def test_another_base_is_not_kept_and_one_that_comes_twice_is_stored_once(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((3,), float(i)) for i in range(3)}
    digest = digest_of(tensors)
    with pytest.raises(base.BaseError, match=f"has digest .*, the server's is {digest[:12]}"):
        base.receive_base(tmp_path, digest, tensors | {"t1": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []
    base.receive_base(tmp_path, digest, tensors)
    stored = base.base_path(tmp_path, digest)
    before = stored.stat()
    base.receive_base(tmp_path, digest, tensors)
    assert stored.stat() == before
    assert list(tmp_path.rglob("*")) == [stored.parent, stored]
    assert base.load_base(tmp_path, digest).keys() == tensors.keys()
    stored.write_bytes(b"cut")
    with pytest.raises(base.BaseError, match=r"base\.safetensors is damaged: remove it and restart this client"):
        base.load_base(tmp_path, digest)


@pytest.mark.slow
def test_the_final_model_is_plain_and_the_adapter_exported_where_it_is_all_that_changed(federate: Federate) -> None:
    _, path = federate(*LORA, "num_rounds=1")
    assert {file.name for file in (path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not any(".lora_" in key for key in load_file(path / "model.safetensors"))
    for setting in (f"lora.adapter={path / 'adapter'}", f"model.pretrained={path / 'model.safetensors'}"):
        assert federate(*LORA, setting, "num_rounds=1")[0]["status"] == "finished"
    _, folded = federate(*LORA, "num_rounds=1", "strategy.aggregation=flora")
    assert not (folded / "adapter").exists()


def test_weights_by_alignment_compose_with_adapters(federate: Federate) -> None:
    settings, weightings = (*LORA, "num_rounds=1"), ("num-examples", "alignment")
    plain, aligned = (federate(*settings, f"strategy.weighting={name}")[0]["model_sha256"] for name in weightings)
    assert plain != aligned
