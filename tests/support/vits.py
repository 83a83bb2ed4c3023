"""ViT-Ti/16s of torchvision, transformers and timm with random weights, as those libraries write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

SIZES = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
Theirs = Callable[[Tensor], Tensor]  # images to logits, in eval mode, without gradients


def draw(model: nn.Module, seed: int = 1) -> nn.Module:
    """Draw all weights, biases and norms anew, so that none is 0 or 1 and any two that are swapped show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name or ".ln" in name
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05 + is_scale)
    return model.eval()


def made(build: Callable[[], Any]) -> Any:
    """Build a model without its usual initial weights, which take long to make, and draw others."""
    with torch.device("meta"):
        model = build()
    return draw(model.to_empty(device="cpu"))


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


def torchvisions(path: Path, size: int = 32, classes: int = 5) -> Theirs:
    """Write a file of torch.save, or safetensors by the path's suffix."""
    model = made(lambda: VisionTransformer(size, 16, 12, 3, 192, 768, num_classes=classes))
    (save_file if path.suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    return torch.no_grad()(model)


def transformerses(folder: Path, size: int = 32, classes: int = 5, **changed: Any) -> Theirs:
    """Write a folder of save_pretrained's."""
    config = ViTConfig(**SIZES | {"image_size": size, "num_labels": classes} | changed)
    model = made(lambda: ViTForImageClassification(config))
    model.save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    return torch.no_grad()(lambda pixels: model(pixels).logits)


def vit_model(folder: Path) -> None:
    """Write a folder of transformers' ViTModel, with a pooler and without a head."""
    made(lambda: ViTModel(ViTConfig(**SIZES, image_size=32))).save_pretrained(folder)


def timms(path: Path, size: int = 32, classes: int = 5, name: str = "vit_tiny_patch16_224", **changed: Any) -> Theirs:
    """Write a file as timm offers it for download or, without a suffix, a folder of save_for_hf's."""
    model = made(lambda: timm.create_model(name, img_size=size, num_classes=classes, **changed))
    if path.suffix:
        (save_file if path.suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    else:
        save_for_hf(model, path, model_args={"img_size": size, "num_classes": classes, **changed})
    return torch.no_grad()(model)


def edit(path: Path, **changed: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
