"""Name commands in help and hints as the user called this one: flapp NAME or python -m tools.NAME."""

import argparse
import re
import sys
from pathlib import Path

MODULE = re.compile(r"python -m tools\.(\w+)")
NAMES = {"prepare_data": "prepare", "verify_data": "verify", "partition_heatmap": "heatmap", "split_model": "split"}
WITHOUT = ("supernode",)  # modules that are not commands of flapp


def as_called(text: str) -> str:
    """Return `text` with `python -m tools.NAME` replaced by `flapp NAME` if this process was started as flapp."""
    if not Path(sys.argv[0]).name.startswith("flapp"):
        return text
    return MODULE.sub(lambda found: found[0] if found[1] in WITHOUT else f"flapp {NAMES.get(found[1], found[1])}", text)


def new_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of a command line whose help begins with `description`, the docstring of its module."""
    return argparse.ArgumentParser(
        description=as_called(description), formatter_class=argparse.RawDescriptionHelpFormatter
    )
