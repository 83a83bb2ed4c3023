"""The command `flapp`: each subcommand runs one of the modules `python -m tools.NAME`.

Help and hints name commands as the user called this one, as flapp NAME or as python -m tools.NAME.
"""

import argparse
import importlib
import re
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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


def as_called(text: str) -> str:
    """Return `text` with `python -m tools.NAME` replaced by `flapp NAME` if this process was started as flapp."""
    if not Path(sys.argv[0]).name.startswith("flapp"):
        return text
    names = {module: f"flapp {name}" for name, (module, _) in COMMANDS.items()}
    return re.sub(r"python -m tools\.(\w+)", lambda found: names.get(found[1], found[0]), text)


def new_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of a command line whose help begins with `description`, the docstring of its module."""
    return argparse.ArgumentParser(
        description=as_called(description), formatter_class=argparse.RawDescriptionHelpFormatter
    )


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


def installed_version() -> str:
    """Return the version of the installed package."""
    try:
        return version("flapp")
    except PackageNotFoundError:
        return "not installed (pip install -e .)"


def main() -> int:
    """Run the command given on the command line; returns the exit status."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"flapp {installed_version()}")
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
