"""HetLoRA: clients of different ranks train, test and prune themselves, and the server follows."""

from collections.abc import Callable
from functools import reduce
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import Tensor

from flapp import architecture, client_app, messages
from flapp.client.data import make_batches, open_client_data
from flapp.config.load import compose, from_dict, read_yaml
from flapp.config.schema import NodeConfig
from flapp.model.lora import adapted_layers, tail_norm
from flapp.model.lora_layers import LoRALayer
from flapp.server.run import initial_model
from flapp.training import StepRules, build_optimizer, evaluate, train
from tests.conftest import Federate, Tamper, break_and_resume, read_lines
from tests.support.adapters import adapted, batch
from tests.support.federations import state_after
from tests.support.replies import Sent, changing, failures, listen

HETLORA = (
    *("strategy=fedlora", "lora=default", "lora.rank=4", "lora.alpha=8", "strategy.aggregation=hetlora"),
    *("clients=3", "num_rounds=3", "evaluate.every=1", "train.steps=3", "train.schedule=constant"),
    *("train.lr=0.02", "evaluate.personal_epochs=0", "model.image_size=16"),
)
PRUNING = (*HETLORA, "lora.prune_gamma=0.5", "lora.prune_penalty=30")
DEALT = (*PRUNING, "lora.rank_by_client=[4,2,4]")
LAYER = "encoder.layers.encoder_layer_0.self_attention.qkv"


def trained_adapters() -> torch.nn.Module:
    """Return a small model with adapters whose B is not zero."""
    model = adapted(rank=4)
    torch.manual_seed(0)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def layers_of(model: torch.nn.Module) -> list[LoRALayer]:
    return list(adapted_layers(model).values())


def ranks_sent(path: Path) -> list[dict[str, int]]:
    """Return the ranks that clients had after each round, as metrics.jsonl has them."""
    return [line["client_ranks"] for line in read_lines(path, "train")]


def cut(client: str, rank: int, layers: Callable[[str], bool] = lambda key: True) -> Tamper:
    """Return a tamper function by which a client sends adapters cut, or padded, to a rank."""

    def change(reply: Message) -> None:
        arrays = messages.unpack_arrays(reply.content)
        for key in [key for key in arrays if ".lora_" in key and layers(key)]:
            values, axis = arrays[key].numpy(), int(key.endswith("_B"))
            kept = np.take(values, range(min(rank, values.shape[axis])), axis)
            missing = rank - kept.shape[axis]
            arrays[key] = messages.pack(np.pad(kept, [(0, missing * (axis == each)) for each in range(2)]))

    return changing(client, change=change)


def together(*tampers: Tamper) -> Tamper:
    return lambda name, reply: reduce(lambda sent, tamper: tamper(name, sent), tampers, reply)


def test_the_penalty_is_the_product_of_the_norms_of_the_last_ranks() -> None:
    model = trained_adapters()
    norm = np.linalg.norm
    wanted = sum(norm(numbers(each.lora_B)[:, 3:]) * norm(numbers(each.lora_A)[3:]) for each in layers_of(model))
    assert tail_norm(model, 3).item() == pytest.approx(wanted, rel=1e-6)
    assert tail_norm(model, 4).item() == 0.0


def test_a_step_goes_along_the_gradient_of_the_loss_and_of_the_penalty() -> None:
    weight, rank, lr = 0.7, 1, 0.1
    ours, plain = trained_adapters(), trained_adapters()
    start = [(numbers(each.lora_A), numbers(each.lora_B)) for each in layers_of(ours)]
    for model, penalty in ((ours, lambda: weight * tail_norm(ours, rank)), (plain, None)):
        train(model, [batch("vit_tiny")], build_optimizer(model, "sgd", lr), rules=StepRules(penalty=penalty))
    for (a, b), one, other in zip(start, layers_of(ours), layers_of(plain), strict=True):
        long_a, long_b = np.linalg.norm(a[rank:]), np.linalg.norm(b[:, rank:])
        down_a, down_b = np.zeros_like(a), np.zeros_like(b)
        down_a[rank:], down_b[:, rank:] = a[rank:] * long_b / long_a, b[:, rank:] * long_a / long_b
        for found, without, gradient in ((one.lora_A, other.lora_A, down_a), (one.lora_B, other.lora_B, down_b)):
            np.testing.assert_allclose(numbers(found) - numbers(without), -lr * weight * gradient, atol=1e-6)


def test_the_penalty_counts_once_however_many_batches_make_a_step() -> None:
    one, two = trained_adapters(), trained_adapters()
    inputs, labels = batch("vit_tiny")
    for model, batches in ((one, [(inputs, labels)]), (two, [(inputs, labels)] * 2)):
        rules = StepRules(accumulate=len(batches), penalty=lambda model=model: 5 * tail_norm(model, 1))
        train(model, batches, build_optimizer(model, "sgd", 0.1), rules=rules)
    for each, other in zip(layers_of(one), layers_of(two), strict=True):
        np.testing.assert_allclose(numbers(each.lora_B), numbers(other.lora_B), atol=1e-6)


@pytest.mark.parametrize(("factor", "rank"), [(0.99, 2), (1.0, 4), (1.01, 4)])
def test_a_client_prunes_itself_only_if_its_last_ranks_weigh_less_than_before(factor: float, rank: int) -> None:
    model = trained_adapters()
    settings = compose(list(PRUNING))

    def learn(penalty: Callable[[], Tensor]) -> float:
        assert penalty().item() == pytest.approx(30 * tail_norm(model, 2).item())
        with torch.no_grad():
            for layer in layers_of(model):
                layer.lora_B[:, 2:] *= factor
                layer.lora_B[:, :2] *= 0.5  # what is kept has no say
        return 0.0

    _, state = client_app.prune(model, settings, learn)
    for name, layer in adapted_layers(model).items():
        np.testing.assert_array_equal(numbers(state[f"{name}.lora_A"]), numbers(layer.lora_A)[:rank])
        np.testing.assert_array_equal(numbers(state[f"{name}.lora_B"]), numbers(layer.lora_B)[:, :rank])


@pytest.mark.parametrize(
    ("gamma", "least", "rank", "pruned"),
    [(0.75, 1, 8, 6), (0.75, 1, 3, 2), (0.5, 1, 1, 1), (0.5, 3, 4, 3), (0.5, 3, 3, 3), ("null", 1, 8, 8)],
)
def test_pruning_rounds_down_and_stops_at_the_least_rank(gamma: object, least: int, rank: int, pruned: int) -> None:
    overrides = ["lora.rank=8", f"lora.prune_gamma={gamma}", f"lora.rank_min={least}"]
    lora = compose([*HETLORA, *overrides]).lora
    assert architecture.pruned_rank(lora, rank) == pruned


@pytest.fixture(scope="module")
def pruned(federate: Federate) -> tuple[dict[str, Any], Path]:
    """Return the summary and the folder of a run whose clients prune themselves."""
    return federate(*DEALT)


def test_clients_that_prune_themselves_get_the_smaller_rank_from_then_on(pruned: tuple[dict[str, Any], Path]) -> None:
    path = pruned[1]
    found = ranks_sent(path)
    assert found[0] == {"0": 4, "1": 2, "2": 4}  # B was zero: nothing can weigh less
    assert found[-1]["1"] == 1
    assert found[-1]["0"] < 4
    for before, after in pairwise(found):
        assert all(after[name] in (before[name], before[name] // 2) for name in before)
    for line, ranks in zip(read_lines(path, "evaluate"), found, strict=True):
        size = line["client_bytes_down"]
        assert sorted(size, key=lambda name: (size[name], name)) == sorted(ranks, key=lambda n: (ranks[n], n))
    assert len(state_after(path)[f"{LAYER}.lora_A"]) == 4  # the global rank stays


@pytest.mark.slow
def test_clients_prune_by_a_heavy_penalty_in_any_order(federate: Federate, pruned: tuple[dict[str, Any], Path]) -> None:
    _, light = federate(*HETLORA, "lora.prune_gamma=0.5", "num_rounds=2")
    assert ranks_sent(light)[-1]["0"] == 4
    assert ranks_sent(pruned[1])[1]["0"] < 4
    assert federate(*DEALT, order=1)[0]["model_sha256"] == pruned[0]["model_sha256"]


def test_a_run_with_pruned_clients_is_resumed(federate: Federate, pruned: tuple[dict[str, Any], Path]) -> None:
    assert any(rank < 4 for rank in ranks_sent(pruned[1])[1].values())
    resumed, again = break_and_resume(federate, 3, "aggregate_evaluate", *DEALT, "run_name=pruned")
    assert resumed["model_sha256"] == pruned[0]["model_sha256"]
    assert ranks_sent(again)[-1] == ranks_sent(pruned[1])[-1]


@pytest.mark.parametrize(
    ("settings", "ranks"), [(PRUNING, {"0": 1, "1": 3, "2": 5}), (HETLORA, {"1": 2})], ids=["pruning", "off"]
)
def test_replies_of_ranks_that_are_not_due_are_refused(
    federate: Federate, settings: tuple[str, ...], ranks: dict[str, int]
) -> None:
    _, path = federate(*settings, "clients=4", "num_rounds=1", tamper=together(*starmap(cut, ranks.items())))
    assert failures(path).keys() == ranks.keys()
    for name, rank in ranks.items():
        assert f"lora_A as float32 [{rank}, 64], the model has float32 [4, 64]" in failures(path)[name]


def test_the_rank_that_pruning_gives_is_accepted_in_all_layers_or_in_none(federate: Federate) -> None:
    some = (cut("1", 2, lambda key: LAYER in key), cut("2", 2, lambda key: LAYER not in key))
    _, path = federate(*PRUNING, "num_rounds=1", tamper=together(cut("0", 2), *some))
    assert failures(path).keys() == {"1", "2"}
    assert ranks_sent(path)[0]["0"] == 2


@pytest.mark.parametrize("rule", ["hetlora", "flexlora", "flora"])
def test_clients_test_the_global_model_at_their_own_rank_and_at_the_global_scale(federate: Federate, rule: str) -> None:
    losses: dict[str, float] = {}
    seen: Sent = []

    def note(name: str, reply: Message) -> Message:
        metrics = reply.content.metric_records.get(messages.METRICS, {})
        if "loss-sum" in metrics:
            losses[name] = metrics["loss-sum"]
        return reply

    dealt = (f"strategy.aggregation={rule}", "lora.rank_by_client=[1,2,4]")
    _, path = federate(*HETLORA, *dealt, "num_rounds=2", "train.steps=5", tamper=together(listen(seen), note))
    assert {name: len(sent[f"{LAYER}.lora_A"]) for name, sent in seen} == {"0": 1, "1": 2, "2": 4}
    assert not any(line["failures"] for line in read_lines(path, "train"))
    settings = from_dict(read_yaml(path / "config.yaml"))
    start, arrays = initial_model(settings).state_dict(), state_after(path)
    plain = architecture.build(settings.model, settings.dataset)
    for number, rank in enumerate((1, 2, 4)):
        state = {}
        for key in plain.state_dict():
            state[key] = arrays.get(key, start[key])
            layer = key.removesuffix(".weight")
            if f"{layer}.lora_A" in arrays and key.endswith(".weight"):
                a, b = (numbers(arrays[f"{layer}.lora_{ab}"]) for ab in "AB")
                product = settings.lora.alpha / settings.lora.rank * b[:, :rank] @ a[:rank]
                state[key] = torch.from_numpy(numbers(state[key]) + product).float()
        plain.load_state_dict(state)
        data = open_client_data(settings, NodeConfig(num_partitions=3), str(number))
        found = evaluate(plain, make_batches(settings, data, "test", torch.device("cpu"), None))
        assert losses[str(number)] == pytest.approx(found.loss_sum, rel=1e-4)
