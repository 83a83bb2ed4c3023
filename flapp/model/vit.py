"""A ViT with the tensors of torchvision's VisionTransformer, in plain PyTorch, and an attention that takes adapters.

torchvision itself takes over a second to import, in every process of a federation. Its attention, PyTorch's
`nn.MultiheadAttention`, silently ignores adapters: it reads `out_proj.weight` directly, and has a fast path in eval
mode. `SelfAttention` always calls both of its layers.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flapp.model.layout import EPSILON, SIZES, Variant


class SelfAttention(nn.Module):
    """Attend over (N, tokens, width) with `heads` heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(n, tokens, width))


class MLPBlock(nn.Sequential):
    """Two linear layers with GELU between them, for each token."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        layers = nn.Linear(width, hidden), nn.Linear(hidden, width)
        super().__init__(layers[0], nn.GELU(), nn.Dropout(dropout), layers[1], nn.Dropout(dropout))
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)


class EncoderBlock(nn.Module):
    """One layer of a ViT: attention and MLP, each after a norm and added to its input."""

    def __init__(self, width: int, heads: int, mlp: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, EPSILON)
        # torchvision draws these weights here. So do we, to draw the same numbers from a seed for all other layers.
        self.self_attention: nn.Module = nn.MultiheadAttention(width, heads)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = nn.LayerNorm(width, EPSILON)
        self.mlp = MLPBlock(width, mlp, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attention(self.ln_1(x)))
        return x + self.mlp(self.ln_2(x))


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation of GELU (Hendrycks and Gimpel 2016) that CLIP made common."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Encoder(nn.Module):
    """The positions, layers and last norm of a ViT, in torchvision's order."""

    def __init__(self, tokens: int, layers: int, width: int, heads: int, mlp: int, dropout: float) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, tokens, width).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential()
        for i in range(layers):
            self.layers.add_module(f"encoder_layer_{i}", EncoderBlock(width, heads, mlp, dropout))
        self.ln = nn.LayerNorm(width, EPSILON)


class ViT(nn.Module):
    """One of SIZES for square images (N, channels, H, W), whose side must be a multiple of the patch.

    A ViT of three channels also takes grey images, as images of equal channels. Weights are drawn as in torchvision,
    except those of the head, which are zero there. Ours are small, so that the first step trains every layer. With
    other than three channels, conv_proj is drawn as PyTorch draws a Conv2d.
    """

    variant = Variant()

    def __init__(self, name: str, image_size: int, channels: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_size, layers, heads, width, mlp = SIZES[name]
        self.conv_proj = nn.Conv2d(3, width, self.patch_size, stride=self.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = Encoder((image_size // self.patch_size) ** 2 + 1, layers, width, heads, mlp, dropout)
        head = nn.Linear(width, classes)
        self.heads = nn.Sequential(OrderedDict(head=head))
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / (3 * self.patch_size**2)))
        for module in (self.conv_proj, head):
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        if channels != 3:
            self.conv_proj = nn.Conv2d(channels, width, self.patch_size, stride=self.patch_size)
        for block in self.encoder.layers:
            block.self_attention = SelfAttention(width, heads)
        nn.init.trunc_normal_(head.weight, std=0.02)

    def set_variant(self, variant: Variant) -> None:
        """Set activation, epsilon and pooling, which the tensors do not show. Draw nothing and change no tensor."""
        self.variant = variant
        vary(self, variant)

    def forward(self, images: Tensor) -> Tensor:
        tokens = embed(images, self.conv_proj, self.class_token, self.encoder.pos_embedding)
        tokens = self.encoder.layers(self.encoder.dropout(tokens))
        return self.heads(pool(tokens, self.encoder.ln, self.variant))


def embed(images: Tensor, projection: nn.Conv2d, class_token: Tensor, positions: Tensor) -> Tensor:
    """Return the tokens (N, tokens, width) of images (N, C, H, W): class token and patches, with their positions."""
    patches = projection(images.expand(-1, projection.in_channels, -1, -1)).flatten(2).permute(0, 2, 1)
    return torch.cat([class_token.expand(images.shape[0], -1, -1), patches], dim=1) + positions


def pool(tokens: Tensor, norm: nn.Module, variant: Variant) -> Tensor:
    """Return the head's input (N, width) from the last layer's tokens (N, tokens, width); token 0 is the class token.

    The mean is taken as in timm's VisionTransformer with global_pool="avg": without the class token, before the norm.
    """
    return norm(tokens[:, 1:].mean(dim=1)) if variant.pooling == "mean" else norm(tokens)[:, 0]


def vary(model: nn.Module, variant: Variant) -> None:
    """Give all norms in a model, or in a part of one, the epsilon of a variant, and all layers its activation."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = variant.layer_norm_eps or EPSILON
        elif isinstance(module, MLPBlock):
            module[1] = QuickGELU() if variant.activation == "quick_gelu" else nn.GELU()
