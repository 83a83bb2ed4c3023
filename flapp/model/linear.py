"""The toy model: one linear layer, 11 parameters on ten features."""

import math
from collections.abc import Sequence

from torch import Tensor, nn


class Linear(nn.Module):
    """Map flattened samples of `shape` to `outputs` values by one linear layer."""

    def __init__(self, shape: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(math.prod(shape), outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))
