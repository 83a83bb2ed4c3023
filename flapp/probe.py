"""Try the user's own code on a few samples before round 1, so that a mistake is one line and not a failed run."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flapp.architecture import adapt, build
from flapp.config.schema import Config, ConfigError
from flapp.custom import blaming, numbers_of, own, place_of_code, resolve, scores_of
from flapp.model.lora import mark_only_lora_as_trainable
from flapp.training import build_optimizer, loss_of, outputs_of

SAMPLES = 8


def probe(config: Config, batch: tuple[Tensor, Tensor]) -> None:
    """Train and evaluate on the first samples of a batch with the user's own code.

    Raises ConfigError, in one line with the user's file and line, for code that fails, a loss that is not a mean,
    metrics that are not sums, outputs that do not fit the classes, and functions that return something else.
    """
    inputs, targets = (tensor[:SAMPLES].clone() for tensor in batch)
    for target in config.train.mods or ():
        resolve("train.mods", target)
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(0)
        _try_augmentation(config, inputs)
        model = build(config.model, config.dataset)
        _check_state(config, model)
        if config.lora.enabled:
            adapt(model, config.lora, config.lora.rank)
            mark_only_lora_as_trainable(model)
        _try_step(config, model, inputs, targets)
        _try_metrics(config, model.eval(), inputs, targets)


def optimizer_of(config: Config, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Build the optimizer of train.optimizer: AdamW, SGD or the user's own; raises ConfigError for anything else."""
    settings = config.train
    function = own(config, "train.optimizer")
    if function is None:
        return build_optimizer(model, settings.optimizer, lr, settings.momentum, settings.weight_decay)
    optimizer = function([p for p in model.parameters() if p.requires_grad], lr)
    if not isinstance(optimizer, torch.optim.Optimizer):
        found, fix = type(optimizer).__name__, "return a torch.optim.Optimizer"
        raise ConfigError(f"train.optimizer={settings.optimizer} returned {found}{place_of_code(function)}: {fix}")
    return optimizer


def _try_augmentation(config: Config, inputs: Tensor) -> None:
    if (function := own(config, "dataset.augment")) is None:
        return
    setting = f"dataset.augment={config.dataset.augment}"
    with blaming(f"{setting} fails on inputs {_kind(inputs)}"):
        changed = function(inputs.clone(), torch.Generator().manual_seed(0))
    if not isinstance(changed, Tensor) or (changed.shape, changed.dtype) != (inputs.shape, inputs.dtype):
        found, place = _kind(changed), place_of_code(function)
        raise ConfigError(f"{setting} returned {found}{place}: return inputs {_kind(inputs)}")


def _check_state(config: Config, model: nn.Module) -> None:
    """Refuse what cannot be averaged or stored: state that is not a tensor, complex numbers, and sparse tensors."""
    for key, value in model.state_dict().items():
        is_plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex()
        if not is_plain:
            fix = "keep real, dense tensors only in parameters and buffers"
            raise ConfigError(f"model.target={config.model.target}: the state has {key} as {_kind(value)}: {fix}")


def _try_step(config: Config, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Take one training step."""
    model.train()
    setting = f"model.target={config.model.target}" if config.model.target else f"model={config.model.name}"
    with blaming(f"{setting} fails on inputs {_kind(inputs)}", own(config, "model.target")):
        outputs = outputs_of(model, inputs)
    classes = config.dataset.classes
    is_scores = isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.shape[1] == classes
    if classes and targets.ndim == 1 and not is_scores:
        found, place = _kind(outputs), place_of_code(type(model).forward)
        fix = f"return one score for each class, [{len(inputs)}, {classes}]"
        raise ConfigError(f"{setting} returned {found} for {classes} classes{place}: {fix}")
    function = own(config, "train.loss")
    setting, fix = f"train.loss={config.train.loss}", ""
    if function is None:
        setting, fix = "the loss", ", check what the model returns"
    with blaming(f"{setting} fails on outputs {_kind(outputs)} and targets {_kind(targets)}{fix}"):
        loss = (function or loss_of)(outputs, targets)
    place = place_of_code(function) if function else ""
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
        fix = "return the mean over the batch, a tensor of one number"
        raise ConfigError(f"{setting} returned {_kind(loss)}{place}: {fix}")
    if not torch.isfinite(loss):
        raise ConfigError(f"{setting} is {loss.item()} on the first samples{place}: check it, and the inputs for NaN")
    if function and _is_sum(function, outputs, targets):
        fix = "return the mean, which does not grow with the batch"
        raise ConfigError(f"{setting} returned a sum over the batch{place}: {fix}")
    if not loss.requires_grad:
        raise ConfigError(f"{setting} does not depend on trained parameters{place}: compute it from the outputs")
    with blaming(f"{setting} has no gradient"):
        loss.backward()
    given = f"train.optimizer={config.train.optimizer}"
    with blaming(f"{given} fails, called with (parameters, lr)", own(config, "train.optimizer")):
        optimizer_of(config, model, config.train.lr).step()


def _is_sum(function: Callable[..., Any], outputs: Any, targets: Tensor) -> bool:
    """Return whether the loss doubles if every sample is given twice."""
    if not isinstance(outputs, Tensor):
        return False
    once, twice = (float(function(torch.cat([outputs] * n), torch.cat([targets] * n)).detach()) for n in (1, 2))
    return abs(once) > 1e-6 and math.isclose(twice, 2 * once, rel_tol=1e-3)


@torch.no_grad()
def _try_metrics(config: Config, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Compare the metrics of a batch with the sum of those of its halves, and compute the scores."""
    if (function := own(config, "evaluate.metrics")) is None:
        return
    setting = f"evaluate.metrics={config.evaluate.metrics}"
    middle = max(1, len(inputs) // 2)
    whole, first, second = (
        _count(config, model, function, inputs[part], targets[part])
        for part in (slice(None), slice(middle), slice(middle, None))
    )
    for name in whole.keys() | first.keys() | second.keys():
        added = first.get(name, 0.0) + second.get(name, 0.0)
        if not math.isclose(whole.get(name, 0.0), added, rel_tol=1e-4, abs_tol=1e-6):
            raise ConfigError(
                f"{setting} is not a sum: {name} is {whole.get(name, 0.0):g} for {len(inputs)} samples, but {added:g} "
                f"when those of its two halves are added{place_of_code(function)}: return sums, and divide in "
                "evaluate.scores"
            )
    scores_of(config, whole)


def _count(
    config: Config, model: nn.Module, function: Callable[..., Any], inputs: Tensor, targets: Tensor
) -> dict[str, float]:
    """Return the metrics of samples.

    With one class label a sample, the outputs are replaced by the right answers, because an untrained model may get
    every answer wrong.
    """
    setting = f"evaluate.metrics={config.evaluate.metrics}"
    outputs = outputs_of(model, inputs)
    if config.dataset.classes and targets.ndim == 1:
        outputs = torch.nn.functional.one_hot(targets, config.dataset.classes).to(outputs)
    with blaming(f"{setting} fails on outputs {_kind(outputs)} and targets {_kind(targets)}"):
        return numbers_of(setting, function, function(outputs, targets))


def _kind(value: object) -> str:
    """Return the dtype and shape of a tensor, or the type of anything else."""
    return f"{str(value.dtype)[6:]} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
