"""Every rule over a model with a convolution, a Conv1D of transformers and a linear layer, against float64 numpy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flapp import messages
from flapp.config.load import compose
from flapp.model import build as builders
from flapp.model import layout as layouts
from flapp.model.lora import layout_of
from flapp.server.run import initial_model
from flapp.strategy.lora_rules import RULES
from tests.conftest import Federate, break_and_resume, read_clients, read_lines
from tests.support.adapters import MODELS, Mixed
from tests.support.federations import state_after
from tests.support.replies import Sent, listen

Arrays = dict[str, np.ndarray]
LAYERS = MODELS["mixed"].targets[0]
SCALING = 2.0
EXACT = ("ffa", "rolora", "flora", "fedex")
SETTINGS = (
    *("strategy=fedlora", "lora=default", "model.name=mixed", "lora.rank=4", "lora.alpha=8", "clients=3"),
    *(f"lora.targets=[{','.join(LAYERS)}]", "num_rounds=2", "train.steps=3", "train.lr=0.05"),
    *("train.schedule=constant", "evaluate.every=2", "evaluate.personal_epochs=0"),
)


@pytest.fixture(autouse=True)
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make model.name=mixed a choice."""
    offer(monkeypatch, Mixed)


def offer(monkeypatch: pytest.MonkeyPatch, model: Callable[..., nn.Module]) -> None:
    """Let model.name=mixed stand for a model."""
    monkeypatch.setitem(builders.BUILDERS, "mixed", lambda _name, _size, *given: model(*given[:2]))
    monkeypatch.setitem(layouts.LAYOUTS, "mixed", lambda _name, _size, *given: layout_of(model(*given)))


def by(rule: str) -> tuple[str, ...]:
    """Return the settings that choose a rule."""
    more = {"fedsa": "evaluate.objective=personal_accuracy", "hetlora": "lora.rank_by_client=[2,3,4]"}
    return f"strategy.aggregation={rule}", *([more[rule]] if rule in more else [])


def in_shape_of(weight: np.ndarray, layer: str, product: np.ndarray) -> np.ndarray:
    """Return what B A adds to the weight of a layer, written out by hand."""
    if layer == "turned":
        return np.einsum("oi->io", product)
    return product.reshape(6, 1, 3, 3) if layer == "conv" else product


def best_of_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def padded(factors: Arrays, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of a client with as many ranks as the global adapter."""
    a, b = factors[f"{layer}.lora_A"], factors[f"{layer}.lora_B"]
    return np.pad(a, ((0, 4 - len(a)), (0, 0))), np.pad(b, ((0, 0), (0, 4 - b.shape[1])))


def product_by_rule(rule: str, clients: list[tuple[float, Arrays]], layer: str) -> np.ndarray:
    """Return the B A that a rule makes of the clients' factors, each with its share, folded parts included."""
    pairs = [(share, *padded(factors, layer)) for share, factors in clients]
    ideal = np.sum([share * b @ a for share, a, b in pairs], axis=0)
    if rule in ("flora", "fedex"):
        return ideal
    if rule == "flexlora":
        return best_of_rank(ideal, 4)
    if rule == "hetlora":
        norms = np.array([share * np.linalg.norm(b @ a) for share, a, b in pairs])
        pairs = [(share, a, b) for share, (_, a, b) in zip(norms / norms.sum(), pairs, strict=True)]
    mean_a, mean_b = (np.sum([pair[0] * pair[i] for pair in pairs], axis=0) for i in (1, 2))
    return mean_b @ mean_a


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_adds_its_product_to_each_weight_in_the_weights_own_shape(federate: Federate, rule: str) -> None:
    seen: Sent = []
    settings = (*SETTINGS, *by(rule), "evaluate.central=true")
    summary, path = federate(*settings, tamper=listen(seen))
    lines = read_lines(path, "train")
    assert not any(line["failures"] for line in lines)
    for number in (1, 2):
        for _, sent in seen[3 * (number - 1) : 3 * number]:
            factors = {key.rpartition("_")[2] for key in sent if ".lora_" in key}
            assert factors == RULES[rule].travels(number)
            assert {key.partition(".")[0] for key in sent if ".lora_" not in key} == {"bn", "head"}
    one, two = seen[0][1], seen[1][1]
    assert {key for key in one if np.array_equal(one[key], two[key])} == {"bn.num_batches_tracked"}  # all are trained
    assert summary["bytes_up"] == sum(len(messages.pack(v).data) for _, sent in seen for v in sent.values())
    assert sum(lines[0]["client_bytes_up"].values()) == lines[0]["bytes_up"]
    central = read_lines(path, "central")[-1]
    if rule != "hetlora":  # its clients test the global model cut to their own ranks
        assert summary["accuracy"] == central["accuracy"]
        assert summary["loss"] == pytest.approx(central["loss"], rel=1e-6)
    start = initial_model(compose([*settings, "home=/nowhere"])).state_dict()
    saved = [state_after(path, number) for number in (1, 2)]
    first, second = ({key: t.double().numpy() for key, t in {**start, **each}.items()} for each in saved)
    counts = {name: line["train"] for name, line in read_clients(path).items()}
    assert len(set(counts.values())) > 1
    clients = [
        (counts[name] / sum(counts.values()), first | {key: value.astype(np.float64) for key, value in sent.items()})
        for name, sent in seen[3:]
    ]
    final = {key: tensor.double().numpy() for key, tensor in load_file(path / "model.safetensors").items()}
    for layer in LAYERS:
        weight = f"{layer}.weight"
        assert any(np.abs(sent[f"{layer}.lora_A"]).max() > 0 for _, sent in clients)
        if rule == "fedsa":
            wanted = np.sum([share * sent[f"{layer}.lora_A"] for share, sent in clients], axis=0)
            np.testing.assert_allclose(second[f"{layer}.lora_A"], wanted, rtol=0, atol=1e-6)
            continue
        product = product_by_rule(rule, clients, layer)
        assert np.linalg.norm(product) > 1e-3
        exact = first[weight] + SCALING * in_shape_of(first[weight], layer, product)
        np.testing.assert_allclose(final[weight], exact, rtol=0, atol=2e-6)
        adapter = second[f"{layer}.lora_B"] @ second[f"{layer}.lora_A"]
        now = second[weight] + SCALING * in_shape_of(second[weight], layer, adapter)
        np.testing.assert_allclose(now, exact, rtol=0, atol=2e-6)
        assert (weight in saved[0]) == RULES[rule].folds
    for key in ("bn.running_mean", "bn.running_var", "head.weight", "head.bias"):
        exact = sum(np.float64(sent[key]) * counts[name] for name, sent in seen[3:]) / sum(counts.values())
        np.testing.assert_array_equal(final[key], exact.astype(np.float32))
    for key in ("bn.weight", "bn.bias", "turned.bias", "dense.bias"):
        np.testing.assert_array_equal(final[key], start[key].double().numpy())
    for line in lines:
        error = line["aggregation_error"]
        assert error is None if rule == "fedsa" else (error < 1e-4) == (rule in EXACT)


def test_a_run_whose_adapter_peft_cannot_hold_ends_with_a_model_all_the_same(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Dilated(Mixed):
        def __init__(self, channels: int = 3, classes: int = 4) -> None:
            super().__init__(channels, classes)
            self.conv = nn.Conv2d(channels, 6, 3, padding=2, dilation=2, bias=False)

    offer(monkeypatch, Dilated)
    with caplog.at_level("WARNING", "flwr"):
        _, path = federate(*SETTINGS, "strategy.aggregation=fedit", "num_rounds=1")
    assert "no adapter folder is written" in caplog.text
    assert (path / "model.safetensors").exists()
    assert not (path / "adapter").exists()


class Half(nn.Module):
    """Layers of each kind in bfloat16 or float16; the output layer's weight is an embedding's, and stays frozen."""

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, 6, 3, padding=1, bias=False).bfloat16(), nn.BatchNorm2d(6)
        self.turned, self.dense, self.dropout = Conv1D(6, 6).bfloat16(), nn.Linear(6, 6).half(), nn.Dropout(0.2)
        self.count = nn.Parameter(torch.tensor(5), requires_grad=False)
        self.scale, self.embed = nn.Parameter(torch.tensor(1.0)), nn.Embedding(classes, 6)
        self.out = nn.Linear(6, classes, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.bn(self.conv(x.bfloat16()).float()).relu().mean((2, 3)))
        return self.out(self.dense(self.turned(x.bfloat16()).half()).float()) * self.scale


RESUMED = {  # among them, what carries state from step to step or draws at random; test_odd_models.py has fedadam
    "flora": ("strategy.fraction_train=0.7",),
    "rolora": ("checkpoint=off", "train.optimizer=sgd", "train.momentum=0.9"),
    "fedsa": (),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RESUMED)
def test_a_model_in_half_precision_trains_and_is_resumed_to_the_same_bytes(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    offer(monkeypatch, Half)
    settings = (*SETTINGS, *by(rule), *RESUMED[rule], "num_rounds=3", "evaluate.every=3", "train.steps=2")
    whole, path = federate(*settings)
    resumed, again = break_and_resume(federate, 3, "aggregate_train", *settings, f"run_name=half-{rule}")
    assert resumed["model_sha256"] == whole["model_sha256"]
    lines = read_lines(path, "train")
    assert not any(line["failures"] for line in lines + read_lines(again, "train"))
    final, start = load_file(path / "model.safetensors"), Half().state_dict()
    assert {key: tensor.dtype for key, tensor in final.items()} == {key: t.dtype for key, t in start.items()}
    assert torch.equal(final["out.weight"], final["embed.weight"])
    for line in lines:  # what is folded into a float16 weight is rounded there
        error = line["aggregation_error"]
        assert error is None if rule == "fedsa" else (error < 2e-3) == (rule in EXACT)
