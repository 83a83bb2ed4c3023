"""Fill in settings that are left to files: the prepared dataset says its shape, pretrained weights say their model."""

from typing import Any


def derive(values: dict[str, Any]) -> None:
    """Fill in settings, plain nested values that are not checked yet, in place; raises ConfigError."""
    if isinstance(values.get("dataset"), dict):
        _fill_dataset(values)
    if isinstance(values.get("model"), dict):
        _fill_model(values)


def _fill_dataset(values: dict[str, Any]) -> None:
    """Fill in shape, classes and normalization of dataset=custom from its prepared artifact or shards."""


def _fill_model(values: dict[str, Any]) -> None:
    """Fill in what pretrained weights say of the model that they are for."""
