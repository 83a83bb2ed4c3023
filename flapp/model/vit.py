"""torchvision's VisionTransformer with an attention whose projections are plain linear layers.

`nn.MultiheadAttention` reads `out_proj.weight` directly and has a fast path in eval mode, which silently bypass
adapters on its layers. `SelfAttention` always calls both of its layers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from flapp.model.layout import SIZES


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


class ViT(VisionTransformer):
    """torchvision's VisionTransformer, which here also takes grey images (N, 1, H, W) as images of equal channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.expand(-1, self.conv_proj.in_channels, -1, -1))


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
