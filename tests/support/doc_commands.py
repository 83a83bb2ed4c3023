"""The commands in README.md, CONTRIBUTING.md and docs/, and how each kind of them is checked without running it."""

import argparse
import atexit
import importlib
import itertools
import os
import re
import shlex
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from flapp.config.load import compose, read_node_config
from flapp.server.preflight import check_model
from tests.support.vits import timms, transformerses
from tools import cli

ROOT = Path(__file__).resolve().parents[2]
READ_FIRST = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("index", "running"))]
OTHERS = [path for path in sorted((ROOT / "docs").glob("*.md")) if path not in READ_FIRST]
PAGES = {path: path.read_text() for path in (*READ_FIRST, *OTHERS, ROOT / "CONTRIBUTING.md")}
PROGRAMS = r"flapp|hf|python3?|pip|flwr|flower-\w+|ray|nginx|tensorboard|pre-commit|mkdocs|ruff"
PLACEHOLDERS = {"DIR", "RUN_DIR", "PATH", "FILE", "DB", "PARTITION", "DATASET"}  # allowed in tables and prose only


def blocks(language: str) -> list[str]:
    """Return the blocks of a language, page after page."""
    found = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [block for text in PAGES.values() for block in found.findall(text)]


def pasted() -> list[str]:
    """Return the commands of the bash blocks, without comments; a line with several commands gives several."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^|\s+)#.*", "", line) for line in lines]
    return [" ".join(part.split()) for line in lines if line for part in re.split(r" && | &$", line) if part]


def mentioned() -> list[str]:
    """Return the commands in tables and prose."""
    text = re.sub(r"^```.*?^```", "", "\n".join(PAGES.values()), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(rf"`((?:{PROGRAMS}) [^`]+)`", text)
    return [part for command in found for part in command.split(" && ")]


def has_placeholder(command: str) -> bool:
    return bool(PLACEHOLDERS & set(re.findall(r"(?<![$\w])[A-Z_]+(?![\w=])", command)))


def words_of(command: str) -> list[str]:
    return [os.path.expandvars(os.path.expanduser(word)) for word in shlex.split(command)]


def composes(command: str) -> None:
    """Compose every job of a command of Hydra's words, as far as they are settings of flapp.

    The user's own data are not prepared here, so shape and classes are given.
    """
    words = shlex.split(re.sub(r"^python -m tools\.\w+|--cfg job|--format json", "", command))
    jobs = [["dataset.shape=[32,32,3]"], ["dataset.classes=2"]] if "dataset=custom" in words else []
    for override in OverridesParser.create().parse_overrides([word for word in words if word != "-m"]):
        key = override.get_key_element()
        if override.is_sweep_override():
            interval = override.value() if override.is_interval_sweep() else None
            values = [interval.start, interval.end] if interval else list(override.sweep_string_iterator())
            jobs.append([f"{key}={value}" for value in values])
        elif not key.startswith("hydra"):
            jobs.append([override.input_line or ""])
    for job in itertools.product(*jobs):
        if "model=pretrained" in job or "model.pretrained=" in command:
            check_model(compose(list(job), pretrained_folder()))
        else:
            compose(list(job), Path("/nowhere"), preparing="tools.prepare_data" in command)


@cache
def pretrained_folder() -> Path:
    """Return a folder with what the commands of docs/pretrained.md download: transformers' and timm's ViTs."""
    folder = Path(tempfile.mkdtemp())
    base = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    transformerses(folder / "vit_base", size=224, **base)
    timms(folder / "vit_small", size=224, name="vit_small_patch16_224")
    timms(folder / "deit_tiny", size=224, name="deit_tiny_patch16_224")
    atexit.register(shutil.rmtree, folder)
    return folder


def is_hf(command: str) -> None:
    from huggingface_hub.cli.hf import app

    reads(app, words_of(command))


def is_torchvisions(command: str) -> None:
    """Run torchvision's download without a network."""
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, *_, **__: asked.append(url))
        exec(words_of(command)[2], {})
    assert [url.rpartition("/")[2] for url in asked] == ["vit_b_16-c867db91.pth"]
    assert "`~/.cache/torch/hub/checkpoints/vit_b_16-c867db91.pth`" in PAGES[ROOT / "docs" / "pretrained.md"]


class Parsed(Exception):
    """The arguments were understood."""


def is_parsed(command: str) -> None:
    """Let one of our tools read its arguments, and nothing more."""
    _, _, module, *words = words_of(command)

    def parse_only(real: Callable[..., Any]) -> Callable[..., None]:
        def parse(parser: argparse.ArgumentParser, given: Sequence[str] | None = None, *_: Any) -> None:
            real(parser, given)
            raise Parsed

        return parse

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, parse_only(getattr(argparse.ArgumentParser, name)))
        patch.setattr(sys, "argv", [module, *words])
        with pytest.raises(Parsed):
            importlib.import_module(module).main(words)


def is_flapp(command: str) -> None:
    """Check a command of `flapp` as that of the module behind it."""
    if command == "flapp --help":
        return
    _, name, *words = shlex.split(command)
    module = cli.COMMANDS[name][0]
    check = composes if module in ("run", "prepare_data") else is_parsed
    check(shlex.join(["python", "-m", f"tools.{module}", *words]))


def is_superlink(command: str) -> None:
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

    _parse_args_run_superlink().parse_args(words_of(command)[1:])


def is_supernode(command: str) -> None:
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    given = _parse_args_run_supernode().parse_args(words_of(command)[3:])
    read_node_config(tomllib.loads("\n".join(re.findall(r'\S+=".*?"', given.node_config))))


def is_flwr(command: str) -> None:
    """Let Flower's command line read it; settings in `overrides` are composed."""
    from flwr.cli.app import app
    from typer.main import get_command

    words = words_of(command)
    reads(get_command(app), words)
    if "-c" in words:
        composes(tomllib.loads(words[words.index("-c") + 1])["overrides"])


def is_ray(command: str) -> None:
    from ray.scripts.scripts import cli

    reads(cli, words_of(command))


def reads(command: Any, words: list[str], parent: Any = None) -> None:
    """Parse the words of a command line of click's; raises click.UsageError for those it does not know."""
    with command.make_context(words[0], words[1:], parent=parent) as context:
        if hasattr(command, "resolve_command"):
            name, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            reads(inner, [name, *rest], context)


def is_installed(command: str) -> None:
    """See that the extras named are in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"\[(.*?)\]", command)
    assert not extras or set(extras[1].split(",")) <= project["optional-dependencies"].keys()


def registers(command: str) -> None:
    match = re.fullmatch(r"for key in (\S+)/client_\*\.pub; do (flwr .*); done", command)
    assert match
    is_flwr(match[2].replace("$key", f"{match[1]}/client_3.pub").replace("$(basename $key .pub)", "client_3"))


def is_known(command: str) -> None:
    """Accept a command that another test runs, or that needs a program of others."""


CHECKS: dict[str, Callable[[str], None]] = {
    r"python -m tools\.(run|prepare_data)\b.*": composes,
    r"python -m tools\.(federation|certificates|proxy|benchmark|report|checkpoints|split_model|runs|new) .*": is_parsed,
    r"python -m tools\.(verify_data|partition_heatmap|predict|export) .*": is_parsed,
    r"flapp .*": is_flapp,
    r"hf download .*": is_hf,
    r"python -c \"from torchvision.models import .*\"": is_torchvisions,
    r"python -m tools\.supernode .*": is_supernode,
    r"flower-superlink .*": is_superlink,
    r"flwr .*": is_flwr,
    r"for key in .*": registers,
    r"ray start .*": is_ray,
    r"pip install (-e (\.|[\"']\.\[[a-z,]+\][\"'])|torch torchvision --index-url \S+)": is_installed,
    r"python -m pytest( -m \"not slow\"| -n 4)?|pre-commit install|\.ci/run|mypy": is_known,
    r"ruff check \.|ruff format --check \.|mkdocs (serve|build --strict)|python -m tools\.configuration": is_known,
    r"cd mine|export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1": is_known,
    r"lint-imports|python3 -m venv \.venv|\. \.venv/bin/activate": is_known,
    r"DB=\S+|export RAY_AUTH_MODE=token (RAY_AUTH_TOKEN=\$\(cat \S+\)|RAY_AUTH_TOKEN_PATH=\S+)": is_known,
    r"openssl rand -hex 32 > \S+|chmod 600 \S+|nginx -c /etc/flapp/nginx\.conf|tensorboard --logdir \S+": is_known,
}
