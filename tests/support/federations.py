"""Nodes of a federation, the groups that they are asked for, and the models that its server saves."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from torch import Tensor

from flapp.checkpoint.manager import ChunkManager
from flapp.groups import GROUP
from flapp.messages import TRAIN
from tests.conftest import LocalGrid


def nodes(count: int) -> list[dict[str, Any]]:
    """Return the settings of the nodes of a simulation."""
    return [{"partition-id": i, "num-partitions": count} for i in range(count)]


def sites(ids: Iterable[str]) -> list[dict[str, Any]]:
    """Return the settings of nodes that say which client they are."""
    return [{"client-id": name} for name in ids]


def note_groups(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return a list to which each group that a node is asked to train is added, as the ids of its clients."""
    asked: list[list[str]] = []
    handle = LocalGrid.handle

    def listen(grid: LocalGrid, message: Message) -> Message:
        if message.metadata.message_type == TRAIN:
            asked.append(list(message.content.config_records[GROUP]["client-id"]))  # type: ignore[arg-type]
        return handle(grid, message)

    monkeypatch.setattr(LocalGrid, "handle", listen)
    return asked


def state_after(path: Path, server_round: int | None = None) -> dict[str, Tensor]:
    """Return the global model that the server saved with a round, by default the last."""
    with ChunkManager(path / "server_chunks.db", create=False) as store:
        number = store.rounds()[-1].round if server_round is None else server_round
        return store.reconstruct_model_from_chunks(number)
