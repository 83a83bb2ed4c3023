"""Small models that differ from round to round, and whether a store holds them bit for bit."""

import sqlite3
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.tensors import digest_of

Digests = dict[int, str]  # of the tensors of each round


def model_of(round_num: int, size: int = 9000) -> dict[str, Tensor]:
    """Return a model of 6.5 * size bytes, of which two thirds are another in each round and the rest in each fourth."""
    new, old = np.random.default_rng(round_num), np.random.default_rng(round_num // 4)
    return {
        "frozen.weight": torch.from_numpy(old.standard_normal(size // 2, dtype=np.float32)),
        "body.weight": torch.from_numpy(new.standard_normal((size // 100, 100), dtype=np.float32)),
        "half": torch.from_numpy(new.standard_normal(size // 4)).to(torch.bfloat16),
        "steps": torch.tensor(round_num),
        "none": torch.empty(0, 3),
    }


def digests_of(store: ChunkManager) -> Digests:
    """Read all rounds of a store."""
    return {row.round: digest_of(store.reconstruct_model_from_chunks(row.round)) for row in store.rounds()}


def expected(rounds: Mapping[int, int] | range | list[int], size: int = 9000) -> Digests:
    """Return the digests of model_of for rounds by number, or by number -> model."""
    models = rounds if isinstance(rounds, Mapping) else {number: number for number in rounds}
    return {number: digest_of(model_of(model, size)) for number, model in models.items()}


def is_sound(path: Path) -> bool:
    """Ask SQLite and the store itself, which no manager may have open."""
    with sqlite3.connect(path) as db:
        ((answer,),) = db.execute("PRAGMA integrity_check").fetchall()
    db.close()
    with ChunkManager(path) as store:
        return bool(answer == "ok") and not store.verify().problems
