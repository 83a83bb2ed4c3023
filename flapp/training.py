"""The local loop: train a model on a client's batches, and evaluate it. Plain PyTorch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrainResult:
    """What training did: mean loss per sample seen, samples seen (epochs count again), optimiser steps."""

    loss: float
    samples: int
    steps: int


@dataclass(frozen=True)
class Evaluation:
    """Sums over the samples evaluated: of loss, of correct answers (0 for regression), and how many."""

    loss_sum: float
    correct: int
    count: int


def loss_of(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return cross-entropy for class labels (int64) or the squared error for real targets (float)."""
    if targets.dtype == torch.int64:
        return F.cross_entropy(outputs, targets, reduction=reduction)
    return F.mse_loss(outputs.squeeze(-1), targets, reduction=reduction)


def build_optimizer(
    model: nn.Module, name: str, lr: float, momentum: float = 0.0, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Build `sgd` or `adamw` over the trainable parameters; momentum is SGD's, AdamW ignores it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


def scheduled_lr(lr: float, schedule: str, server_round: int, num_rounds: int) -> float:
    """Return the learning rate of a round (from 1): `constant`, or `cosine` (Loshchilov & Hutter 2017, equation 5)."""
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (server_round - 1) / num_rounds))


def train(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    epochs: int = 1,
    steps: int | None = None,
    seed: int = 0,
) -> TrainResult:
    """Train in place for `epochs` passes over `batches`, or for exactly `steps` batches if given.

    seed fixes dropout (torch's global generators, which are put back afterwards). Raises ValueError when there
    is no batch, and FloatingPointError when the loss is no longer finite: such a model is worth nothing.
    """
    device = next(model.parameters()).device
    total, samples, done = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for inputs, targets in _repeat(batches, epochs, steps):
            inputs, targets = inputs.to(device), targets.to(device)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(targets)
            samples, done = samples + len(targets), done + 1
    if done == 0:
        raise ValueError("there is no training sample to learn from")
    mean = total.item() / samples
    if not math.isfinite(mean):
        raise FloatingPointError(f"the training loss is {mean} after {done} steps: lower train.lr")
    return TrainResult(mean, samples, done)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches) -> Evaluation:
    """Evaluate in eval mode and return sums, so that clients can be added up exactly."""
    device = next(model.parameters()).device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    correct, count = torch.zeros((), dtype=torch.int64, device=device), 0
    model.eval()
    for inputs, targets in batches:
        targets = targets.to(device)
        outputs = model(inputs.to(device))
        loss_sum += loss_of(outputs, targets, reduction="sum")
        if targets.dtype == torch.int64:
            correct += (outputs.argmax(1) == targets).sum()
        count += len(targets)
    return Evaluation(loss_sum.item(), int(correct.item()), count)


def _repeat(batches: Batches, epochs: int, steps: int | None) -> Batches:
    done, passes = 0, 0
    while passes < epochs if steps is None else done < steps:
        start = done
        for batch in batches:
            yield batch
            done += 1
            if done == steps:
                return
        passes += 1
        if done == start:
            return
