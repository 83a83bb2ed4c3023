"""The local loop: train a model on a client's batches, and evaluate it. Plain PyTorch."""

import ctypes
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from inspect import unwrap
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Any, Tensor], Tensor]  # of a model's outputs and the targets: the mean over the batch
Count = Callable[[Any, Tensor], Mapping[str, float | Tensor]]  # of the same: sums over the batch, by name
T = TypeVar("T", bound=Optimizer)

MALLOC_OPTIONS = ((-4, 0), (-1, (1 << 31) - 1), (-2, 1 << 26))  # M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of malloc.h


@dataclass(frozen=True)
class Evaluation:
    """Sums over the samples evaluated: of losses, of correct answers (0 for regression), of samples, and the user's."""

    loss_sum: float
    correct: int
    count: int
    sums: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRules:
    """The rules of a training step: batches per step, largest gradient norm, FedProx's mu, and the model's precision.

    penalty is a term that each step adds to the loss; its gradient is computed in float32 and added before clipping.
    loss replaces loss_of.
    """

    accumulate: int = 1
    clip_norm: float | None = None
    proximal_mu: float = 0.0
    precision: str = "float32"
    penalty: Callable[[], Tensor] | None = None
    loss: Loss | None = None


def take_step(
    optimizer: Optimizer, parameters: list[Tensor], start: list[Tensor], rules: StepRules, batches: int
) -> None:
    """Step an optimizer along the mean gradient of so many backward passes, and drop the gradients.

    rules.proximal_mu adds mu (w - w_0), the gradient of FedProx's mu / 2 ||w - w_0||^2, where w_0, in `start`, are the
    weights before training (Li et al. 2020, arXiv:1812.06127, equation 2).
    """
    if batches > 1:
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], batches)
    if rules.penalty is not None:
        rules.penalty().backward()
    if rules.proximal_mu:
        with torch.no_grad():
            for p, before in zip(parameters, start, strict=True):
                if p.grad is not None:
                    p.grad.add_(p - before, alpha=rules.proximal_mu)
    if rules.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, rules.clip_norm)
    optimizer.step()
    drop_gradients(parameters)


def drop_gradients(parameters: list[Tensor]) -> None:
    """Do what Optimizer.zero_grad does, at a fraction of its cost."""
    for p in parameters:
        p.grad = None


def loss_of(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return cross-entropy for class labels (int64) or the squared error for real targets (float)."""
    if targets.dtype == torch.int64:
        return F.cross_entropy(outputs, targets, reduction=reduction)
    return F.mse_loss(outputs.squeeze(-1), targets, reduction=reduction)


def outputs_of(model: nn.Module, inputs: Tensor) -> Any:
    """Return a model's outputs for a batch; for models of the package transformers, the logits."""
    outputs = model(inputs)
    return getattr(outputs, "logits", outputs)


def _without_compiler(kind: type[T]) -> type[T]:
    """Return an optimizer class that does the same without importing torch.compile's machinery.

    PyTorch wraps these methods, and the wrappers import it on their first call: a second of CPU time in each process.
    """
    methods = {name: unwrap(getattr(kind, name)) for name in ("add_param_group", "zero_grad", "step")}
    return type(kind.__name__, (kind,), methods | {"step": torch.no_grad()(methods["step"])})


SGD, AdamW = _without_compiler(torch.optim.SGD), _without_compiler(torch.optim.AdamW)


def build_optimizer(
    model: nn.Module, name: str, lr: float, momentum: float = 0.0, weight_decay: float = 0.0
) -> Optimizer:
    """Build `sgd` or `adamw` over the trainable parameters; momentum is SGD's, AdamW ignores it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    # PyTorch would choose the same for the CPU, but look at every parameter again in each step.
    foreach = False if all(p.device.type == "cpu" for p in parameters) else None
    if name == "sgd":
        return SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, foreach=foreach)
    return AdamW(parameters, lr=lr, weight_decay=weight_decay, foreach=foreach)


def scheduled_lr(lr: float, schedule: str, server_round: int, num_rounds: int) -> float:
    """Return the learning rate of a round (from 1): `constant`, or `cosine` (Loshchilov & Hutter 2017, equation 5)."""
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (server_round - 1) / num_rounds))


def train(
    model: nn.Module,
    batches: Batches,
    optimizer: Optimizer,
    epochs: int = 1,
    steps: int | None = None,
    seed: int = 0,
    rules: StepRules = StepRules(),
) -> float:
    """Train in place for `epochs` passes over `batches`, or for exactly `steps` batches if given.

    Returns the mean loss per sample; each pass over a sample counts. seed: for torch's global generators, from which
    dropout draws; they are restored afterwards. Raises ValueError when there is no batch, and FloatingPointError when
    the loss is not finite.
    """
    device = next(model.parameters()).device
    total, samples, done = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    start = [p.detach().clone() for p in parameters] if rules.proximal_mu else []
    drop_gradients(parameters)
    waiting = 0  # backward passes since the last step
    model.train()
    loss_for = rules.loss or loss_of
    autocast = torch.autocast(device.type, torch.bfloat16) if rules.precision == "bfloat16" else nullcontext()
    with seeded(seed, device):
        for inputs, targets in _repeat(batches, epochs, steps):
            inputs, targets = inputs.to(device), targets.to(device)
            with autocast:
                loss = loss_for(outputs_of(model, inputs), targets)
            loss.backward()
            waiting += 1
            if waiting == rules.accumulate:
                take_step(optimizer, parameters, start, rules, waiting)
                waiting = 0
            total.add_(loss.detach(), alpha=len(targets))
            samples, done = samples + len(targets), done + 1
        if waiting:
            take_step(optimizer, parameters, start, rules, waiting)
    if done == 0:
        raise ValueError("there is no training sample to learn from")
    mean = total.item() / samples
    if not math.isfinite(mean):
        raise FloatingPointError(f"the training loss is {mean} after {done} steps: lower train.lr")
    return mean


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches, loss: Loss | None = None, count: Count | None = None) -> Evaluation:
    """Evaluate in eval mode and return sums, so that clients can be added up exactly.

    loss replaces loss_of; count gives more sums. Correct answers are counted if each sample has one class label.
    """
    device = next(model.parameters()).device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    correct, samples = torch.zeros((), dtype=torch.int64, device=device), 0
    sums: dict[str, float] = {}
    model.eval()
    with seeded(0, device):  # for code of the user's own that draws random numbers here
        for inputs, targets in batches:
            targets = targets.to(device)
            outputs = outputs_of(model, inputs.to(device))
            loss_sum += (
                loss_of(outputs, targets, reduction="sum") if loss is None else loss(outputs, targets) * len(targets)
            )
            if targets.dtype == torch.int64 and targets.ndim == 1:
                correct += (outputs.argmax(1) == targets).sum()
            samples += len(targets)
            for name, value in count(outputs, targets).items() if count else ():
                sums[name] = sums.get(name, 0.0) + float(value)
    return Evaluation(loss_sum.item(), int(correct.item()), samples, sums)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators for a while; for a CPU only the CPU's, which is much cheaper."""
    on_cpu = device is not None and device.type == "cpu"
    with torch.random.fork_rng(devices=[] if on_cpu else None):
        (torch.default_generator if on_cpu else torch).manual_seed(seed)
        yield


def _repeat(batches: Batches, epochs: int, steps: int | None) -> Batches:
    done = 0
    for _ in range(epochs) if steps is None else itertools.count():
        before = done
        for done, batch in enumerate(batches, before + 1):
            yield batch
            if done == steps:
                return
        if done == before:
            return


@cache
def keep_freed_memory() -> None:
    """Make the C library reuse the memory of freed arrays until this process ends.

    glibc returns arrays of more than 32 MiB to the system, which then clears every page of a new one: a quarter of the
    CPU time of training models of that size. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in MALLOC_OPTIONS:
            mallopt(option, value)
