"""The components of our ViT.

config is {image_size, patch, heads, width, mlp, channels, classes, dropout} and, where they are not torchvision's, the
values of its Variant.
"""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flapp.files import sha256_of_file
from flapp.model.files import shapes_of
from flapp.model.layout import PLAIN, SIZES, Variant
from flapp.model.names import from_any
from flapp.model.split.component import ModelType, SplitModel, Whole
from flapp.model.vit import EncoderBlock, SelfAttention, embed, pool, vary
from flapp.model.vit_weights import describe_shapes
from flapp.model.weight_files import find_weights, read_state


class ViTTrunk(SplitModel):
    """Some layers of a ViT: tokens (N, tokens, width) to tokens."""

    def __init__(self, config: Mapping[str, Any], start: int, end: int) -> None:
        super().__init__()
        self.variant = Variant(**{key: config[key] for key in vars(Variant()) if key in config})
        blocks = nn.Sequential()
        for i in range(start, end):
            block = EncoderBlock(config["width"], config["heads"], config["mlp"], config["dropout"])
            block.self_attention = SelfAttention(config["width"], config["heads"])
            blocks.add_module(f"encoder_layer_{i}", block)
        vary(blocks, self.variant)
        self.encoder = nn.Module()
        self.encoder.layers = blocks

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
        positions, dropout = self.encoder.get_parameter("pos_embedding"), self.encoder.get_submodule("dropout")
        return super().forward(dropout(embed(images, self.conv_proj, self.class_token, positions)))


class ViTTop(ViTTrunk):
    """The last layers, norm and head: tokens to logits (N, classes)."""

    def __init__(self, config: Mapping[str, Any], start: int, end: int) -> None:
        super().__init__(config, start, end)
        self.encoder.ln = nn.LayerNorm(config["width"])
        vary(self.encoder.ln, self.variant)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(config["width"], config["classes"])))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.heads(pool(super().forward(tokens), self.encoder.get_submodule("ln"), self.variant))


def read_vit(source: str | Path, dropout: float = 0.0) -> Whole:
    """Read a ViT from weights that load_pretrained takes, or from the folder of a finished run.

    Its shapes say its size, which must be one of SIZES. Raises ValueError for anything else.
    """
    path = find_weights(Path(source))
    if not path.is_file():
        raise ValueError(f"{path} is missing: give a file of a ViT's weights, or the folder of a finished run")
    found = read_state(path)
    weights = describe_shapes(path, shapes_of(found))
    state = {name: tensor for name, tensor in from_any(found)[1].items() if name not in weights.left_out}
    patch, _, heads, width, mlp = SIZES[weights.size]
    if weights.image_size is None or "heads.head.weight" not in state:
        raise ValueError(f"{path} cannot be split: it has no head, or no position embeddings of a square of patches")
    config = {
        **{"image_size": weights.image_size, "patch": patch, "heads": heads, "width": width, "mlp": mlp},
        **{"channels": weights.channels, "classes": len(state["heads.head.weight"]), "dropout": dropout},
        **{key: value for key, value in weights.variant.given().items() if value != vars(PLAIN)[key]},
    }
    # Copies, because a mapped file has tensors at any address, where some kernels round differently.
    tensors = {name: tensor.clone() for name, tensor in state.items()}
    name = path.resolve().parent.name if path.name == "model.safetensors" else path.stem
    return Whole(name, config, SIZES[weights.size][1], tensors, sha256_of_file(path))


VIT = ModelType(read_vit, {"bottom": ViTBottom, "trunk": ViTTrunk, "top": ViTTop})
