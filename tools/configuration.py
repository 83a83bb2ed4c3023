"""Write docs/configuration.md: every setting with its type, default and meaning, from conf/ and the schema."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from pydantic import TypeAdapter

from flapp.config.load import CONF
from flapp.config.schema import Config
from flapp.files import write_text
from tools.page.reading import flat

PAGE = CONF.parent / "docs" / "configuration.md"
INTRO = """\
# Configuration

`python -m tools.run train.lr=0.01` changes one setting. `python -m tools.run model=cnn` changes a whole group of
settings. `python -m tools.run --cfg job` prints all settings of a run. A setting that is unknown, out of range or in
conflict with another one is refused in one line, before anything starts.

This page is generated: change `conf/` or `flapp/config/schema.py`, then run `python -m tools.configuration`.
"""
WORDS = {
    "boolean": "true or false",
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "null": "`null`",
    "object": "keys and values",
}
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
KEY = re.compile(r"^( *)([a-z_]+):(?: [^#]*?)?(?:(?<= )# (.*))?$")
Schema = dict[str, Any]  # JSON Schema


def main() -> int:
    write_text(PAGE, page())
    print(f"wrote {PAGE}")
    return 0


def page() -> str:
    schema, default = TypeAdapter(Config).json_schema(), flat(composed())
    settings = schema["properties"]
    groups = {name: found["$ref"].rpartition("/")[2] for name, found in settings.items() if "$ref" in found}
    single = {name: found for name, found in settings.items() if name not in groups}
    texts = [INTRO, "## General\n", table(single, default), "## experiment\n", choices("experiment", default)]
    for name, kind in groups.items():
        texts.append(f"## {name}\n")
        if heading := comments().get(name):
            texts.append(f"{heading}.\n")
        if (CONF / name).is_dir():
            texts.append(choices(name, default))
        properties = schema["$defs"][kind]["properties"]
        texts.append(table({f"{name}.{key}": found for key, found in properties.items()}, default))
    return "\n".join(texts)


def table(settings: dict[str, Schema], default: dict[str, Any]) -> str:
    """Return the table of some settings, given by their full names."""
    rows = []
    for name, schema in settings.items():
        kind, text = type_in_words(schema), comments().get(name, "")
        if "`" in kind:  # then the type lists the values
            text = re.sub(r": [\w-]+( \| [\w-]+)+$", "", text)
        rows.append((f"`{name}`", kind, f"`{value_in_words(default.get(name, {}))}`", text))
    return markdown(("setting", "type", "default", "meaning"), rows)


def choices(group: str, default: dict[str, Any]) -> str:
    """Return the table of the choices of a group, and how each differs from the default."""
    listed = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    chosen = {key: str(value) for each in listed if isinstance(each, dict) for key, value in each.items()}[group]
    rows = []
    for path in sorted((CONF / group).glob("[!_]*.yaml")):
        head = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
        what = " ".join(line for line in head if not line.startswith("@package"))
        words = ["(the default)"]
        if path.stem != chosen:
            values = flat(composed(f"{group}='{path.stem}'"))
            own = [key for key in values if values[key] != default.get(key) and key not in ("run_name", "experiment")]
            words = [f"`{key}={value_in_words(values[key])}`" for key in own]
        rows.append((f"`{group}={path.stem}`", what, ", ".join(words)))
    return markdown(("choice", "what it is", "differs by"), rows)


def composed(*overrides: str) -> Any:
    """Compose conf/ and return plain values, with interpolations left unresolved."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=False)


def type_in_words(schema: Schema) -> str:
    """Return the type of a setting in plain words."""
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(map(type_in_words, schema["anyOf"]))
    if schema["type"] == "array":
        return f"list of: {type_in_words(schema['items'])}"
    if "pattern" in schema:
        return "module:function"
    limits = [f"{word} {schema[key]:g}" for key, word in LIMITS.items() if key in schema]
    return ", ".join([WORDS[schema["type"]], *limits])


def value_in_words(value: Any) -> str:
    """Return a value as written on the command line, with interpolations replaced by what they refer to."""
    text = json.dumps(value) if isinstance(value, bool | None) else str(value).replace(" ", "")
    text = re.sub(r"\$\{oc\.env:HOME\}", "~", text)
    text = re.sub(r"\$\{oc\.env:FLAPP_HOME,(.*?)\}", r"\1", text)
    text = re.sub(r"\$\{now:.*?\}", "<time>", text)
    return re.sub(r"\$\{(\w+)\}", r"<\1>", text)


@cache
def comments() -> dict[str, str]:
    """Return the comments in conf/config.yaml by setting: the text on the lines above it and at the end of its line."""
    found, above, group = {}, list[str](), ""
    for line in (CONF / "config.yaml").read_text().splitlines():
        if match := KEY.match(line):
            indent, key, beside = match.groups()
            group = group if indent else key
            found[f"{group}.{key}" if indent else key] = " ".join([*above, *filter(None, [beside])])
            above = []
        elif line.strip().startswith("# "):
            above.append(line.strip()[2:])
    return found


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
