"""Server optimisers are Flower's own: its strategies, run by themselves, take the same steps."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedYogi
from flwr.supercore.task_identity import TaskIdentity

from flapp.strategy.server_optimizer import ServerOptimizer

RNG = np.random.default_rng(0)
START = {"w": RNG.normal(size=(3, 2)).astype(np.float32), "steps": np.array(5)}
AVERAGES = [{"w": START["w"] + RNG.normal(size=(3, 2)).astype(np.float32), "steps": np.array(5 + n)} for n in (1, 2, 3)]


OPTIMIZERS = ["fedadam", "fedyogi", "fedavgm"]
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # no message is made without


def record(tensors: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({key: Array(value) for key, value in tensors.items()})


def steps(optimizer: ServerOptimizer, first: int = 1, current: ArrayRecord | None = None) -> ArrayRecord:
    current = record(START) if current is None else current
    for number in range(first, 4):
        current = optimizer.step(current, record(AVERAGES[number - 1]), number)
    return current


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_rounds_are_those_of_flowers_strategy(name: str) -> None:
    found = steps(ServerOptimizer(name, 0.1, 0.8))
    if name == "fedavgm":
        flower = FedAvgM(server_learning_rate=0.1, server_momentum=0.8)
    else:
        flower = {"fedadam": FedAdam, "fedyogi": FedYogi}[name](eta=0.1, beta_1=0.8)
    current = {"w": START["w"]}
    for number in (1, 2, 3):
        flower.current_arrays = record(current) if name == "fedavgm" else current
        content = RecordDict(
            {"arrays": record({"w": AVERAGES[number - 1]["w"]}), "m": MetricRecord({"num-examples": 7})}
        )
        stepped, _ = flower.aggregate_train(number, [Message(content, dst_node_id=3, message_type="train")])
        current = {"w": stepped["w"].numpy().astype(np.float32)}
    np.testing.assert_array_equal(found["w"].numpy(), current["w"])
    assert found["w"].numpy().dtype == np.float32
    assert found["steps"].numpy() == 8  # whole numbers are averaged, not stepped


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_three_rounds_are_those_of_the_documented_formulas_in_float64(name: str, momentum: float) -> None:
    found = steps(ServerOptimizer(name, 0.1, momentum))["w"].numpy()
    x, b2, tau = START["w"].astype(np.float64), 0.99, 1e-3
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, average in enumerate(AVERAGES, 1):
        d = average["w"] - x
        m = momentum * m + (d if name == "fedavgm" else (1 - momentum) * d)
        if name == "fedavgm":
            x = x + 0.1 * m
            continue
        if name == "fedadam":
            eta, v = 0.1 * np.sqrt(1 - b2 ** (t + 1)) / (1 - momentum ** (t + 1)), b2 * v + (1 - b2) * d**2
        else:
            eta, v = 0.1, v - (1 - b2) * d**2 * np.sign(v - d**2)
        x = x + eta * m / (np.sqrt(v) + tau)
    np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-6)


def test_fedadams_first_step_has_adams_bias_correction_of_the_second() -> None:
    """Reddi et al. have none: their step would be (1 - b1) / sqrt(1 - b2) of the learning rate, 2 here."""
    average = {"w": START["w"] + np.float32(100), "steps": np.array(5)}
    step = ServerOptimizer("fedadam", 0.1, 0.8).step(record(START), record(average), 1)["w"].numpy() - START["w"]
    plain = 0.1 * (1 - 0.8) / np.sqrt(1 - 0.99)
    correction = np.sqrt(1 - 0.99**2) / (1 - 0.8**2)
    np.testing.assert_allclose(step, plain * correction, rtol=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_taken_back_go_on_as_if_nothing_had_happened(name: str) -> None:
    whole = steps(ServerOptimizer(name, 0.1, 0.8))
    first, later = ServerOptimizer(name, 0.1, 0.8), ServerOptimizer(name, 0.1, 0.8)
    after_one = first.step(record(START), record(AVERAGES[0]), 1)
    later.restore(first.state(after_one))
    np.testing.assert_array_equal(steps(later, 2, after_one)["w"].numpy(), whole["w"].numpy())
