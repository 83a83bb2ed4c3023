"""The front door: whole federations, and what must hold of them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array
from safetensors.torch import load_file
from torch import nn

from flapp import client_app
from flapp.model.build import BUILDERS
from flapp.model.layout import LAYOUTS
from flapp.model.lora import layout_of
from flapp.server.roster import FederationError
from tests.conftest import Federate, read_clients, read_lines
from tests.support.federations import nodes, sites
from tests.support.replies import Sent, changing, drop, failures, listen

DIGITS = (
    *("model=linear", "clients=4", "num_rounds=2", "train.epochs=1"),
    *("evaluate.every=1", "evaluate.personal_epochs=0"),
)
TOY = ("experiment=toy_regression", "num_rounds=2")
FEWER = ("strategy.min_clients=2", "strategy.wait_for_clients=0.1")


@pytest.fixture(scope="module")
def digits(federate: Federate) -> tuple[dict[str, Any], Path]:
    """Return the summary and the folder of a run that is also evaluated on the server."""
    return federate(*DIGITS, "evaluate.central=true")


def test_a_run_leaves_its_files_and_figures_that_agree(digits: tuple[dict[str, Any], Path]) -> None:
    summary, path = digits
    assert (summary["status"], summary["rounds"]) == ("finished", 2)
    assert summary["objective"] == summary["accuracy"]
    assert {p.name for p in path.iterdir()} >= {"config.yaml", "metrics.jsonl", "metrics.json", "model.safetensors"}
    train, evaluate, central = (read_lines(path, kind) for kind in ("train", "evaluate", "central"))
    assert [[line["round"] for line in lines] for lines in (train, evaluate, central)] == [[1, 2], [1, 2], [0, 1, 2]]
    for clients, server in zip(evaluate, central[1:], strict=True):  # exact over all test samples, no mean of means
        assert clients["accuracy"] == server["accuracy"]
        assert clients["loss"] == pytest.approx(server["loss"], rel=1e-6)
    spread = evaluate[-1]["accuracy_spread"]
    assert spread["min"] <= spread["p10"] <= spread["median"] <= spread["p90"] <= spread["max"]
    model = load_file(path / "model.safetensors")
    assert "fc.weight" in model
    assert summary["bytes_up"] == 2 * 4 * sum(len(Array(tensor.numpy()).data) for tensor in model.values())
    assert summary["bytes_down"] == 2 * summary["bytes_up"]  # training and evaluation


@pytest.mark.slow
def test_federated_training_learns(federate: Federate) -> None:
    summary, path = federate(*DIGITS, "num_rounds=4", "train.epochs=3", "evaluate.personal_epochs=1")
    assert summary["accuracy"] > 0.8
    losses = [line["loss"] for line in read_lines(path, "evaluate")]
    assert losses[-1] < losses[0]
    assert summary["personal_accuracy"] is not None


@pytest.mark.slow
def test_the_bytes_depend_on_seed_and_weighting_but_not_on_nodes_or_the_order_of_replies(
    federate: Federate, digits: tuple[dict[str, Any], Path]
) -> None:
    other_order, _ = federate(*DIGITS, order=1)
    shared, path = federate(*DIGITS, nodes=nodes(2))
    named, _ = federate(*DIGITS, nodes=sites("2031"))
    assert {run["model_sha256"] for run in (other_order, shared, named)} == {digits[0]["model_sha256"]}
    assert read_lines(path, "roster")[0]["clients"] == 4
    for setting in ("seed=1", "strategy.weighting=uniform"):
        assert federate(*DIGITS, setting)[0]["model_sha256"] != digits[0]["model_sha256"]


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
    found = [failures(path, number) for number in (1, 2, 3)]
    assert found == [{}, {"7": "failed: MemoryError: no room for the batch"}, {}]


@pytest.mark.parametrize(
    ("settings", "ids", "said"),
    [
        ((*DIGITS, FEWER[1]), "01", r"start: missing after 0.1 s: clients 2, 3 \(2 of 4 clients joined\)$"),
        ((*TOY, FEWER[1]), "019", "client 9: client-id 9 is not one of the 3 clients 0 to 2"),
        (
            (*DIGITS, *FEWER, "strategy.min_replies=4"),
            "013",
            "only 3 clients are present, and strategy.min_replies=4 are needed: lower it, or",
        ),
    ],
    ids=["missing", "unknown id", "absent"],
)
def test_a_run_without_enough_clients_or_replies_ends_and_says_why(
    federate: Federate, data_home: Path, settings: tuple[str, ...], ids: str, said: str
) -> None:
    name = f"ends-{abs(hash(said))}"
    with pytest.raises(FederationError, match=said):
        federate(*settings, f"run_name={name}", nodes=sites(ids))
    summary = json.loads((data_home / "runs" / name / "metrics.json").read_text())
    assert summary["status"] == "failed"
    assert re.search(said, summary["error"])


def test_min_replies_is_what_a_round_needs(federate: Federate) -> None:
    with pytest.raises(FederationError, match="2 of 3 clients gave a valid train reply, strategy.min_replies=3"):
        federate(*TOY, "strategy.min_replies=3", tamper=changing("1", change=drop))


def test_a_client_with_other_source_is_refused(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flapp.messages.source_digest", lambda: "f" * 64)  # what clients see; the roster has its own
    with pytest.raises(FederationError, match="flapp here has source ffffffffffff, the server's has"):
        federate(*TOY)


def test_sampling_draws_a_fraction_of_clients_by_seed_and_round(federate: Federate) -> None:
    settings = ("model=linear", "num_rounds=4", "train.steps=1", "evaluate.personal_epochs=0", "evaluate.every=4")
    drawn = []
    for order in range(2):
        seen: Sent = []
        federate(*settings, "strategy.fraction_train=0.3", tamper=listen(seen), order=order)
        drawn.append([name for name, _ in seen])
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 12
    assert len({frozenset(drawn[0][i : i + 3]) for i in range(0, 12, 3)}) > 1


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
    seen: Sent = []
    summary, path = federate(*DIGITS, "model.name=bn", tamper=listen(seen))
    assert summary["status"] == "finished"
    counts = {name: line["train"] for name, line in read_clients(path).items()}

    def mean(key: str) -> np.ndarray:
        return sum(np.float64(sent[key]) * counts[name] for name, sent in seen[4:]) / sum(counts.values())

    final = load_file(path / "model.safetensors")
    np.testing.assert_allclose(final["norm.running_mean"].numpy(), mean("norm.running_mean"), rtol=1e-6)
    assert not np.allclose(final["norm.running_var"].numpy(), 1)
    assert final["norm.num_batches_tracked"].dtype == torch.int64
    assert final["norm.num_batches_tracked"].item() == round(float(mean("norm.num_batches_tracked")))


def test_a_personal_test_that_diverges_leaves_the_global_one_standing(federate: Federate) -> None:
    summary, path = federate(*DIGITS, "train.optimizer=sgd", "evaluate.personal_lr=1e30", "evaluate.personal_epochs=2")
    assert summary["accuracy"] is not None
    assert summary["personal_accuracy"] is None
    assert failures(path, kind="evaluate") == {}


def test_absent_clients_are_counted_and_the_first_twenty_named(federate: Federate) -> None:
    settings = ("clients=30", "num_rounds=1", "partition.min_size=1")
    _, path = federate(*TOY, *settings, *FEWER, nodes=sites(["0", "1", "29"]))
    for kind in ("train", "evaluate"):
        (line,) = read_lines(path, kind)
        assert line["absent"] == [str(i) for i in range(2, 22)]
        assert line["absent_count"] == 27
