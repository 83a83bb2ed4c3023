"""Plain nested values into the dataclasses of settings.py, each checked against its type and range."""

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union

from flapp.config.schema import Config, ConfigError

T = TypeVar("T")


def setting_names(cls: type = Config, prefix: str = "") -> list[str]:
    """List every setting by its dotted name."""
    names: list[str] = []
    for name, annotation in typing.get_type_hints(cls).items():
        if is_dataclass(annotation):
            names += setting_names(typing.cast(type, annotation), f"{prefix}{name}.")
        names.append(prefix + name)
    return names


def takes_list(key: str) -> bool:
    """Say whether the setting with this dotted name may be a list."""
    annotation: Any = Config
    for name in key.split("."):
        annotation = _annotations(annotation).get(name) if isinstance(annotation, type) else None
    return any(typing.get_origin(each) is tuple for each in (annotation, *typing.get_args(annotation)))


@cache
def _annotations(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def build(cls: type[T], values: Any, prefix: str = "") -> T:
    """Build the dataclass `cls` from a mapping, naming unknown and missing keys in full."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix[:-1] or 'the config'} must be a group of settings, got {values!r}")
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ConfigError(f"{prefix}{key} is not a setting{hint(key, names)}")
    if missing := [name for name in names if name not in values]:
        raise ConfigError(f"{prefix}{missing[0]} is missing: give it a value")
    annotations = _annotations(typing.cast(Any, cls))
    return cls(**{name: _convert(annotations[name], values[name], prefix + name) for name in names})


def _convert(annotation: Any, value: Any, key: str) -> Any:
    """Return `value` as the annotated type, or raise ConfigError naming the key, the value and what would do."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and is_dataclass(annotation):
        return build(annotation, value, key + ".")
    if origin in (Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _convert(inner, value, key)
    if origin is Annotated:
        number = _convert(arguments[0], value, key)
        if wanted := arguments[1].broken_by(number):
            raise ConfigError(f"{key}={value} is out of range: it must be {wanted}")
        return number
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{key}={value} is not known: choose one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, key) for item in value)
    if annotation is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if annotation is float or type(value) is not annotation:
        wanted = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
        raise ConfigError(f"{key}={value} must be {wanted.get(annotation, 'a list')}, got {type(value).__name__}")
    return value


def hint(key: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(names), n=1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else ": see conf/config.yaml for the settings"
