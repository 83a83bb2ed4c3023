"""What is drawn at random at a client depends on the seed, the client, the round and the purpose, on nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Message

from flapp import client_app
from flapp.config.load import derive_seed
from flapp.messages import ARRAYS

Federate = Callable[..., tuple[dict[str, Any], Path]]
DIGITS = ("model=linear", "clients=2", "num_rounds=2", "train.epochs=1", "train.schedule=constant")


def test_a_client_shuffles_anew_in_every_round(federate: Federate) -> None:
    """Clients are sent the same model in both rounds, so only the order of their samples differs."""
    trained: list[tuple[str, np.ndarray]] = []
    received: dict[str, np.ndarray] = {}

    def tamper(name: str, reply: Message) -> Message:
        if reply.has_content() and (record := reply.content.array_records.get(ARRAYS)):
            trained.append((name, record["fc.weight"].numpy()))
            for key, array in list(record.items()):
                record[key] = Array(received.setdefault(key, array.numpy()))
        return reply

    federate(*DIGITS, "num_rounds=3", "evaluate.personal_epochs=0", "strategy.norm_limit=null", tamper=tamper)
    rounds = [dict(trained[start : start + 2]) for start in (2, 4)]  # both began with the model of `received`
    for name in ("0", "1"):
        assert not np.array_equal(rounds[0][name], rounds[1][name])


@pytest.mark.parametrize("purposes", [("train", "personal")])
def test_seeds_differ_by_seed_client_round_and_purpose(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, purposes: tuple[str, ...]
) -> None:
    drawn: list[tuple[tuple[object, ...], int]] = []

    def draw(*parts: object) -> int:
        drawn.append((parts, derive_seed(*parts)))
        return drawn[-1][1]

    monkeypatch.setattr(client_app, "derive_seed", draw)
    for seed in (0, 1):
        federate(*DIGITS, f"seed={seed}", "partition.seed=0", "evaluate.every=1")
    uses = [(*key, purpose, use) for key in _keys() for purpose in purposes for use in ("order", "noise")]
    assert {parts for parts, _ in drawn} == set(uses)
    assert len({value for _, value in drawn}) == len(uses)


def _keys() -> list[tuple[int, str, int]]:
    return [(seed, client, number) for seed in (0, 1) for client in ("0", "1") for number in (1, 2)]
