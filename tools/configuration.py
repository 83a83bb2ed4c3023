"""Write docs/configuration.md: every setting with its type, default and meaning, from conf/ and the schema."""

import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from flapp.config.load import CONF
from flapp.config.schema import Config
from flapp.files import write_text

PAGE = CONF.parent / "docs" / "configuration.md"
INTRO = """\
# Configuration

`python -m tools.run train.lr=0.01` changes one setting. `python -m tools.run model=cnn` changes a whole group of
settings. `python -m tools.run --cfg job` prints all settings of a run. A setting that is unknown, out of range or in
conflict with another one is refused in one line, before anything starts.

This page is generated: change `conf/` or `flapp/config/schema.py`, then run `python -m tools.configuration`.
"""
WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
KEY = re.compile(r"^( *)([a-z_]+):(?: [^#]*?)?(?:(?<= )# (.*))?$")


def main() -> int:
    """Write the page."""
    write_text(PAGE, page())
    print(f"wrote {PAGE}")
    return 0


def page() -> str:
    """Return the text of the page."""
    groups = {name: kind for name, kind in fields(Config) if is_group(kind)}
    single = [name for name, _ in fields(Config) if name not in groups]
    default = composed()
    texts = [INTRO, "## General\n", table("", Config, single, default)]
    texts += ["## experiment\n", choices("experiment", default)]
    for name, kind in groups.items():
        texts.append(f"## {name}\n")
        if heading := comments(CONF / "config.yaml").get(name):
            texts.append(f"{heading}.\n")
        if (CONF / name).is_dir():
            texts.append(choices(name, default))
        texts.append(table(f"{name}.", kind, [key for key, _ in fields(kind)], default[name]))
    return "\n".join(texts)


def table(prefix: str, kind: Any, names: list[str], default: dict[str, Any]) -> str:
    """Return the table of some settings of one class of the schema."""
    types_of = dict(fields(kind))
    rows = [
        (
            f"`{prefix}{name}`",
            type_in_words(types_of[name]),
            f"`{value_in_words(default[name])}`",
            meaning(prefix + name, types_of[name]),
        )
        for name in names
    ]
    return markdown(("setting", "type", "default", "meaning"), rows)


def choices(group: str, default: dict[str, Any]) -> str:
    """Return the table of the choices of a group, and how each differs from the default."""
    listed = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    chosen = {key: str(value) for each in listed if isinstance(each, dict) for key, value in each.items()}[group]
    rows = []
    for path in sorted((CONF / group).glob("[!_]*.yaml")):
        head = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
        what = " ".join(line for line in head if not line.startswith("@package"))
        changed = ", ".join(f"`{key}={value_in_words(value)}`" for key, value in changes(group, path.stem, default))
        rows.append((f"`{group}={path.stem}`", what, "(the default)" if path.stem == chosen else changed))
    return markdown(("choice", "what it is", "differs by"), rows)


def changes(group: str, choice: str, default: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings in which a choice differs from the default, by their full names."""
    before = dict(flat(default))
    for key, value in flat(composed(f"{group}='{choice}'")):
        if before.get(key) != value and key not in ("run_name", "experiment"):
            yield key, value


def composed(*overrides: str) -> dict[str, Any]:
    """Compose conf/ and return plain values, interpolations as they are written."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = compose("config", overrides=list(overrides))
    return typing.cast(dict[str, Any], OmegaConf.to_container(tree, resolve=False))


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by their full names."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def fields(kind: Any) -> list[tuple[str, Any]]:
    """Return name and annotation of every setting of a class of the schema."""
    return list(typing.get_type_hints(kind, include_extras=True).items())


def is_group(kind: Any) -> bool:
    """Say whether an annotation is a class of the schema with settings of its own."""
    return isinstance(kind, type) and kind.__module__ == Config.__module__


def type_in_words(kind: Any) -> str:
    """Return an annotation of the schema in plain words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        inner = [type_in_words(argument) for argument in arguments if argument is not type(None)]
        return " or ".join([*inner, "`null`"] if type(None) in arguments else inner)
    if origin is tuple:
        return f"list of: {type_in_words(arguments[0])}"
    if origin is Annotated:
        rules = [rule for given in arguments[1:] for rule in getattr(given, "metadata", [given])]
        limits = [f"{word} {limit}" for rule in rules for key, word in LIMITS.items() for limit in limits_of(rule, key)]
        return ", ".join([type_in_words(arguments[0]), *limits])
    return WORDS[kind]


def limits_of(rule: Any, key: str) -> list[str]:
    """Return the limit of this kind that a rule sets, if it sets one."""
    limit = getattr(rule, key, None)
    return [] if limit is None else [f"{limit:g}"]


def value_in_words(value: Any) -> str:
    """Return a value as one would write it on the command line; interpolations by what they stand for."""
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else str(value)
    text = re.sub(r"\$\{oc\.env:HOME\}", "~", str(text).replace(" ", ""))
    text = re.sub(r"\$\{oc\.env:FLAPP_HOME,(.*?)\}", r"\1", text)
    text = re.sub(r"\$\{now:.*?\}", "<time>", text)
    return re.sub(r"\$\{(\w+)\}", r"<\1>", text)


def meaning(name: str, kind: Any) -> str:
    """Return the comment of a setting in conf/config.yaml, without the list of values where the type has it."""
    text = comments(CONF / "config.yaml").get(name, "")
    return re.sub(r": [\w-]+( \| [\w-]+)+$", "", text) if "`" in type_in_words(kind) else text


def comments(path: Path) -> dict[str, str]:
    """Return the comments of a YAML file by setting: those at the end of its line, or on the lines above it."""
    found, above, group, in_head = {}, list[str](), "", True
    for line in path.read_text().splitlines():
        match = KEY.match(line)
        if match:
            indent, key, beside = match.groups()
            group = group if indent else key
            name = f"{group}.{key}" if indent else key
            if text := " ".join([*([] if in_head else above), *([beside] if beside else [])]):
                found[name] = text
            above, in_head = [], False
        elif line.strip().startswith("# "):
            above.append(line.strip()[2:])
    return found


def markdown(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table, and an empty line after it."""
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
