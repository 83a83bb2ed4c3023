"""The front door: whole federations, and what must hold of them."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message
from safetensors.torch import load_file
from torch import nn

from flapp import client_app, messages
from flapp.model.build import BUILDERS
from flapp.model.layout import LAYOUTS
from flapp.model.lora import layout_of
from flapp.server.roster import FederationError
from tests.conftest import read_lines
from tests.support.claims import set_claim

Federate = Callable[..., tuple[dict[str, Any], Path]]
DIGITS = ("model=linear", "clients=4", "num_rounds=2", "train.epochs=1", "evaluate.every=1")
TOY = ("experiment=toy_regression", "num_rounds=2")


def spoil(client_id: str, change: Callable[[Message], Message]) -> Callable[[str, Message], Message]:
    """Return a tamper function that changes one client's trained models."""

    def tamper(name: str, reply: Message) -> Message:
        trained = reply.has_content() and messages.ARRAYS in reply.content.array_records
        return change(reply) if name == client_id and trained else reply

    return tamper


def fail(reply: Message) -> Message:
    return Message(Error(code=1, reason="left on purpose"), reply_to=reply)


def set_tensor(value: np.ndarray | None, key: str = "fc.bias") -> Callable[[Message], Message]:
    def change(reply: Message) -> Message:
        record = reply.content.array_records[messages.ARRAYS]
        if value is None:
            del record[key]
        else:
            record[key] = Array(value)
        return reply

    return change


def test_a_run_leaves_its_config_metrics_model_and_summary(federate: Federate) -> None:
    summary, path = federate(*DIGITS)
    assert summary["status"] == "finished"
    assert summary["rounds"] == 2
    assert summary["objective"] == summary["accuracy"]
    assert {p.name for p in path.iterdir()} >= {"config.yaml", "metrics.jsonl", "metrics.json", "model.safetensors"}
    assert [line["round"] for line in read_lines(path, "train")] == [1, 2]
    assert len(read_lines(path, "evaluate")) == 2
    assert "fc.weight" in load_file(path / "model.safetensors")


def test_federated_training_learns(federate: Federate) -> None:
    summary, path = federate(*DIGITS, "num_rounds=6", "train.epochs=3")
    assert summary["accuracy"] > 0.8
    losses = [line["loss"] for line in read_lines(path, "evaluate")]
    assert losses[-1] < losses[0]
    assert summary["personal_accuracy"] is not None


def test_the_bytes_depend_on_the_seed_but_not_on_nodes_or_the_order_of_replies(federate: Federate) -> None:
    first, _ = federate(*DIGITS)
    other_order, _ = federate(*DIGITS, order=1)
    shared, path = federate(*DIGITS, nodes=[{"partition-id": i, "num-partitions": 2} for i in range(2)])
    named, _ = federate(*DIGITS, nodes=[{"client-id": str(i)} for i in (2, 0, 3, 1)])
    assert {run["model_sha256"] for run in (other_order, shared, named)} == {first["model_sha256"]}
    assert read_lines(path, "roster")[0]["clients"] == 4
    assert federate(*DIGITS, "seed=1")[0]["model_sha256"] != first["model_sha256"]


def test_the_vit_with_dropout_is_the_same_bytes_each_time(federate: Federate) -> None:
    settings = ("clients=2", "num_rounds=1", "train.steps=2", "model.dropout=0.1", "evaluate.personal_epochs=0")
    assert len({federate(*settings, order=order)[0]["model_sha256"] for order in range(2)}) == 1


def set_metric(name: str, value: float) -> Callable[[Message], Message]:
    def change(reply: Message) -> Message:
        reply.content.metric_records[messages.METRICS][name] = value
        return reply

    return change


def set_digest(reply: Message) -> Message:
    reply.content.config_records[messages.CLAIM]["shard-digest"] = "0" * 64
    return reply


FAULTS = {  # of clients 1 to 8: what is wrong with the reply, and the beginning of the reason
    "1": (set_tensor(np.full(10, np.nan, np.float32)), "sent fc.bias with 10 NaN or infinite values of 10"),
    "2": (set_tensor(np.full(10, np.inf, np.float32)), "sent fc.bias with 10 NaN or infinite values of 10"),
    "3": (set_tensor(np.zeros(11, np.float32)), "sent fc.bias as float32 [11], the model has float32 [10]"),
    "4": (set_tensor(np.zeros(10, np.float64)), "sent fc.bias as float64 [10], the model has float32 [10]"),
    "5": (set_tensor(None), "has other tensors than the model (1 differ, the first is fc.bias)"),
    "6": (set_metric("num-examples", 10**9), "sent num-examples=1000000000, attested"),
    "7": (set_metric("train-loss", float("nan")), "sent train-loss=nan"),
    "8": (set_digest, "its data changed"),
}


def test_clients_with_unsound_replies_are_left_out_by_name(federate: Federate) -> None:
    def tamper(name: str, reply: Message, silent: bool) -> Message:
        is_trained = reply.has_content() and messages.ARRAYS in reply.content.array_records
        if name not in FAULTS or not is_trained:
            return reply
        return fail(reply) if silent else FAULTS[name][0](reply)

    settings = (*DIGITS, "clients=10")
    without, _ = federate(*settings, tamper=lambda name, reply: tamper(name, reply, True))
    bad, path = federate(*settings, tamper=lambda name, reply: tamper(name, reply, False))
    assert bad["model_sha256"] == without["model_sha256"]
    for line in read_lines(path, "train"):
        reasons = {failure["client"]: failure["reason"] for failure in line["failures"]}
        assert reasons.keys() == FAULTS.keys()
        assert all(reasons[name].startswith(reason) for name, (_, reason) in FAULTS.items())
        assert line["replies"] == 2


def test_the_result_without_a_client_is_the_average_of_the_others(federate: Federate) -> None:
    seen: dict[str, tuple[ArrayRecord, int]] = {}

    def listen(name: str, reply: Message) -> Message:
        if messages.ARRAYS in reply.content.array_records:
            metrics = messages.unpack_reply(reply.content).metrics
            seen[name] = (reply.content.array_records[messages.ARRAYS], int(metrics["num-examples"]))
        return set_tensor(np.full(10, np.nan, np.float32))(reply) if name == "1" and name in seen else reply

    def tamper(name: str, reply: Message) -> Message:
        return listen(name, reply) if messages.ARRAYS in reply.content.array_records else reply

    _, path = federate(*DIGITS, "num_rounds=1", tamper=tamper)
    others = [seen[name] for name in ("0", "2", "3")]
    total = sum(count for _, count in others)
    expected = sum(record["fc.weight"].numpy().astype(np.float64) * count / total for record, count in others)
    np.testing.assert_allclose(load_file(path / "model.safetensors")["fc.weight"].numpy(), expected, rtol=1e-6)


def test_an_evaluation_that_lacks_a_number_is_left_out(federate: Federate) -> None:
    def tamper(name: str, reply: Message) -> Message:
        if name == "1" and "personal-correct" in reply.content.metric_records.get(messages.METRICS, {}):
            del reply.content.metric_records[messages.METRICS]["personal-correct"]
        return reply

    _, path = federate(*DIGITS, tamper=tamper)
    assert read_lines(path, "evaluate")[0]["failures"] == [{"client": "1", "reason": "sent no personal-correct"}]


def test_two_nodes_with_one_client_id_are_both_left_out_and_the_rest_goes_on(federate: Federate) -> None:
    settings = (*DIGITS, "strategy.min_clients=3", "strategy.wait_for_clients=0.1")
    without, _ = federate(*settings, nodes=[{"client-id": i} for i in "013"])
    twins, path = federate(*settings, nodes=[{"client-id": i} for i in "01223"])
    assert twins["model_sha256"] == without["model_sha256"]
    refused = read_lines(path, "roster")[0]["refused"]
    assert refused == {"2": "2 nodes claim this client id: give each site its own"}


def test_one_failing_client_of_ten_is_named_and_the_run_goes_on(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = client_app.fit

    def fit(model: Any, task: Any, *rest: Any) -> Any:
        if task.client_id == "7" and task.instructions.server_round == 2:
            raise MemoryError("no room for the batch")
        return real(model, task, *rest)

    monkeypatch.setattr(client_app, "fit", fit)
    summary, path = federate("model=linear", "num_rounds=3", "train.epochs=1", "evaluate.personal_epochs=0")
    assert summary["status"] == "finished"
    failures = {line["round"]: line["failures"] for line in read_lines(path, "train")}
    assert failures[2] == [{"client": "7", "reason": "failed: MemoryError: no room for the batch"}]
    assert failures[1] == failures[3] == []


def test_a_round_without_enough_replies_ends_the_run_and_says_why(federate: Federate, data_home: Path) -> None:
    with pytest.raises(FederationError, match=r"round 1: clients 0 to 2: .*lower train.lr.* \(0 of 3 clients gave"):
        federate(*TOY, "train.lr=1e30", "train.steps=50", "run_name=diverges")
    summary = json.loads((data_home / "runs" / "diverges" / "metrics.json").read_text())
    assert summary["status"] == "failed"
    assert "lower train.lr" in summary["error"]


def test_min_replies_is_what_a_round_needs(federate: Federate) -> None:
    with pytest.raises(FederationError, match="2 of 3 clients gave a valid train reply, strategy.min_replies=3"):
        federate(*TOY, "strategy.min_replies=3", tamper=spoil("1", fail))


def test_a_server_that_waits_in_vain_names_who_is_missing(federate: Federate) -> None:
    start = time.monotonic()
    nodes = [{"client-id": "0"}, {"client-id": "1"}]
    with pytest.raises(FederationError, match=r"start: missing after 0.2 s: clients 2, 3 \(2 of 4 clients joined\)$"):
        federate(*DIGITS, "strategy.wait_for_clients=0.2", nodes=nodes)
    assert time.monotonic() - start < 30


def test_a_dataset_that_is_not_there_fails_with_the_way_to_mend_it(federate: Federate) -> None:
    settings = ("dataset=custom", "dataset.name=nowhere", "dataset.shape=[8,8,1]", "dataset.classes=3")
    said = r"cannot start: clients 0 to 2: dataset nowhere is not prepared.*\(0 of 3 clients joined\)$"
    with pytest.raises(FederationError, match=said):
        federate(*settings, "clients=3", "model=linear")


def test_a_client_with_other_source_is_refused(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flapp.messages.source_digest", lambda: "f" * 64)  # what clients see; the roster has its own
    with pytest.raises(FederationError, match="flapp here has source ffffffffffff, the server's has"):
        federate(*TOY)


def test_an_unknown_client_id_is_refused(federate: Federate) -> None:
    nodes = [{"client-id": i} for i in ("0", "1", "9")]
    with pytest.raises(FederationError, match="client 9: client-id 9 is not one of the 3 clients 0 to 2"):
        federate(*TOY, "strategy.wait_for_clients=0.1", nodes=nodes)


def test_sampling_draws_a_fraction_of_clients_by_seed_and_round(federate: Federate) -> None:
    settings = ("model=linear", "num_rounds=4", "train.steps=1", "evaluate.personal_epochs=0", "evaluate.every=4")
    seen: list[list[str]] = [[], []]
    for names in seen:

        def listen(name: str, reply: Message, names: list[str] = names) -> Message:
            if messages.ARRAYS in reply.content.array_records:
                names.append(name)
            return reply

        federate(*settings, "strategy.fraction_train=0.3", tamper=listen, order=len(seen[0]))
    assert seen[0] == seen[1]
    rounds = [frozenset(seen[0][i : i + 3]) for i in range(0, 12, 3)]
    assert len(seen[0]) == 12
    assert len(set(rounds)) > 1


def test_uniform_weighting_counts_every_client_alike(federate: Federate) -> None:
    by_size, _ = federate(*DIGITS)
    alike, _ = federate(*DIGITS, "strategy.weighting=uniform")
    assert by_size["model_sha256"] != alike["model_sha256"]


def test_global_accuracy_is_exact_over_all_test_samples(federate: Federate) -> None:
    _, path = federate(*DIGITS, "evaluate.central=true")
    federated, central = read_lines(path, "evaluate"), read_lines(path, "central")
    assert [line["round"] for line in central] == [0, 1, 2]
    for clients, server in zip(federated, central[1:], strict=True):
        assert clients["accuracy"] == server["accuracy"]
        assert clients["loss"] == pytest.approx(server["loss"], rel=1e-6)
    spread = federated[-1]["accuracy_spread"]
    assert spread["min"] <= spread["p10"] <= spread["median"] <= spread["p90"] <= spread["max"]


def test_bytes_are_counted_from_the_messages(federate: Federate) -> None:
    summary, path = federate(*TOY)
    model = sum(len(Array(t.numpy()).data) for t in load_file(path / "model.safetensors").values())
    assert summary["bytes_up"] == 2 * 3 * model
    assert summary["bytes_down"] == 2 * summary["bytes_up"]  # training and evaluation


class BatchNormNet(nn.Module):
    """A model with float and int64 buffers."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, stride=4)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 8 * 8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


def test_batchnorm_buffers_are_averaged_and_counts_stay_whole_numbers(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUILDERS, "bn", lambda name, size, channels, classes, dropout: BatchNormNet(channels, classes))
    monkeypatch.setitem(LAYOUTS, "bn", lambda name, size, channels, classes: layout_of(BatchNormNet(channels, classes)))
    sent: dict[str, tuple[ArrayRecord, int]] = {}

    def listen(name: str, reply: Message) -> Message:
        if messages.ARRAYS in reply.content.array_records:
            metrics = messages.unpack_reply(reply.content).metrics
            sent[name] = (reply.content.array_records[messages.ARRAYS], int(metrics["num-examples"]))
        return reply

    summary, path = federate(*DIGITS, "model.name=bn", tamper=listen)
    assert summary["status"] == "finished"
    final = load_file(path / "model.safetensors")
    total = sum(count for _, count in sent.values())
    mean = sum(record["norm.running_mean"].numpy().astype(np.float64) * n / total for record, n in sent.values())
    np.testing.assert_allclose(final["norm.running_mean"].numpy(), mean, rtol=1e-6)
    assert not np.allclose(final["norm.running_var"].numpy(), 1)
    steps = sum(int(record["norm.num_batches_tracked"].numpy()) * n / total for record, n in sent.values())
    assert final["norm.num_batches_tracked"].dtype == torch.int64
    assert final["norm.num_batches_tracked"].item() == round(steps)


def test_a_claim_with_a_histogram_of_nonsense_does_not_end_the_run(federate: Federate) -> None:
    def claim(value: list[Any]) -> Callable[[str, Message], Message]:
        def tamper(name: str, reply: Message) -> Message:
            set_claim(reply.content, "1", label_hist=value)
            return reply

        return tamper

    settings = (*DIGITS, "num_rounds=1", "strategy.min_clients=3", "strategy.wait_for_clients=0.1")
    for value, reason in (
        (["a"] * 10, "label histogram that is not of counts"),
        ([-1] * 10, "label histogram that is not of counts"),
        ([], "claims a histogram of 0 classes, the dataset has 10"),
    ):
        _, path = federate(*settings, tamper=claim(value))
        line = read_lines(path, "roster")[0]
        assert line["clients"] == 3
        assert reason in " ".join(line["refused"].values())


def test_a_personal_test_that_diverges_leaves_the_global_one_standing(federate: Federate) -> None:
    summary, path = federate(*DIGITS, "train.optimizer=sgd", "evaluate.personal_lr=1e30", "evaluate.personal_epochs=20")
    assert summary["accuracy"] is not None
    assert summary["personal_accuracy"] is None
    assert read_lines(path, "evaluate")[0]["failures"] == []


def test_clients_that_left_are_named_and_count_against_min_replies(federate: Federate) -> None:
    settings = (*DIGITS, "strategy.min_clients=2", "strategy.wait_for_clients=0.1")
    nodes = [{"client-id": i} for i in "013"]
    _, path = federate(*settings, nodes=nodes)
    line = read_lines(path, "train")[0]
    assert (line["absent"], line["absent_count"]) == (["2"], 1)
    with pytest.raises(FederationError, match="3 of 3 clients gave a valid train reply, strategy.min_replies=4"):
        federate(*settings, "strategy.min_replies=4", nodes=nodes)


def test_of_many_absent_clients_twenty_are_named_and_all_are_counted(federate: Federate) -> None:
    settings = ("clients=30", "num_rounds=1", "strategy.min_clients=3", "strategy.wait_for_clients=0.1")
    nodes = [{"client-id": str(i)} for i in (0, 1, 29)]
    _, path = federate(*TOY, *settings, "partition.min_size=1", nodes=nodes)
    for kind in ("train", "evaluate"):
        (line,) = read_lines(path, kind)
        assert line["absent"] == [str(i) for i in range(2, 22)]
        assert line["absent_count"] == 27
