"""Small models with trained adapters, and PEFT's counterpart of them."""

from typing import Any

import torch
from torch import Tensor, nn

from flapp.model.build import build_model
from flapp.model.lora import add_lora, head_of, lora_state_dict, mark_only_lora_as_trainable
from flapp.training import loss_of

# name -> shape of a sample, classes, the targets that are tried
MODELS: dict[str, tuple[tuple[int, ...], int, tuple[tuple[str, ...], ...]]] = {
    "vit_tiny": ((8, 8, 3), 5, (("qkv", "proj"), ("mlp.0", "mlp.3"), ("qkv", "head"))),
    "cnn": ((8, 8, 1), 5, (("fc1",), ("fc1", "fc2"), ("conv1", "conv2"))),
    "linear": ((10,), 3, (("fc",),)),
}
CASES = [(name, targets) for name, (_, _, choices) in MODELS.items() for targets in choices]


def batch(name: str, n: int = 6) -> tuple[Tensor, Tensor]:
    """Return n inputs for a model of MODELS and their labels, always the same."""
    shape, classes, _ = MODELS[name]
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(n, *([shape[2], *shape[:2]] if len(shape) == 3 else shape), generator=generator)
    return inputs, torch.arange(n) % classes


def base(name: str = "vit_tiny") -> nn.Module:
    """Return a model of MODELS, always with the same weights."""
    shape, classes, _ = MODELS[name]
    torch.manual_seed(0)
    return build_model(name, shape, classes)


def adapted(name: str = "vit_tiny", targets: tuple[str, ...] = ("qkv", "proj"), **lora: Any) -> nn.Module:
    """Return base(name) with fresh adapters, ready to train."""
    model = base(name)
    add_lora(model, **{"rank": 2, "alpha": 6.0, "targets": targets} | lora)
    mark_only_lora_as_trainable(model)
    return model


def steps(model: nn.Module, name: str = "vit_tiny", n: int = 1) -> nn.Module:
    """Take n steps of AdamW on batch(name), leaving the gradients of the last, and return the model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    inputs, labels = batch(name)
    model.train()
    for _ in range(n):
        optimizer.zero_grad()
        loss_of(model(inputs), labels).backward()
        optimizer.step()
    return model


def bytes_of(state: dict[str, Tensor]) -> dict[str, bytes]:
    """Return the bytes of every tensor, for a stricter comparison than torch.equal."""
    return {key: tensor.detach().numpy().tobytes() for key, tensor in state.items()}


def frozen_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training must not change, copied."""
    travels = lora_state_dict(model)
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if key not in travels}


def logits(model: nn.Module, name: str = "vit_tiny") -> Tensor:
    """Return the outputs of batch(name) in eval mode."""
    with torch.no_grad():
        return model.eval()(batch(name)[0])


def in_peft(name: str, targets: tuple[str, ...], **config: Any) -> nn.Module:
    """Return PEFT's model over base(name) with the same adapters as adapted(), freshly drawn."""
    from peft import LoraConfig, get_peft_model

    model = base(name)
    to_save = None if head_of(model).endswith(targets) else [head_of(model)]
    settings = {"r": 2, "lora_alpha": 6.0, "target_modules": list(targets), "modules_to_save": to_save} | config
    return get_peft_model(model, LoraConfig(**settings))


def copy_adapters(model: nn.Module, theirs: nn.Module) -> None:
    """Copy the A and B matrices of our model into PEFT's model."""
    values = {f"base_model.model.{k}.default.weight": v for k, v in model.state_dict().items() if ".lora_" in k}
    shapes = {key: parameter.shape for key, parameter in theirs.named_parameters()}
    theirs.load_state_dict({k: v.view(shapes[k]) for k, v in values.items()}, strict=False)
