"""A federation as a plain PyTorch loop: one process, one thread, the clients one after another, their weighted mean.

This is what the benchmark compares simulations with, so it uses nothing of flapp but the class of the model. Client,
batches and steps are flapp's, because both draw them from the same seeds: the final models agree but for rounding.
tools/bench/stock.py copies this file into the app that it makes, so it must import nothing of tools.

    python -m tools.bench.bare WORK.json ENDS        write a line to ENDS after each round
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Work:
    """What is trained: the arguments of build_model, the paths of arrays and of the start, and how to train.

    drawn: the clients of each round; lrs: the learning rate of each round; rows, offsets: as saved partitions have
    them; steps: batches a client, or None for `epochs` passes over its samples.
    """

    model: dict[str, Any]
    images: str
    labels: str
    rows: str
    offsets: str
    start: str
    seed: int
    drawn: list[list[int]]
    lrs: list[float]
    optimizer: str
    weight_decay: float
    batch_size: int
    epochs: int
    steps: int | None


@dataclass(frozen=True)
class Data:
    """The samples in memory: uint8 images (N, C, H, W) or float features, the labels, and the rows of each client."""

    images: Tensor
    labels: Tensor
    rows: list[Tensor]


def read_work(path: Path) -> Work:
    return Work(**json.loads(path.read_text()))


def load_data(work: Work) -> Data:
    """Read all samples into memory."""
    images, labels = (torch.from_numpy(np.load(path)) for path in (work.images, work.labels))
    if images.dtype == torch.uint8:
        images = images.permute(0, 3, 1, 2).contiguous()
    offsets = np.load(work.offsets)
    return Data(images, labels, [torch.from_numpy(rows) for rows in np.split(np.load(work.rows), offsets[1:-1])])


def train_client(model: nn.Module, work: Work, data: Data, client: int, server_round: int) -> None:
    """Train the model in place on a client's samples."""
    parameters, lr = model.parameters(), work.lrs[server_round - 1]
    optimizer: torch.optim.Optimizer
    if work.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=lr, weight_decay=work.weight_decay)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=work.weight_decay)
    model.train()
    for rows in draw_batches(work, data.rows[client], client, server_round):
        inputs, targets = data.images[rows], data.labels[rows]
        if inputs.dtype == torch.uint8:
            inputs = inputs.float().mul_(2 / 255).sub_(1)  # normalization: half
        outputs = model(inputs)
        is_class = targets.dtype == torch.int64
        loss = F.cross_entropy(outputs, targets) if is_class else F.mse_loss(outputs.squeeze(-1), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def draw_batches(work: Work, rows: Tensor, client: int, server_round: int) -> Iterator[Tensor]:
    """Yield the rows of each batch, in an order drawn anew for each pass from flapp's seed for it."""
    digest = hashlib.sha256(f"{work.seed}\0{client}\0{server_round}\0train\0order".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    left = work.steps or work.epochs * -(-len(rows) // work.batch_size)
    while left:
        batches = rows[torch.randperm(len(rows), generator=generator)].split(work.batch_size)[:left]
        left -= len(batches)
        yield from batches


def train_round(
    model: nn.Module, work: Work, data: Data, state: dict[str, Tensor], server_round: int
) -> dict[str, Tensor]:
    """Train every client of a round from `state`, and return the mean of their models weighted by samples."""
    total = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    samples = 0
    for client in work.drawn[server_round - 1]:
        model.load_state_dict(state)
        train_client(model, work, data, client, server_round)
        count = len(data.rows[client])
        for key, tensor in model.state_dict().items():
            total[key].add_(tensor, alpha=count)
        samples += count
    return {key: tensor.div_(samples) for key, tensor in total.items()}


def run(work: Work, ends: Path) -> dict[str, Tensor]:
    """Train all rounds and return the final model."""
    from safetensors.torch import load_file

    from flapp.model.build import build_model  # not here when stock.py has copied this file

    torch.set_num_threads(1)
    model, data, state = build_model(**work.model), load_data(work), load_file(work.start)
    with ends.open("a") as file:
        for server_round in range(1, len(work.drawn) + 1):
            state = train_round(model, work, data, state, server_round)
            print("end", server_round, file=file, flush=True)
    return state


if __name__ == "__main__":
    run(read_work(Path(sys.argv[1])), Path(sys.argv[2]))
