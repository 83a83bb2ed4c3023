"""Turn plain nested values into settings. An error is one line that names the setting."""

import difflib
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from flapp.config.schema import TARGET, Config, ConfigError
from flapp.untrusted import printable

T = TypeVar("T")

PROBLEMS = {  # what to say for pydantic's types of errors, with their context filled in
    "json_invalid": "has text that is not Unicode: use plain characters",
    "missing": "is missing: give it a value",
    "dataclass_type": "must be a group of settings",
    "int_type": "must be a whole number",
    "float_type": "must be a finite number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "greater_than": "is out of range: it must be more than {gt:g}",
    "greater_than_equal": "is out of range: it must be at least {ge:g}",
    "less_than": "is out of range: it must be less than {lt:g}",
    "less_than_equal": "is out of range: it must be at most {le:g}",
    "literal_error": "is not known: choose one of {expected}",
    "string_pattern_mismatch": "is not a target: write module:function, such as task:build_model",
}


def from_plain(cls: type[T], values: Any, prefix: str = "") -> T:
    """Return the settings `cls` of plain nested values, or raise ConfigError; prefix: of the names in the error."""
    try:
        # YAML has lists where settings are tuples. In strict mode, pydantic takes a list for a tuple only from JSON.
        return typing.cast(T, adapter_of(typing.cast(type, cls)).validate_json(json.dumps(values)))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        unknown = [each for each in errors if each["type"] == "unexpected_keyword_argument"]
        raise ConfigError(_describe((unknown or errors)[0], cls, prefix)) from None


@cache
def adapter_of(cls: type) -> TypeAdapter[Any]:
    """Return the object that reads settings `cls`; building it takes much longer than reading."""
    return TypeAdapter(cls)


def _describe(error: Mapping[str, Any], cls: type, prefix: str) -> str:
    """Say in one line what pydantic found wrong with one setting."""
    kind, found = error["type"], error["input"]
    path = [part for part in error["loc"] if isinstance(part, str)]  # without places in lists
    if kind != "unexpected_keyword_argument":
        path = [part for part in path if part.isidentifier() and part != "bool"]  # without members of unions
    key = prefix + ".".join(path)
    if kind == "unexpected_keyword_argument":
        siblings = [name.rpartition(".") for name in setting_types(cls)]
        close = hint(path[-1], [name for group, _, name in siblings if group == ".".join(path[:-1])])
        return f"{key} is not a setting{close}"
    context = error.get("ctx", {})
    choices = str(context.get("expected", "")).replace("'", "").replace(" or ", ", ")
    problem = PROBLEMS.get(kind, printable(error["msg"])).format_map({**context, "expected": choices})
    if kind in ("bool_type", "literal_error") and TARGET in str(setting_types(cls).get(".".join(path))):
        problem += ", or module:function"
    if kind == "dataclass_type":
        return f"{key or 'the config'} {problem}, got {printable(found)}"
    if kind == "missing" or not key:
        return f"{key or 'the config'} {problem}"
    return f"{key}={printable(found)} {problem}" + (f", got {type(found).__name__}" if kind.endswith("_type") else "")


def setting_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Return the annotation of every setting by its dotted name, those of groups included."""
    found: dict[str, Any] = {}
    for name, annotation in typing.get_type_hints(cls).items():
        if is_dataclass(annotation):
            found |= setting_types(typing.cast(type, annotation), f"{prefix}{name}.")
        found[prefix + name] = annotation
    return found


def hint(key: str, names: Iterable[str], otherwise: str = "see conf/config.yaml for the settings") -> str:
    """Return the end of a message about an unknown name: what was probably meant, or `otherwise`."""
    known = list(names)
    close = [name for name in known if name.endswith(f".{key}")] or difflib.get_close_matches(key, known, 1, 0.5)
    return f": did you mean {close[0]}?" if close else f": {otherwise}"
