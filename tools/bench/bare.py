"""A federation as a plain PyTorch loop: one process, one thread, the clients one after another, their weighted mean.

This is what the benchmark compares simulations with, so it uses nothing of flapp but the class of the model. It uses
the same clients, batches and steps as flapp, from the same seeds, so the final models are equal except for rounding.
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
    """What is trained: the arguments of build_model, the files of samples, parts and first model, and how to train.

    data: a folder of images.npy and labels.npy; parts: an .npz of the rows of all clients and their offsets; drawn:
    the clients of each round; lrs: the learning rate of each round; train: the settings of that name.
    """

    model: dict[str, Any]
    data: str
    parts: str
    start: str
    seed: int
    drawn: list[list[int]]
    lrs: list[float]
    train: dict[str, Any]


@dataclass(frozen=True)
class Data:
    """The samples in memory: uint8 images (N, C, H, W) or float features, the labels, and the rows of each client."""

    images: Tensor
    labels: Tensor
    rows: list[Tensor]


def read_work(path: Path) -> Work:
    return Work(**json.loads(path.read_text()))


def load_data(work: Work) -> Data:
    images, labels = (torch.from_numpy(np.load(Path(work.data) / f"{name}.npy")) for name in ("images", "labels"))
    if images.dtype == torch.uint8:
        images = images.permute(0, 3, 1, 2).contiguous()
    parts = np.load(work.parts)
    return Data(images, labels, [torch.from_numpy(rows) for rows in np.split(parts["rows"], parts["offsets"][1:-1])])


def train_client(model: nn.Module, work: Work, data: Data, client: int, server_round: int) -> None:
    """Train the model in place on a client's samples."""
    make = torch.optim.SGD if work.train["optimizer"] == "sgd" else torch.optim.AdamW
    lr, decay = work.lrs[server_round - 1], work.train["weight_decay"]
    optimizer: torch.optim.Optimizer = make(model.parameters(), lr=lr, weight_decay=decay)
    model.train()
    for rows in draw_batches(work, data.rows[client], client, server_round):
        inputs, targets = data.images[rows], data.labels[rows]
        if inputs.dtype == torch.uint8:
            inputs = inputs.float().mul_(2 / 255).sub_(1)  # flapp's normalization "half": mean and deviation are 0.5
        outputs = model(inputs)
        is_class = targets.dtype == torch.int64
        loss = F.cross_entropy(outputs, targets) if is_class else F.mse_loss(outputs.squeeze(-1), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def draw_batches(work: Work, rows: Tensor, client: int, server_round: int) -> Iterator[Tensor]:
    """Yield the rows of each batch. flapp's seed for this client and round gives a new order in each pass."""
    digest = hashlib.sha256(f"{work.seed}\0{client}\0{server_round}\0train\0order".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    size = work.train["batch_size"]
    left = work.train["steps"] or work.train["epochs"] * -(-len(rows) // size)
    while left:
        batches = rows[torch.randperm(len(rows), generator=generator)].split(size)[:left]
        left -= len(batches)
        yield from batches


def run(work: Work, ends: Path) -> dict[str, Tensor]:
    """Train all rounds. Each ends with the mean of its clients' models, weighted by samples.

    Return the final model.
    """
    from safetensors.torch import load_file

    from flapp.model.build import build_model  # late: the app that stock.py makes has no flapp

    torch.set_num_threads(1)
    model, data, state = build_model(**work.model), load_data(work), load_file(work.start)
    with ends.open("a") as file:
        for server_round, clients in enumerate(work.drawn, start=1):
            total = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
            for client in clients:
                model.load_state_dict(state)
                train_client(model, work, data, client, server_round)
                for key, tensor in model.state_dict().items():
                    total[key].add_(tensor, alpha=len(data.rows[client]))
            samples = sum(len(data.rows[client]) for client in clients)
            state = {key: tensor.div_(samples) for key, tensor in total.items()}
            print("end", server_round, file=file, flush=True)
    return state


if __name__ == "__main__":
    run(read_work(Path(sys.argv[1])), Path(sys.argv[2]))
