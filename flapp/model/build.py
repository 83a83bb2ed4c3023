"""Build a model by its name."""

from collections.abc import Callable, Sequence

from torch import nn

from flapp.model.layout import SIZES, Variant, input_of, variant_fault
from flapp.model.networks import LeafCNN, Linear
from flapp.model.vit import ViT

Builder = Callable[[str, int, int, int, float], nn.Module]
BUILDERS: dict[str, Builder] = {  # each has its layout in layout.LAYOUTS
    **dict.fromkeys(SIZES, ViT),
    "cnn": lambda _name, *given: LeafCNN(*given),
}


def build_model(
    name: str,
    shape: Sequence[int],
    classes: int,
    image_size: int | None = None,
    dropout: float = 0.0,
    channels: int | None = None,
    variant: Variant = Variant(),  # noqa: B008 - it is frozen
) -> nn.Module:
    """Build the model `name` for samples of `shape`, drawing its weights from torch's global generator.

    shape is (H, W, C) for images or (features,) for `linear`; classes is 0 for regression (one output).
    image_size overrides H and W where images are resized. channels=3 makes a ViT that takes grey images as RGB, as
    pretrained weights need; variant is that of a ViT. Raises ValueError for an unknown name or an unfit shape.
    """
    if fault := variant_fault(name, variant):
        raise ValueError(fault)
    if name == "linear":
        return Linear(shape, max(classes, 1))
    size, channels = input_of(name, shape, classes, image_size, channels)
    model = BUILDERS[name](name, size, channels, classes, dropout)
    if variant.given():
        assert isinstance(model, ViT)
        model.set_variant(variant)
    return model
