"""Small models that differ from round to round, and checks that a store returns them bit for bit."""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.tensors import digest_of
from tests.support import refusals
from tests.support.poison import ask
from tools import checkpoints

Digests = dict[int, str]  # of the tensors of each round


def model_of(round_num: int, size: int = 9000) -> dict[str, Tensor]:
    """Return a model of 6.5 * size bytes: two thirds change in every round, the rest in every fourth."""
    new, old = np.random.default_rng(round_num), np.random.default_rng(round_num // 4)
    return {
        "frozen.weight": torch.from_numpy(old.standard_normal(size // 2, dtype=np.float32)),
        "body.weight": torch.from_numpy(new.standard_normal((size // 100, 100), dtype=np.float32)),
        "half": torch.from_numpy(new.standard_normal(size // 4)).to(torch.bfloat16),
        "steps": torch.tensor(round_num),
        "none": torch.empty(0, 3),
    }


def save_rounds(store: ChunkManager, *rounds: int, size: int = 9000) -> None:
    """Save model_of each round."""
    for number in rounds:
        store.save_model_chunks(model_of(number, size), number)


def digests_of(store: ChunkManager) -> Digests:
    """Read all rounds of a store."""
    return {row.round: digest_of(store.reconstruct_model_from_chunks(row.round)) for row in store.rounds()}


def expected(rounds: Mapping[int, int] | range | list[int], size: int = 9000) -> Digests:
    """Return the digests of model_of for these rounds; a mapping gives the model number of each round."""
    models = rounds if isinstance(rounds, Mapping) else {number: number for number in rounds}
    return {number: digest_of(model_of(model, size)) for number, model in models.items()}


def is_sound(path: Path) -> bool:
    """Return whether SQLite and the store find a file intact."""
    with ChunkManager(path) as store:
        return not store.verify().problems


def edit(path: Path, *statements: str) -> None:
    """Change a database behind the store's back."""
    with closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.executescript(statement)
        db.commit()


def ask_every_command(path: Path, first: int, last: int) -> list[str]:
    """Ask tools.checkpoints for everything about a store of two rounds; return the errors, of one line each."""
    out = path.parent / "out.safetensors"
    commands = [("list", path), ("list", path.parent), ("show", path, last), ("verify", path)]
    commands += [("diff", path, first, last), ("export", path, last, out), ("compact", path)]
    lines = [line for command in commands for line in ask(checkpoints.main, *command)]
    return [line for line in lines if line.startswith("error: ")]


@contextmanager
def refused(path: Path, message: str = ".") -> Iterator[None]:
    """Expect a CheckpointError that names `path`, in one line."""
    with refusals.refused(CheckpointError, message, path):
        yield
