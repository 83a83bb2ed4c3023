"""Models as users write them: convolutions with BatchNorm, transformers' Conv1D, a DistilBERT, and others."""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flapp.model.lora import adapted_layers, add_lora, mark_only_lora_as_trainable


class NormedCNN(nn.Module):
    """Two convolutions with BatchNorm, one of stride 2 and without bias, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.block = nn.Sequential(nn.Conv2d(6, 8, (3, 1), padding="same"), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.bn1(self.conv1(x)).relu()).mean((2, 3)))


class Conv1DBlock(nn.Module):
    """A block of GPT-2: transformers' Conv1D around attention, then a linear head."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed, self.c_attn, self.c_proj = nn.Embedding(20, 8), Conv1D(24, 8), Conv1D(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = self.c_attn(h).chunk(3, -1)
        return self.head((h + self.c_proj((q @ k.mT).softmax(-1) @ v)).mean(1))


class TinyDistilBert(nn.Module):
    """A DistilBERT of transformers with two layers of width 16."""

    def __init__(self) -> None:
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        super().__init__()
        sizes = {"vocab_size": 20, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "num_labels": 4}
        config = DistilBertConfig(**sizes, max_position_embeddings=16, dropout=0.0, seq_classif_dropout=0.0)
        self.bert = DistilBertForSequenceClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.bert(x).logits


def mlp() -> nn.Module:
    """Return dense layers with numbers as names, of which one is the end of another's, and BatchNorm."""
    return nn.Sequential(
        nn.Linear(5, 12), nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Linear(12, 12), nn.BatchNorm1d(12)), nn.Linear(12, 4)
    )


class Mixed(nn.Module):
    """A layer of each kind that takes adapters; the weights of Linear and Conv1D are square."""

    def __init__(self, channels: int = 3, classes: int = 4) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.turned, self.dense, self.head = Conv1D(6, 6), nn.Linear(6, 6), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dense(self.turned(self.bn(self.conv(x)).relu().mean((2, 3)))))


def tied() -> nn.Module:
    """Return an embedding whose weight is also that of the last linear layer."""
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "fc": nn.Linear(4, 4), "out": nn.Linear(4, 9, bias=False)})
    model.get_submodule("out").weight = model.get_submodule("embed").weight
    return model


IMAGES, TOKENS, ROWS = "images", "tokens", "rows"
# name -> how it is built, what it takes, the targets that are tried
OWN: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...]]] = {
    "cnn": (NormedCNN, IMAGES, ("conv1", "block.0")),
    "conv1d": (Conv1DBlock, TOKENS, ("c_attn", "c_proj")),
    "distilbert": (TinyDistilBert, TOKENS, ("attention.?_lin", "lin1")),
    "mlp": (mlp, ROWS, ("[0]", "2.1")),
    "mixed": (Mixed, IMAGES, ("conv", "turned", "dense")),
}


def inputs_of(name: str, n: int = 6) -> Tensor:
    """Return n inputs of a model of OWN, always the same."""
    draw = torch.Generator().manual_seed(5)
    kind = OWN[name][1]
    if kind == TOKENS:
        return torch.randint(0, 20, (n, 7), generator=draw)
    return torch.randn(n, *((3, 9, 8) if kind == IMAGES else (5,)), generator=draw)


def plain(name: str) -> nn.Module:
    """Return a model of OWN, always with the same weights."""
    torch.manual_seed(0)
    return OWN[name][0]()


def with_adapters(name: str, n: int = 0, **lora: object) -> nn.Module:
    """Return plain(name) with adapters after n steps of training."""
    model = plain(name)
    settings = {"rank": 2, "alpha": 6.0, "targets": OWN[name][2], **lora}
    add_lora(model, **settings)  # type: ignore[arg-type]
    mark_only_lora_as_trainable(model)
    return walk(model, name, n)


def walk(model: nn.Module, name: str, n: int) -> nn.Module:
    """Take n steps of AdamW and return the model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    model.train()
    for _ in range(n):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs_of(name)), torch.arange(6) % 4).backward()
        optimizer.step()
    return model


def outputs(model: nn.Module, name: str) -> Tensor:
    """Return what a model gives for inputs_of(name) in eval mode."""
    with torch.no_grad():
        return model.eval()(inputs_of(name))


def in_peft(name: str, to_save: list[str], n: int) -> nn.Module:
    """Return PEFT's own model over plain(name) after n steps; to_save: the modules that it trains in full."""
    from peft import LoraConfig, get_peft_model

    layers = "|".join(map(re.escape, adapted_layers(with_adapters(name))))
    config = LoraConfig(r=2, lora_alpha=6.0, target_modules=layers, modules_to_save=to_save)
    return walk(get_peft_model(plain(name), config), name, n)
