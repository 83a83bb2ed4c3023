"""What NAME trains: a classifier of token ids, its data, and what is measured. Edit it, then start `flapp run`."""

import numpy as np
import torch
from torch import Tensor, nn

WORDS, LENGTH = 100, 16  # of the vocabulary, and of a text
PADDING = 0


class Classifier(nn.Module):
    """Read a text with a GRU and classify its last state."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width, padding_idx=PADDING)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.gru(self.embedding(tokens))
        last = (tokens != PADDING).sum(1).clamp(min=1) - 1  # the state after the last word, not after padding
        return self.head(states[torch.arange(len(tokens)), last])


def build_model(width: int = 32) -> nn.Module:
    """Return a new classifier; model.kwargs gives the arguments."""
    return Classifier(width, classes=2)


def make_data() -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """Return made-up texts as token ids, and the names of the classes; flapp calls this once and keeps the result.

    Replace it by your own texts: read them, and turn them into ids with your tokenizer.
    """
    draw = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 800), ("test", 200)):
        tokens = draw.integers(2, WORDS, (count, LENGTH))
        lengths = draw.integers(4, LENGTH + 1, count)
        tokens[np.arange(LENGTH) >= lengths[:, None]] = PADDING
        labels = draw.integers(0, 2, count)
        tokens[labels == 1, 0] = 1  # texts of class 1 begin with word 1
        splits[split] = (tokens.astype(np.int64), labels.astype(np.int64))
    return splits, ["other", "greeting"]


def count(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return sums over a batch: flapp adds them up over batches and clients, exactly."""
    found = outputs.argmax(1) == 1
    wanted = targets == 1
    return {"hits": (found & wanted).sum(), "found": found.sum(), "wanted": wanted.sum()}


def score(sums: dict[str, float]) -> dict[str, float]:
    """Return what the sums over all clients mean: the F1 score of class 1."""
    return {"f1": 2 * sums["hits"] / max(1.0, sums["found"] + sums["wanted"])}
