"""Fill in settings that are left to files: the prepared dataset says its shape, pretrained weights say their model."""

from pathlib import Path
from typing import Any

from flapp.config.schema import ConfigError
from flapp.model.layout import PLAIN, SIZES
from flapp.model.vit_weights import describe
from flapp.untrusted import printable


def derive(values: dict[str, Any], reads_weights: bool = True) -> None:
    """Fill in settings, plain nested values that are not checked yet, in place; raises ConfigError.

    reads_weights: whether pretrained weights may be read. An app may not: each machine has its own, and server and
    clients must build the same model.
    """
    if isinstance(values.get("dataset"), dict):
        _fill_dataset(values)
    if isinstance(values.get("model"), dict):
        _fill_model(values["model"], reads_weights)


def _fill_dataset(values: dict[str, Any]) -> None:
    """Fill in shape, classes and normalization of dataset=custom from its prepared artifact or shards."""


def _fill_model(model: dict[str, Any], reads_weights: bool) -> None:
    """Fill in what pretrained weights say of the model that they are for.

    With model=pretrained, weights that cannot be used are refused here. Otherwise they are left to the server, which
    refuses them before a round, as it does a setting that it finds to contradict them.
    """
    path, name = model.get("pretrained"), model.get("name")
    if name == "pretrained" and not reads_weights:
        raise ConfigError("model=pretrained is for commands, which read the weights: name the model, such as vit_b_16")
    if name == "pretrained" and path is None:
        raise ConfigError("model=pretrained takes its size from a file of weights: set model.pretrained=PATH")
    if not isinstance(path, str) or not reads_weights or name not in ("pretrained", *SIZES):
        return
    if name != "pretrained" and not Path(path).exists():
        return
    try:
        weights = describe(Path(path))
    except ValueError as error:
        if name == "pretrained":
            raise ConfigError(
                f"model=pretrained takes its size from model.pretrained: {printable(error, 1000)}"
            ) from error
        return
    if name == "pretrained":
        model |= {"name": weights.size, "channels": model.get("channels") or weights.channels}
        model["image_size"] = model.get("image_size") or weights.image_size
    for key, value in weights.variant.given().items():
        if model.get(key) is None and value != vars(PLAIN)[key]:
            model[key] = value
