"""What NAME trains: a network, its loss, and what is measured. Edit it; `flapp run` tries it before the first round."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


class Network(nn.Module):
    """Classify grey images of any size by two convolutions and a linear layer."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width * 4 * 4, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(images)))
        x = F.relu(self.conv2(x))
        return self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))


def build_model(width: int = 16) -> nn.Module:
    """Return a new network; model.kwargs gives the arguments."""
    return Network(width, CLASSES)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of a batch."""
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


def count(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return sums over a batch: flapp adds them up over batches and clients, exactly."""
    right = outputs.argmax(1) == targets
    found = {f"right_{label}": (right & (targets == label)).sum() for label in range(CLASSES)}
    return found | {f"all_{label}": (targets == label).sum() for label in range(CLASSES)}


def score(sums: dict[str, float]) -> dict[str, float]:
    """Return what the sums over all clients mean: the mean of the classes' accuracies."""
    seen = [label for label in range(CLASSES) if sums[f"all_{label}"]]
    return {"balanced_accuracy": sum(sums[f"right_{label}"] / sums[f"all_{label}"] for label in seen) / len(seen)}


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return training images with a little noise; all random numbers come from the generator."""
    return images + 0.05 * torch.randn(*images.shape, generator=generator)
