"""The networks that need nothing but PyTorch; the benchmark's stock Flower app takes a copy of this file."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Module):
    """Map flattened samples of `shape` to `outputs` values by one linear layer."""

    def __init__(self, shape: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(math.prod(shape), outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


class LeafCNN(nn.Module):
    """Classify images by two 5x5 convolutions (32 and 64 maps), each max-pooled by 2, and a dense layer of 2048.

    This is the LEAF FEMNIST network (Caldas et al. 2018, models/femnist/cnn.py). Images are float
    (N, channels, image_size, image_size); logits are (N, classes).
    """

    def __init__(self, image_size: int, channels: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 5, padding="same")
        self.conv2 = nn.Conv2d(32, 64, 5, padding="same")
        self.fc1 = nn.Linear(64 * (image_size // 4) ** 2, 2048)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(2048, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(self.dropout(F.relu(self.fc1(x.flatten(1)))))
