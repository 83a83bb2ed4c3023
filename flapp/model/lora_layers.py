"""LoRA (Hu et al. 2021): a frozen layer plus a trained product of two thin matrices, with loralib's names.

An adapted layer keeps the names of the layer that it replaces, and adds two matrices, whatever the shape of its weight:

    <layer>.weight, <layer>.bias     frozen
    <layer>.lora_A  (rank, in)       Kaiming-uniform
    <layer>.lora_B  (out, rank)      zero, so that a fresh adapter changes no output

    layer                  its weight                      in              what B A adds to the weight
    nn.Linear              (out, in)                       in              B A
    nn.Conv2d              (out, channels, height, width)  the rest        B A in the weight's shape
    transformers' Conv1D   (in, out)                       in              B A transposed

A and B have at least float32, even where the weight is float16 or bfloat16.
"""

import math
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flapp.model.layout import matrix_shape


class LoRALayer(nn.Module):
    """Compute what `base` computes plus alpha / rank * B A dropout(x), sharing its weight and bias, frozen."""

    is_transposed: ClassVar[bool] = False  # whether the weight is (in, out)
    weight: Tensor
    bias: Any

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)  # not the layer's own, which would draw a weight only to throw it away
        settings = {key: value for key, value in vars(base).items() if key not in vars(self)}
        vars(self).update(settings)  # such as in_features, stride, padding
        weight = base.get_parameter("weight")
        self.weight, self.bias = weight, base.bias
        self.requires_grad_(False)
        self.rank, self.alpha, self.scaling, self.dropout = rank, alpha, alpha / rank, dropout
        out_features, in_features = matrix_shape(tuple(weight.shape), self.is_transposed)
        like = weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))
        self.lora_A = nn.Parameter(draw_lora_A(like.new_empty(rank, in_features)))
        self.lora_B = nn.Parameter(like.new_zeros(out_features, rank))
        self.train(base.training)

    def dropped(self, input: Tensor) -> Tensor:
        """Return the input of A."""
        x = F.dropout(input, self.dropout, self.training) if self.dropout else input
        return x if self.lora_A.dtype == self.weight.dtype else x.to(self.lora_A.dtype)

    def add_product(self, y: Tensor, input: Tensor) -> Tensor:
        """Return y (..., out) plus alpha / rank * B A dropout(input), input (..., in), in the dtype of y."""
        h = F.linear(self.dropped(input), self.lora_A)
        # One addmm scales, multiplies and adds while a block is in cache; `y + scaling * linear(h)` goes over y thrice.
        flat = y.reshape(-1, y.shape[-1]).to(h.dtype)
        flat = torch.addmm(flat, h.reshape(-1, self.rank), self.lora_B.t(), alpha=self.scaling)
        return flat.view(y.shape).to(y.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return the weight plus alpha / rank * B A, even under autocast, rounded once to the weight's own dtype."""
        weight, wide = self.weight, torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            matrix = (weight.t() if self.is_transposed else weight.flatten(1)).to(wide)
            merged = torch.addmm(matrix, self.lora_B.to(wide), self.lora_A.to(wide), alpha=self.scaling)
        merged = merged.t().contiguous() if self.is_transposed else merged.view(weight.shape)
        return merged.to(weight.dtype)

    def extra_repr(self) -> str:
        own = f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"
        return ", ".join(filter(None, (super().extra_repr(), own)))


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer with an adapter."""

    def forward(self, input: Tensor) -> Tensor:
        return self.add_product(F.linear(input, self.weight, self.bias), input)


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """A convolution with an adapter: A is a convolution like the layer's own with `rank` maps, B one of 1x1."""

    def forward(self, input: Tensor) -> Tensor:
        y = self._conv_forward(input, self.weight, self.bias)
        h = self._conv_forward(self.dropped(input), self.lora_A.view(self.rank, *self.weight.shape[1:]), None)
        product = F.conv2d(h, self.lora_B[:, :, None, None])
        return torch.add(y, product, alpha=self.scaling).to(y.dtype)


class LoRAConv1D(LoRALayer):
    """A Conv1D of transformers with an adapter: a linear layer whose weight is (in, out)."""

    is_transposed = True

    def forward(self, input: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, input.reshape(-1, input.shape[-1]), self.weight)
        return self.add_product(flat.view(*input.shape[:-1], flat.shape[-1]), input)


def draw_lora_A(like: Tensor) -> Tensor:
    """Draw a new A in the shape of another from torch's global generator: Kaiming-uniform, as in loralib."""
    drawn = torch.empty_like(like, requires_grad=False)
    return nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))


def conv1d_class() -> type[nn.Module] | None:
    """Return transformers' Conv1D, or None while nobody has imported transformers: no model can have one then."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def adapter_class(module: nn.Module) -> type[LoRALayer] | None:
    """Return the adapted form of a layer; None for other modules and for subclasses, which may compute anything."""
    if type(module) is conv1d_class():
        return LoRAConv1D
    return {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d}.get(type(module))


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear layer, adapted or not."""
    conv1d = conv1d_class()
    return isinstance(module, nn.Linear | LoRAConv1D) or (conv1d is not None and isinstance(module, conv1d))
