"""Federations over shards: each client reads its own folder, the server checks every claim against the manifest."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flapp import messages
from flapp.data.shards.build import export_artifacts, write_shards
from flapp.data.shards.manifest import load_manifest
from flapp.server.roster import FederationError
from tests.conftest import Federate, read_clients, read_lines
from tests.support.leaf_files import Samples, as_leaf, write_leaf
from tests.support.replies import changing, failures, lying

CLIENTS = 4


def draw_digits(writers: int, count: int) -> Samples:
    """Draw samples that can be learned: of a class, one block of pixels is dark, under noise."""
    rng = np.random.default_rng(0)
    drawn = {}
    for writer in range(writers):
        labels = rng.integers(0, 10, count)
        images = rng.integers(200, 256, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[row * 9 : row * 9 + 9, column * 7 : column * 7 + 7] //= 4
        drawn[f"w{writer:02d}"] = (images.reshape(count, 784), labels)
    return drawn


@pytest.fixture(scope="module")
def femnist(data_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return home/data/femnist with shards of four clients, and the same samples as a shared artifact."""
    folder = data_home / "data" / "femnist"
    source = write_leaf(tmp_path_factory.mktemp("raw"), as_leaf(draw_digits(CLIENTS, 60)))
    manifest = write_shards(source, folder / "shards", "natural", CLIENTS)
    export_artifacts(manifest.path, folder)
    return folder


SHARDS = (
    *("experiment=femnist_fedavg", f"clients={CLIENTS}", "num_rounds=2", "strategy.fraction_train=1.0"),
    *("model=linear", "evaluate.every=1"),
)


def at_sites(folder: Path) -> list[dict[str, Any]]:
    return [{"client-id": i, "shard-path": str(folder / "shards" / f"client_{i}")} for i in "0123"]


def test_shards_at_sites_or_in_one_place_and_the_shared_artifact_give_the_same_bytes(
    federate: Federate, femnist: Path, tmp_path: Path
) -> None:
    own, path = federate(*SHARDS)
    shared, _ = federate(*SHARDS, "distributed_data.enabled=false")
    for name in ("manifest.json", "clients.jsonl"):  # all that a server needs
        shutil.copy(femnist / "shards" / name, tmp_path / name)
    sites, _ = federate(*SHARDS, f"distributed_data.shard_path={tmp_path}", nodes=at_sites(femnist))
    assert own["model_sha256"] == shared["model_sha256"] == sites["model_sha256"]
    assert own["accuracy"] == shared["accuracy"]
    assert read_lines(path, "roster")[0]["clients"] == CLIENTS


@pytest.mark.slow
def test_femnist_over_shards_learns(federate: Federate, femnist: Path) -> None:
    summary, path = federate(*SHARDS, "model=cnn", "num_rounds=4", "train.lr=0.05", "evaluate.personal_epochs=0")
    losses = [line["loss"] for line in read_lines(path, "evaluate")]
    assert losses[-1] < losses[0]
    assert summary["accuracy"] > 0.3  # chance is 0.1 over the ten classes drawn


@pytest.mark.slow
def test_the_best_round_by_the_shards_validation_samples_costs_no_training_sample(
    federate: Federate, femnist: Path
) -> None:
    settings = (*SHARDS, "num_rounds=6", "train.lr=5.0", "evaluate.select=best")
    own, path = federate(*settings)
    shared, other = federate(*settings, "distributed_data.enabled=false")
    assert own["model_sha256"] == shared["model_sha256"]
    assert own["selected_round"] == shared["selected_round"] < 6
    samples = load_manifest(femnist / "shards").facts["totals"]
    for run in (path, other):
        held = read_clients(run).values()
        assert {split: sum(each[split] for each in held) for split in ("train", "val", "test")} == {
            split: samples[split] for split in ("train", "val", "test")
        }
    measured = ("accuracy", "val_accuracy", "val_loss", "val_personal_accuracy")
    lines, others = read_lines(path, "evaluate"), read_lines(other, "evaluate")
    assert [[line[key] for key in measured] for line in lines] == [[line[key] for key in measured] for line in others]
    assert own["val_accuracy"] == max(line["val_accuracy"] for line in lines)


def test_a_streamed_shards_validation_samples_choose_as_those_in_memory_do(federate: Federate, femnist: Path) -> None:
    streamed, path = federate(*SHARDS, "distributed_data.streaming=true", "evaluate.select=best", "train.lr=5.0")
    lines = read_lines(path, "evaluate")
    best = max(lines, key=lambda line: line["val_accuracy"])
    assert (streamed["selected_round"], streamed["val_accuracy"]) == (best["round"], best["val_accuracy"])
    assert streamed["accuracy"] == best["accuracy"]
    untrained = ("num_rounds=1", "train.lr=1e-30", "evaluate.personal_epochs=0")
    found = [federate(*SHARDS, *untrained, f"distributed_data.streaming={how}")[0] for how in ("true", "false")]
    assert found[0]["val_loss"] == pytest.approx(found[1]["val_loss"])


def test_the_server_refuses_claims_that_are_not_the_manifests(federate: Federate, femnist: Path) -> None:
    lies: dict[str, tuple[dict[str, Any], str]] = {
        "1": ({"train": 7, "label_hist": [7] + [0] * 61}, "claims 7 train samples, the manifest says"),
        "2": ({"val": 99}, "claims 99 val samples, the manifest says"),
        "3": ({"shard_digest": "0" * 64}, "its shard has digest 000000000000, the manifest says"),
    }
    tamper = lying({client: values for client, (values, _) in lies.items()})
    _, path = federate(*SHARDS, "num_rounds=1", tamper=tamper)
    refused = read_lines(path, "roster")[0]["refused"]
    assert refused.keys() == lies.keys()
    assert all(reason in refused[client] for client, (_, reason) in lies.items())
    assert read_lines(path, "train")[0]["asked"] == CLIENTS - len(lies)


def test_without_strict_check_the_server_warns_and_goes_on(federate: Federate, femnist: Path) -> None:
    settings = (*SHARDS, "num_rounds=1", "distributed_data.strict_check=false")
    _, path = federate(*settings, tamper=lying({"3": {"val": 99}}))
    line = read_lines(path, "roster")[0]
    assert line["refused"] == {}
    assert "claims 99 val samples" in line["warnings"]["3"]
    assert read_lines(path, "train")[0]["asked"] == CLIENTS


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"shard-digest": "0" * 64}, "its data changed: shard digest 000000000000, attested as {own}"),
        ({"val": 99}, "the message's claim has a missing, foreign or mistyped entry: val"),  # only attest has counts
    ],
    ids=["another digest", "counts"],
)
def test_a_reply_that_claims_other_data_is_left_out(
    federate: Federate, femnist: Path, entry: dict[str, Any], reason: str
) -> None:
    lie = changing("2", change=lambda reply: reply.content.config_records[messages.CLAIM].update(entry))
    _, path = federate(*SHARDS, "num_rounds=1", tamper=lie)
    own = load_manifest(femnist / "shards")["2"].digest[:12]
    assert failures(path) == {"2": reason.format(own=own)}


def test_a_shard_that_is_damaged_missing_or_anothers_keeps_its_client_out_by_name(
    federate: Federate, femnist: Path, tmp_path: Path
) -> None:
    nodes = at_sites(femnist)
    copies = [tmp_path / f"client_{client}" for client in range(3)]
    for node, copy in zip(nodes[:2], copies[:2], strict=True):
        shutil.copytree(node["shard-path"], copy)
    content = (copies[0] / "train.safetensors").read_bytes()
    (copies[0] / "train.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (copies[1] / "meta.json").write_text("{")  # and the third is missing
    for node, copy in zip(nodes[:3], copies, strict=True):
        node["shard-path"] = str(copy)
    _, path = federate(*SHARDS, "num_rounds=1", nodes=nodes)
    refused = read_lines(path, "roster")[0]["refused"]
    assert refused.keys() == {"0", "1", "2"}
    for copy, client in zip(copies, "012", strict=True):
        assert str(copy) in refused[client]
        assert "\n" not in refused[client]
    nodes = at_sites(femnist)
    nodes[1]["shard-path"] = nodes[2]["shard-path"]
    _, path = federate(*SHARDS, "num_rounds=1", nodes=nodes)
    ((client, reason),) = read_lines(path, "roster")[0]["refused"].items()
    assert client == "1"
    assert "is the shard of client 2, not of client 1" in reason


def test_a_partition_of_other_clients_than_the_settings_say_is_refused(federate: Federate, femnist: Path) -> None:
    with pytest.raises(FederationError, match=r"natural.safetensors is of 4 clients: set clients=4"):
        federate(*SHARDS, "distributed_data.enabled=false", "clients=3")
