"""What NAME trains: a classifier of rows of a table, its data and its loss. Edit it, then start `flapp run`."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 8
WEIGHTS = (1.0, 4.0)  # of the classes in the loss: one row in five is of class 1


def build_model(width: int = 32) -> nn.Module:
    """Return a new network; model.kwargs gives the arguments."""
    return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of a batch, in which the rare class counts more."""
    return F.cross_entropy(outputs, targets, weight=torch.tensor(WEIGHTS, device=outputs.device))


def make_data() -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """Return made-up rows and the names of the classes; flapp calls this once and keeps the result.

    Replace it by your own table, for example with pandas.read_csv: float32 features, one row a sample.
    """
    draw = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 800), ("test", 200)):
        rows = draw.normal(size=(count, FEATURES)).astype(np.float32)
        risk = rows[:, 0] + rows[:, 1] * rows[:, 2]
        splits[split] = (rows, (risk > 1.2).astype(np.int64))
    return splits, ["usual", "rare"]


def count(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return sums over a batch: flapp adds them up over batches and clients, exactly."""
    found = outputs.argmax(1) == 1
    wanted = targets == 1
    return {"hits": (found & wanted).sum(), "found": found.sum(), "wanted": wanted.sum()}


def score(sums: dict[str, float]) -> dict[str, float]:
    """Return what the sums over all clients mean: precision and recall of the rare class."""
    return {"precision": sums["hits"] / max(1.0, sums["found"]), "recall": sums["hits"] / max(1.0, sums["wanted"])}
