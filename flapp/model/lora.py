"""LoRA (Hu et al. 2021): a frozen linear layer plus a trained product of two thin matrices, with loralib's names.

An adapted layer keeps the names of the layer that it replaces, and adds two:

    <layer>.weight, <layer>.bias     frozen
    <layer>.lora_A  (rank, in)       Kaiming-uniform
    <layer>.lora_B  (out, rank)      zero, so that a fresh adapter changes no output
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flapp.model.files import mismatch, shapes_of
from flapp.model.layout import Layout


class LoRALinear(nn.Linear):
    """Compute W x + b + alpha / rank * B A dropout(x), sharing the weight and bias of `base`, frozen."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would draw a weight only to throw it away
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        self.rank, self.alpha, self.scaling, self.dropout = rank, alpha, alpha / rank, dropout
        self.lora_A = nn.Parameter(draw_lora_A(base.weight.new_empty(rank, base.in_features)))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.train(base.training)

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.weight, self.bias)
        h = F.linear(F.dropout(input, self.dropout, self.training) if self.dropout else input, self.lora_A)
        # One addmm scales, multiplies and adds while a block is in cache; `y + scaling * linear(h)` goes over y thrice.
        flat = torch.addmm(
            y.reshape(-1, self.out_features), h.reshape(-1, self.rank), self.lora_B.t(), alpha=self.scaling
        )
        return flat.view(y.shape)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return W + alpha / rank * B A, in the weight's own dtype even under autocast."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.addmm(self.weight, self.lora_B, self.lora_A, alpha=self.scaling)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


def draw_lora_A(like: Tensor) -> Tensor:
    """Draw a new A in the shape of another from torch's global generator: Kaiming-uniform, as in loralib."""
    drawn = torch.empty_like(like, requires_grad=False)
    return nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))


def head_of(model: nn.Module) -> str:
    """Return the dotted name of a model's head, its last linear layer; raises ValueError when it has none."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer, and so no head")
    return names[-1]


def add_lora(
    model: nn.Module, rank: int, alpha: float, targets: Sequence[str] = ("qkv", "proj"), dropout: float = 0.0
) -> list[str]:
    """Put a fresh adapter on every layer that `targets` name, in place, and return the layers' dotted names.

    A target is the last part or parts of a dotted name: `proj`, `mlp.0`. A is drawn from torch's global generator, in
    the order of the model's layers. Raises ValueError, and leaves the model as it is, when a target matches nothing
    or anything but a plain linear layer, or when rank, alpha or dropout is out of range.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ValueError(
            f"lora.rank={rank}, lora.alpha={alpha:g}, lora.dropout={dropout:g}: rank is at least 1, alpha is "
            f"above 0, dropout is from 0 to below 1"
        )
    names = layout_of(model).matching(targets, rank)
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        model.set_submodule(name, LoRALinear(base, rank, alpha, dropout))
    return names


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapted layers by dotted name; raises ValueError when there is none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapters: call add_lora first (set lora=default)")
    return layers


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of a model as it is, adapters included; `model` may be on the meta device."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    return Layout(
        type(model).__name__,
        {name: type(module).__name__ for name, module in model.named_modules() if name},
        shapes_of(model.state_dict()),
        head_of(model),
        tuple(lora_state_dict(model) if layers else model.state_dict()),
        {name: (layer.rank, layer.alpha) for name, layer in layers.items()},
    )


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Freeze all but adapters and head; the weight and bias of an adapted layer stay frozen, even in the head."""
    layers = adapted_layers(model)
    model.requires_grad_(False)
    model.get_submodule(head_of(model)).requires_grad_(True)
    for layer in layers.values():
        layer.requires_grad_(False)
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return what training may change and a message carries: every A and B, all other trained parameters, all buffers.

    A and B are in it even while one of them is frozen; tensors are the model's own, not copies.
    """
    adapters = {f"{name}.lora_{ab}" for name in adapted_layers(model) for ab in "AB"}
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad} - adapters
    return {key: tensor for key, tensor in model.state_dict().items() if key not in frozen}


def tail_norm(model: nn.Module, rank: int) -> Tensor:
    """Return sum ||B[:, rank:]||_F ||A[rank:]||_F over the adapted layers: the weight of the ranks after `rank`.

    A scalar with a gradient: the penalty of HetLoRA's self-pruning (Cho et al. 2024, arXiv:2401.06432, section 4).
    """
    norm = torch.linalg.vector_norm
    layers = adapted_layers(model).values()
    return torch.stack([norm(layer.lora_B[:, rank:]) * norm(layer.lora_A[rank:]) for layer in layers]).sum()


def truncate_state(state: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return a state dict with its adapters cut to their first `rank` ranks; other tensors are not copied."""
    cut = dict(state)
    for key, tensor in state.items():
        if key.endswith(".lora_A"):
            cut[key] = tensor[:rank].contiguous()
        elif key.endswith(".lora_B"):
            cut[key] = tensor[:, :rank].contiguous()
    return cut


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the tensors of a lora_state_dict; raises ValueError unless names and shapes are the model's own."""
    if fault := mismatch(shapes_of(lora_state_dict(model)), shapes_of(state)):
        raise ValueError(f"these are not the adapters of this model ({fault})")
    model.load_state_dict(state, strict=False)


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the same model without adapters, each merged into its weight; leaves `model` alone."""
    layers = adapted_layers(model)
    adapters = {f"{name}.lora_{ab}" for name in layers for ab in "AB"}
    merged = {f"{name}.weight": layer.merged_weight() for name, layer in layers.items()}
    return {key: merged.get(key, tensor) for key, tensor in model.state_dict().items() if key not in adapters}
