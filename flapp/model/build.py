"""The one place that turns a model's name into a module."""

from collections.abc import Callable, Sequence

from torch import nn

from flapp.model.layout import SIZES, input_of


def _vit(name: str, image_size: int, channels: int, classes: int, dropout: float) -> nn.Module:
    from flapp.model.vit import build_vit  # imports torchvision, 1 s: only who needs it pays

    return build_vit(name, image_size, channels, classes, dropout)


def _cnn(name: str, image_size: int, channels: int, classes: int, dropout: float) -> nn.Module:
    from flapp.model.cnn import LeafCNN

    return LeafCNN(image_size, channels, classes, dropout)


Builder = Callable[[str, int, int, int, float], nn.Module]
BUILDERS: dict[str, Builder] = {**dict.fromkeys(SIZES, _vit), "cnn": _cnn}  # what each builds is also in LAYOUTS


def build_model(
    name: str,
    shape: Sequence[int],
    classes: int,
    image_size: int | None = None,
    dropout: float = 0.0,
    channels: int | None = None,
) -> nn.Module:
    """Build the model `name` for samples of `shape`, drawing its weights from torch's global generator.

    shape is (H, W, C) for images or (features,) for `linear`; classes is 0 for regression (one output).
    image_size overrides H and W for a model fed with resized images; channels=3 makes a ViT that takes grey images
    expanded, as a pretrained RGB model needs. Raises ValueError for a name that is not known or a shape that the
    model cannot take.
    """
    if name == "linear":
        from flapp.model.linear import Linear

        return Linear(shape, max(classes, 1))
    size, channels = input_of(name, shape, classes, image_size, channels)
    return BUILDERS[name](name, size, channels, classes, dropout)
