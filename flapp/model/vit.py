"""torchvision's VisionTransformer with an attention whose projections are plain linear layers.

`nn.MultiheadAttention` reads `out_proj.weight` directly and has a fast path in eval mode, which silently bypass
adapters on its layers. `SelfAttention` always calls both of its layers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from flapp.model.layout import EPSILON, SIZES, Variant


class SelfAttention(nn.Module):
    """Attend over (N, tokens, width) with `heads` heads, in place of torchvision's MultiheadAttention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Return (output, None), the signature EncoderBlock calls; query, key and value are one tensor there."""
        n, tokens, width = query.shape
        qkv = self.qkv(query).view(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(n, tokens, width)), None


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation of GELU (Hendrycks and Gimpel 2016) that CLIP made common."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ViT(VisionTransformer):
    """torchvision's VisionTransformer, which here also takes grey images (N, 1, H, W) as images of equal channels."""

    variant = Variant()

    def set_variant(self, variant: Variant) -> None:
        """Change what the tensors do not show; draws nothing and leaves the tensors as they are."""
        self.variant = variant
        for block in self.encoder.layers:
            assert isinstance(block, EncoderBlock)
            vary_block(block, variant)
        vary_norm(self.encoder.ln, variant)

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(-1, self.conv_proj.in_channels, -1, -1)
        if self.variant.pooling != "mean":
            return super().forward(x)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), self._process_input(x)], dim=1)
        tokens = self.encoder.layers(self.encoder.dropout(tokens + self.encoder.pos_embedding))
        return self.heads(pool(tokens, self.encoder.ln, self.variant))


def pool(tokens: Tensor, norm: nn.Module, variant: Variant) -> Tensor:
    """Return what the head sees, (N, width), of the last layer's tokens (N, tokens, width), the class token first.

    The mean is taken as in timm's VisionTransformer with global_pool="avg": without the class token, before the norm.
    """
    return norm(tokens[:, 1:].mean(dim=1)) if variant.pooling == "mean" else norm(tokens)[:, 0]


def vary_block(block: EncoderBlock, variant: Variant) -> None:
    """Give a layer the epsilon and the activation of a variant."""
    vary_norm(block.ln_1, variant)
    vary_norm(block.ln_2, variant)
    block.mlp[1] = QuickGELU() if variant.activation == "quick_gelu" else nn.GELU()


def vary_norm(norm: nn.Module, variant: Variant) -> None:
    """Give a layer norm the epsilon of a variant."""
    assert isinstance(norm, nn.LayerNorm)
    norm.eps = variant.layer_norm_eps or EPSILON


def build_vit(name: str, image_size: int, channels: int, classes: int, dropout: float = 0.0) -> ViT:
    """Build one of SIZES for square images, whose side must be a multiple of the patch.

    Unlike torchvision's all-zero head, ours starts small and random, so that the first step trains every layer.
    """
    patch, layers, heads, width, mlp = SIZES[name]
    vit = ViT(image_size, patch, layers, heads, width, mlp, dropout=dropout, num_classes=classes)
    if channels != 3:
        vit.conv_proj = nn.Conv2d(channels, width, patch, stride=patch)
    for block in vit.encoder.layers:
        assert isinstance(block, EncoderBlock)
        block.self_attention = SelfAttention(width, heads)
    torch.nn.init.trunc_normal_(vit.heads.head.weight, std=0.02)
    return vit
