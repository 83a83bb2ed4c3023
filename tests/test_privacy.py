"""Local differential privacy: Flower's mod clips and perturbs what leaves a client, and composes with the rest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from flapp import config, messages
from flapp.settings import ConfigError
from tests.conftest import read_lines

Federate = Callable[..., tuple[dict[str, Any], Path]]
DIGITS = ("model=linear", "clients=2", "num_rounds=1", "evaluate.personal_epochs=0", "privacy.enabled=true")


def test_a_clients_update_is_clipped(federate: Federate) -> None:
    moved: list[float] = []
    models: list[dict[str, np.ndarray]] = []

    def tamper(name: str, reply: Message) -> Message:
        if messages.ARRAYS in reply.content.array_records:
            models.append({k: a.numpy() for k, a in messages.unpack_arrays(reply.content).items()})
        return reply

    silent = ("privacy.clipping_norm=0.001", "privacy.sensitivity=1e-12")
    federate(*DIGITS, *silent, tamper=tamper)
    federate(*DIGITS, *silent, "num_rounds=2", "train.lr=1e-12", tamper=tamper)
    clipped, still = models[0], models[2]
    moved = [float(((clipped[k] - still[k]) ** 2).sum()) for k in clipped]
    assert np.sqrt(sum(moved)) == pytest.approx(0.001, rel=0.01)


@pytest.mark.parametrize("settings", [(), ("model=vit_tiny", "strategy=fedlora", "lora=default", "train.steps=1")])
def test_noise_is_added_and_the_run_goes_to_its_end(federate: Federate, settings: tuple[str, ...]) -> None:
    noisy, path = federate(*DIGITS, *settings)
    again, _ = federate(*DIGITS, *settings)
    assert noisy["status"] == "finished"
    assert not any(line["failures"] for line in read_lines(path, "train"))
    assert noisy["model_sha256"] != again["model_sha256"]


def test_rules_that_send_only_a_part_back_are_refused() -> None:
    with pytest.raises(ConfigError, match="strategy.aggregation=ffa has only a part sent back"):
        config.compose(["strategy=fedlora", "lora=default", "strategy.aggregation=ffa", "privacy.enabled=true"])
