"""Small models of every kind that takes adapters, flapp's and users' own, and PEFT's counterparts of them."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flapp.model.build import build_model
from flapp.model.lora import adapted_layers, add_lora, lora_state_dict, mark_only_lora_as_trainable
from flapp.training import loss_of


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


class Kind(NamedTuple):
    """How a model is built, the shape of a sample (without floats: of token ids), its classes, and its layers."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    targets: tuple[tuple[str, ...], ...]  # those that are tried, the usual ones first
    trained: tuple[str, ...]  # the modules that are trained in full, or have buffers
    is_text: bool = False


MODELS = {
    "vit_tiny": Kind(
        lambda: build_model("vit_tiny", (8, 8, 3), 5),
        *((3, 8, 8), 5, (("qkv", "proj"), ("mlp.0", "mlp.3"), ("qkv", "head")), ("heads.head",)),
    ),
    "cnn": Kind(
        lambda: build_model("cnn", (8, 8, 1), 5),
        *((1, 8, 8), 5, (("fc1",), ("fc1", "fc2"), ("conv1", "conv2")), ("fc2",)),
    ),
    "linear": Kind(lambda: build_model("linear", (10,), 3), (10,), 3, (("fc",),), ("fc",)),
    "normed": Kind(NormedCNN, (3, 9, 8), 4, (("conv1", "block.0"),), ("block.1", "bn1", "fc")),
    "conv1d": Kind(Conv1DBlock, (7,), 4, (("c_attn", "c_proj"),), ("head",), is_text=True),
    "distilbert": Kind(TinyDistilBert, (7,), 4, (("attention.?_lin", "lin1"),), ("bert.classifier",), is_text=True),
    "mlp": Kind(mlp, (5,), 4, (("[0]", "2.1"),), ("2.2", "3")),
    "mixed": Kind(Mixed, (3, 9, 8), 4, (("conv", "turned", "dense"),), ("bn", "head")),
}
CASES = [(name, targets) for name, kind in MODELS.items() for targets in kind.targets]


def batch(name: str) -> tuple[Tensor, Tensor]:
    """Return six inputs for a model of MODELS and their labels, always the same."""
    draw, kind = torch.Generator().manual_seed(5), MODELS[name]
    shape = (6, *kind.shape)
    inputs = torch.randint(0, 20, shape, generator=draw) if kind.is_text else torch.randn(shape, generator=draw)
    return inputs, torch.arange(6) % kind.classes


def base(name: str = "vit_tiny") -> nn.Module:
    """Return a model of MODELS, always with the same weights."""
    torch.manual_seed(0)
    return MODELS[name].build()


def adapted(name: str = "vit_tiny", targets: tuple[str, ...] = (), n: int = 0, **lora: Any) -> nn.Module:
    """Return base(name) with fresh adapters, by default on its usual targets, after n steps of training."""
    model = base(name)
    add_lora(model, **{"rank": 2, "alpha": 6.0, "targets": targets or MODELS[name].targets[0]} | lora)
    mark_only_lora_as_trainable(model)
    return steps(model, name, n)


def steps(model: nn.Module, name: str = "vit_tiny", n: int = 1) -> nn.Module:
    """Take n steps of AdamW on batch(name), leaving the gradients of the last, and return the model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    inputs, labels = batch(name)
    model.train()
    for _ in range(n):
        optimizer.zero_grad()
        loss_of(model(inputs), labels).backward()
        optimizer.step()
    return model


def bytes_of(state: dict[str, Tensor]) -> dict[str, bytes]:
    """Return the bytes of every tensor, for a stricter comparison than torch.equal."""
    return {key: tensor.detach().numpy().tobytes() for key, tensor in state.items()}


def frozen_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training must not change, copied."""
    travels = lora_state_dict(model)
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if key not in travels}


def logits(model: nn.Module, name: str = "vit_tiny") -> Tensor:
    """Return the outputs of batch(name) in eval mode."""
    with torch.no_grad():
        return model.eval()(batch(name)[0])


def in_peft(name: str, targets: tuple[str, ...] = (), n: int = 0, trained: tuple[str, ...] = ()) -> nn.Module:
    """Return PEFT's model over base(name) with the same adapters as adapted(), freshly drawn, after n steps."""
    from peft import LoraConfig, get_peft_model

    layers = adapted_layers(adapted(name, targets))
    to_save = [module for module in trained or MODELS[name].trained if module not in layers]
    found = LoraConfig(r=2, lora_alpha=6.0, target_modules="|".join(map(re.escape, layers)), modules_to_save=to_save)
    return steps(get_peft_model(base(name), found), name, n)


def copy_adapters(model: nn.Module, theirs: nn.Module) -> None:
    """Copy the A and B matrices of our model into PEFT's model."""
    values = {f"base_model.model.{k}.default.weight": v for k, v in model.state_dict().items() if ".lora_" in k}
    shapes = {key: parameter.shape for key, parameter in theirs.named_parameters()}
    theirs.load_state_dict({k: v.view(shapes[k]) for k, v in values.items()}, strict=False)
