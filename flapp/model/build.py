"""The one place that turns a model's name into a module."""

from collections.abc import Callable, Sequence

from torch import nn


def _vit(name: str, image_size: int, channels: int, classes: int, dropout: float) -> nn.Module:
    from flapp.model.vit import build_vit  # imports torchvision, 1 s: only who needs it pays

    return build_vit(name, image_size, channels, classes, dropout)


def _cnn(name: str, image_size: int, channels: int, classes: int, dropout: float) -> nn.Module:
    from flapp.model.cnn import LeafCNN

    return LeafCNN(image_size, channels, classes, dropout)


Builder = Callable[[str, int, int, int, float], nn.Module]
BUILDERS: dict[str, Builder] = {"vit_tiny": _vit, "vit_s_16": _vit, "vit_b_16": _vit, "cnn": _cnn}


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
    if name not in BUILDERS:
        known = ", ".join(sorted([*BUILDERS, "linear"]))
        raise ValueError(f"model.name={name} is not known: choose one of {known}")
    if len(shape) != 3 or classes < 1:
        raise ValueError(
            f"model={name} classifies images of shape (H, W, C), got samples of shape {tuple(shape)} "
            f"with {classes} classes: choose model=linear or an image dataset"
        )
    if image_size is None and shape[0] != shape[1]:
        raise ValueError(f"model={name} takes square images, got {shape[0]}x{shape[1]}: set model.image_size")
    if channels not in (None, shape[2]) and (shape[2] != 1 or BUILDERS[name] is not _vit):
        raise ValueError(
            f"model={name} cannot take images of {shape[2]} channels as {channels}: a ViT expands grey ones"
        )
    return BUILDERS[name](name, image_size or shape[0], channels or shape[2], classes, dropout)
