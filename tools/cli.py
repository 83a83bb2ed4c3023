"""The command `flapp`. Each subcommand runs a module of tools; this file also has what the modules share.

Help and hints write `flapp NAME` or `python -m tools.NAME`, whichever the user typed.
"""

import argparse
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Container, Iterable, Sequence
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

COMMANDS = {  # name: module, what it does
    "new": ("new", "make a folder with a project of your own"),
    "run": ("run", "train one run or a sweep; see `flapp run --help`"),
    "runs": ("runs", "list, show, stop and remove runs"),
    "report": ("report", "write one HTML page about one run or several"),
    "prepare": ("prepare_data", "convert a dataset, once, into the format that runs read"),
    "verify": ("verify_data", "check prepared data and shards against their digests"),
    "heatmap": ("partition_heatmap", "draw how many samples of each class each client has"),
    "checkpoints": ("checkpoints", "inspect the models that server and clients saved"),
    "predict": ("predict", "classify images with the model of a run"),
    "export": ("export", "write the model of a run for torchvision, transformers, timm, PEFT or ONNX"),
    "split": ("split_model", "cut the model of a run into bottom, trunk and top"),
    "federation": ("federation", "a SuperLink and SuperNodes on this machine: up, status, down"),
    "certificates": ("certificates", "make keys and certificates for a deployment"),
    "proxy": ("proxy", "write the configuration of a proxy in front of a SuperLink"),
    "benchmark": ("benchmark", "measure flapp on this machine"),
}
INTERRUPTED = 130
MOST_TEXT, MOST_CELL = 2000, 1000  # characters of an error, and of a cell of a table
MOST_TEXTS = 3
Found = tuple[dict[str, Any], Iterable[str]]  # what a command found, as JSON and as lines to print


def as_called(text: str) -> str:
    """Return `text` with `python -m tools.NAME` replaced by `flapp NAME` if this process was started as flapp."""
    if not Path(sys.argv[0]).name.startswith("flapp"):
        return text
    names = {module: f"flapp {name}" for name, (module, _) in COMMANDS.items()}
    return re.sub(r"python -m tools\.(\w+)", lambda found: names.get(found[1], found[0]), text)


def default_home() -> Path:
    """Return the home folder that commands use by default."""
    return Path(os.environ.get("FLAPP_HOME") or Path.home() / ".flapp").absolute()


def new_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of a command line whose help begins with `description`, the docstring of its module."""
    return argparse.ArgumentParser(
        description=as_called(description), formatter_class=argparse.RawDescriptionHelpFormatter
    )


def errors_in_one_line(*errors: type[Exception]) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """Make a function the main function of a command: it returns the exit status, 0 for None.

    An error of these kinds becomes one line on standard error and status 1.
    """

    def decorate(act: Callable[..., int | None]) -> Callable[..., int]:
        @wraps(act)
        def main(*arguments: object) -> int:
            try:
                return act(*arguments) or 0
            except errors as error:
                from flapp.untrusted import printable  # imports NumPy

                said = " ".join(str(error).split())
                if isinstance(error, OSError) and error.filename:
                    said = f"{error.filename} cannot be used ({error.strerror})"
                print(as_called(f"error: {printable(said, MOST_TEXT)}"), file=sys.stderr)
                return 1

        return main

    return decorate


def table(heads: Sequence[object], rows: Iterable[Sequence[object]], right: Container[int] = ()) -> list[str]:
    """Return aligned lines; the columns in `right` hold numbers."""
    from flapp.untrusted import printable  # imports NumPy

    lines = [[printable(cell, MOST_CELL) for cell in row] for row in (heads, *rows)]
    sides = [(max(map(len, column)), ">" if i in right else "<") for i, column in enumerate(zip(*lines, strict=True))]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, (width, side) in zip(line, sides, strict=True)).rstrip()
        for line in lines
    ]


def count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def some(texts: list[str]) -> str:
    """Return the first few texts in one line, and the number of the others."""
    more = f"; and {len(texts) - MOST_TEXTS} more" if len(texts) > MOST_TEXTS else ""
    return "; ".join(texts[:MOST_TEXTS]) + more


def in_bytes(size: int) -> str:
    """Return a size as people read it, in powers of ten."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size} B"


def by_number(name: str) -> list[tuple[str, int, str]]:
    """Return a key that sorts client 2 before client 10; a number may have any length."""
    parts = [(text, digits.lstrip("0")) for text, digits in re.findall(r"(\D*)(\d*)", name)]
    return [(text, len(digits), digits) for text, digits in parts]


def usage() -> str:
    """List the commands, one line each."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "flapp: federated training with Flower, of image models and of your own.\n\n"
        f"usage: flapp COMMAND ...\n\n{commands}\n\n"
        "`flapp COMMAND --help` explains a command, `flapp --version` prints the version.\n"
        "Start with `flapp run`: it trains a small vision transformer on ten clients in about two minutes."
    )


def main() -> int:
    """Run the command given on the command line; returns the exit status."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"flapp {version('flapp')}")
        return 0
    if words[0] not in COMMANDS:
        print(f"error: {words[0]} is not a command of flapp: choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if words[0] in ("runs", "checkpoints", "verify", "predict"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends them quietly
    sys.argv = [f"flapp {words[0]}", *words[1:]]
    try:
        return int(importlib.import_module(f"tools.{COMMANDS[words[0]][0]}").main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
