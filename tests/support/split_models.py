"""Small models to split, as files, and helpers for their components."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flapp.files import sha256_of_file
from flapp.model.files import save_tensors
from flapp.model.split.component import SplitModel
from flapp.model.vit import ViT


def write_vit(path: Path, name: str = "vit_tiny", seed: int = 0, size: int = 32, dropout: float = 0.0) -> nn.Module:
    """Write a ViT for grey images as a run does, and return it."""
    torch.manual_seed(seed)
    model = ViT(name, size, 1, 10, dropout).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(model.state_dict(), path, model=name, shape=[size, size, 1], classes=10)
    return model


def write_vit_run(path: Path, size: int = 32, **config: Any) -> Path:
    """Write what tools read of a finished run whose model is a ViT, and return its folder."""
    write_vit(path / "model.safetensors", size=size, dropout=0.1)
    facts = {"status": "finished", "model_sha256": sha256_of_file(path / "model.safetensors")}
    (path / "metrics.json").write_text(json.dumps(facts))
    model = {"name": "vit_tiny", "image_size": None, "dropout": 0.1, "channels": None, "pretrained": None}
    dataset = {"name": "mine", "shape": [size, size, 1], "classes": 10, "normalization": "half", "source": None}
    dataset |= {"download": False, "materialize": None, "augment": False}
    (path / "config.yaml").write_text(json.dumps({"run_name": "sweep/0", "model": model, "dataset": dataset} | config))
    return path


def write_gpt2(folder: Path, layers: int = 6, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """Write a small GPT-2 as transformers does, and return what transformers reads."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_head": 4, "vocab_size": 101, "n_positions": 24, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, **{**sizes, **config}))
    for parameter in model.parameters():  # biases too, which start at zero
        nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder)


def draw_ids() -> Tensor:
    return torch.randint(0, 101, (3, 20), generator=torch.Generator().manual_seed(0))


def draw_images() -> Tensor:
    return torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def compose(models: Sequence[SplitModel], inputs: Tensor, **also: Any) -> Tensor:
    """Return top(trunk(bottom(inputs))), with the same extra arguments for each."""
    for model in models:
        inputs = model(inputs, **also)
    return inputs
