"""What is drawn at random at a client depends on the seed, the client, the round and the purpose, on nothing else."""

from itertools import product

import numpy as np
import pytest
from flwr.app import Array, Message

from flapp import client_app
from flapp.config.load import derive_seed
from flapp.messages import ARRAYS
from tests.conftest import Federate
from tests.support.replies import Sent, changing, listen

DIGITS = ("model=linear", "clients=2", "num_rounds=2", "train.epochs=1", "train.schedule=constant")


def test_a_client_shuffles_anew_in_every_round(federate: Federate) -> None:
    """Clients are sent the same model in both rounds, so only the order of their samples differs."""
    seen: Sent = []
    received: dict[str, np.ndarray] = {}

    def repeat(reply: Message) -> None:
        record = reply.content.array_records[ARRAYS]
        for key, array in list(record.items()):
            record[key] = Array(received.setdefault(key, array.numpy()))

    hear, spoil = listen(seen), changing(change=repeat)
    words = ("num_rounds=3", "evaluate.personal_epochs=0", "strategy.norm_limit=null")
    federate(*DIGITS, *words, tamper=lambda name, reply: spoil(name, hear(name, reply)))
    rounds = [dict(seen[start : start + 2]) for start in (2, 4)]  # both began with the model of `received`
    for name in ("0", "1"):
        assert not np.array_equal(rounds[0][name]["fc.weight"], rounds[1][name]["fc.weight"])


def test_seeds_differ_by_seed_client_round_and_purpose(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[tuple[object, ...], int]] = []

    def draw(*parts: object) -> int:
        drawn.append((parts, derive_seed(*parts)))
        return drawn[-1][1]

    monkeypatch.setattr(client_app, "derive_seed", draw)
    federate(*DIGITS, "seed=1", "partition.seed=0", "evaluate.every=1")
    uses = set(product((1,), ("0", "1"), (1, 2), ("train", "personal"), ("order", "noise")))
    assert {parts for parts, _ in drawn} == uses
    assert len({value for _, value in drawn}) == len(uses)
