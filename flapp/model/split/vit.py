"""The components of our ViT; config is {image_size, patch, heads, width, mlp, channels, classes, dropout}."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock

from flapp.files import sha256_of_file
from flapp.model.layout import SIZES
from flapp.model.names import LAYER, POSITIONS, from_torchvision
from flapp.model.pretrained import read_state
from flapp.model.split.component import ModelType, SplitModel, Whole
from flapp.model.vit import SelfAttention


class ViTTrunk(SplitModel):
    """Some layers of a ViT: tokens (N, tokens, width) to tokens."""

    def __init__(self, config: Mapping[str, Any], start: int, end: int) -> None:
        super().__init__()
        blocks = OrderedDict((f"encoder_layer_{i}", _block(config)) for i in range(start, end))
        self.encoder = nn.Module()
        self.encoder.layers = nn.Sequential(blocks)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder.get_submodule("layers")(tokens)


class ViTBottom(ViTTrunk):
    """Patches, class token, positions and the first layers: images (N, C, H, W) to tokens."""

    def __init__(self, config: Mapping[str, Any], start: int, end: int) -> None:
        super().__init__(config, start, end)
        width, patch = config["width"], config["patch"]
        self.conv_proj = nn.Conv2d(config["channels"], width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        tokens = (config["image_size"] // patch) ** 2 + 1
        self.encoder.pos_embedding = nn.Parameter(torch.empty(1, tokens, width))
        self.encoder.dropout = nn.Dropout(config["dropout"])

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv_proj(images.expand(-1, self.conv_proj.in_channels, -1, -1)).flatten(2).permute(0, 2, 1)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        positions, dropout = self.encoder.get_parameter("pos_embedding"), self.encoder.get_submodule("dropout")
        return super().forward(dropout(tokens + positions))


class ViTTop(ViTTrunk):
    """The last layers, norm and head: tokens to logits (N, classes), read at the class token."""

    def __init__(self, config: Mapping[str, Any], start: int, end: int) -> None:
        super().__init__(config, start, end)
        self.encoder.ln = nn.LayerNorm(config["width"], eps=1e-6)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(config["width"], config["classes"])))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.heads(self.encoder.get_submodule("ln")(super().forward(tokens))[:, 0])


def _block(config: Mapping[str, Any]) -> EncoderBlock:
    block = EncoderBlock(config["heads"], config["width"], config["mlp"], config["dropout"], 0.0)
    block.self_attention = SelfAttention(config["width"], config["heads"])
    return block


def read_vit(source: str | Path, dropout: float = 0.0) -> Whole:
    """Read a ViT from a file of weights, torchvision's or ours, or from the folder of a finished run.

    Its shapes say its size, which must be one of SIZES. Raises ValueError for anything else.
    """
    path = Path(source)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} is missing: give a file of a ViT's weights, or the folder of a finished run")
    state = from_torchvision(read_state(path))
    layers = len({name.split(".")[2] for name in state if name.startswith(LAYER)})
    try:
        width, channels, patch, _ = state["conv_proj.weight"].shape
        mlp = state[f"{LAYER}0.mlp.0.weight"].shape[0]
        side = math.isqrt(state[POSITIONS].shape[1] - 1)
        classes = state["heads.head.weight"].shape[0]
        (heads,) = (s[2] for s in SIZES.values() if (s[0], s[1], s[3], s[4]) == (patch, layers, width, mlp))
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is not one of the ViTs that can be split ({', '.join(SIZES)})") from error
    config = {
        **{"image_size": side * patch, "patch": patch, "heads": heads, "width": width, "mlp": mlp},
        **{"channels": channels, "classes": classes, "dropout": dropout},
    }
    # Copies, because a mapped file has tensors at any address, where some kernels round differently.
    tensors = {name: tensor.clone() for name, tensor in state.items()}
    name = path.resolve().parent.name if path.name == "model.safetensors" else path.stem
    return Whole(name, config, layers, tensors, sha256_of_file(path))


VIT = ModelType(read_vit, {"bottom": ViTBottom, "trunk": ViTTrunk, "top": ViTTop})
