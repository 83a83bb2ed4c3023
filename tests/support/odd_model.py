"""A model of token ids with every kind of tensor that a model can have, and a client app of it for workers."""

import torch
from flwr.app import Context, Message
from torch import Tensor, nn

from flapp import client_app
from flapp.config.schema import DatasetConfig, ModelConfig

TOKENS, WIDTH, CLASSES = 30, 8, 3
LARGE = 2**60 + 1  # float64 does not hold it


class OddModel(nn.Module):
    """Classify token ids (N, length) by a network with bfloat16 layers, tied weights, and numbers of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.narrow = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.again = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.again.weight = self.narrow.weight
        self.head = nn.Linear(WIDTH, CLASSES)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.shift = nn.Parameter(torch.zeros(CLASSES, dtype=torch.float64))
        self.gain = nn.Parameter(torch.ones(WIDTH, dtype=torch.float16))
        self.codes = nn.Parameter(torch.tensor([LARGE, -3]), requires_grad=False)
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("empty", torch.empty(0, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            self.seen += len(tokens)
        x = self.norm(self.embedding(tokens).mean(1))
        x = self.second(self.first(x).tanh()).tanh() * self.scale * self.gain.float()
        x = self.again(self.narrow(x.bfloat16()).tanh()).float()
        return (self.head(x) + self.shift).float()


def build(model: ModelConfig, dataset: DatasetConfig) -> nn.Module:
    """Build the odd model whatever the settings say."""
    return OddModel()


def app(message: Message, context: Context) -> Message:
    """Handle a message of flapp with the odd model; a worker imports this module as its client app."""
    client_app.build = build  # type: ignore[attr-defined]
    return client_app.app(message, context)
