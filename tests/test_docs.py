"""The text in README.md, CONTRIBUTING.md and docs/ is true: Python blocks run as pasted, commands are run or parsed.

A command that no line of CHECKS knows fails: whoever adds one says here how it is checked.
"""

import argparse
import atexit
import configparser
import importlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from flapp.config.load import ConfigError, compose, read_node_config
from flapp.config.plain import setting_types
from flapp.server.preflight import check_model
from tests.conftest import LocalGrid, run_app
from tests.support.vits import timms, transformerses
from tools import cli, configuration

ROOT = Path(__file__).resolve().parents[1]
READ_FIRST = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("index", "running"))]
OTHERS = [path for path in sorted((ROOT / "docs").glob("*.md")) if path not in READ_FIRST]
OWN_DATA = ROOT / "docs" / "own_data.md"
PAGES = {path: path.read_text() for path in (*READ_FIRST, *OTHERS, ROOT / "CONTRIBUTING.md")}
PROGRAMS = r"flapp|hf|python3?|pip|flwr|flower-\w+|ray|nginx|tensorboard|pre-commit|mkdocs|ruff"
PLACEHOLDERS = {"DIR", "RUN_DIR", "PATH", "FILE", "DB", "PARTITION", "DATASET"}  # allowed in tables and prose only
READS_RUNS = re.compile(
    r"python -m tools\.(report|checkpoints|split_model|verify_data|predict|export) "
    r"(?!.*(--benchmark|runs/lrs|data/pets))"
)
SMALL = ("clients=2", "train.steps=1", "train.batch_size=2", "evaluate.personal_epochs=0")
ADAPTED = ("strategy=fedlora", "lora=default", "model.channels=3")


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

    Of one's own data, shape and classes are given: they are not prepared here.
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
    real = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, given: Sequence[str] | None = None, *_: Any) -> None:
        real(parser, given)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
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
    r"python -m pytest( -m \"not slow\"| -n 3)?|pre-commit install|\.ci/run|mypy": is_known,
    r"ruff check \.|ruff format --check \.|mkdocs (serve|build --strict)|python -m tools\.configuration": is_known,
    r"cd mine|export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1": is_known,
    r"lint-imports|python3 -m venv \.venv|\. \.venv/bin/activate": is_known,
    r"DB=\S+|export RAY_AUTH_MODE=token (RAY_AUTH_TOKEN=\$\(cat \S+\)|RAY_AUTH_TOKEN_PATH=\S+)": is_known,
    r"openssl rand -hex 32 > \S+|chmod 600 \S+|nginx -c /etc/flapp/nginx\.conf|tensorboard --logdir \S+": is_known,
}


@pytest.mark.parametrize("command", dict.fromkeys([*pasted(), *mentioned()]))
def test_every_command_is_of_a_known_kind_and_is_understood(command: str) -> None:
    fitting = [check for pattern, check in CHECKS.items() if re.fullmatch(pattern, command)]
    assert len(fitting) == 1, f"say in CHECKS how this command is checked: {command}"
    fitting[0](command)


def test_commands_that_are_not_understood_are_noticed() -> None:
    for check, command, error in (
        (composes, "python -m tools.run modle=cnn", ConfigError),
        (composes, "python -m tools.run -m model=cnn train.lr=0.1,fast", ConfigError),
        (is_parsed, "python -m tools.report --output x", SystemExit),
        (is_superlink, "flower-superlink --prot 1", SystemExit),
        (is_supernode, "python -m tools.supernode --node-config 'client=\"3\"'", ConfigError),
        (is_flwr, "flwr run . --steram", Exception),
        (is_flwr, "flwr run . -c 'overrides=\"modle=cnn\"'", ConfigError),
        (is_ray, "ray start --haed", click.UsageError),
        (is_installed, "pip install -e '.[swep]'", AssertionError),
    ):
        with pytest.raises(error):
            check(command)


def test_pasted_commands_have_no_placeholders_and_name_what_earlier_ones_made() -> None:
    made = {"client_0", "mine"}
    for command in pasted():
        assert not has_placeholder(command), command
        made |= set(re.findall(r"run_name=(\S+)", command))
        assert set(re.findall(r"~/\.flapp/(?:runs|checkpoints)/(\w+)", command)) <= made, command
    assert "python -m tools.run run_name=mine" in pasted()[:4]


def test_settings_in_tables_and_links_exist() -> None:
    known = setting_types()
    for path, text in PAGES.items():
        for key in re.findall(r"^\| `([\w.]+)=", text, re.MULTILINE):
            assert key in known or (ROOT / "conf" / key).is_dir(), key
        for target in re.findall(r"\]\((?!http)(.*?)\)", text):
            page, _, anchor = target.partition("#")
            linked = path.parent / page if page else path
            assert linked.exists(), f"{path.name} links to {target}"
            heads = re.findall(r"^#+ (.*)", linked.read_text(), re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert not anchor or anchor in anchors, f"{path.name} links to {target}"


def test_the_readme_is_short_and_its_table_has_every_command() -> None:
    readme = PAGES[ROOT / "README.md"]
    assert len(readme.splitlines()) <= 150
    listed = {
        tuple(row) for row in re.findall(r"^\| `flapp (\w+).*?` \| `python -m tools\.(\w+)", readme, re.MULTILINE)
    }
    assert listed == {(name, module) for name, (module, _) in cli.COMMANDS.items()}


def test_configuration_files_are_well_formed() -> None:
    (superlinks,) = map(tomllib.loads, blocks("toml"))
    assert superlinks["superlink"][superlinks["superlink"]["default"]]["address"] == "127.0.0.1:9000"
    (unit,) = blocks("ini")
    units = configparser.ConfigParser(strict=False, interpolation=None)
    units.read_string(unit)
    assert "tools/supernode.py" in units["Service"]["ExecStart"]
    assert all(map(json.loads, blocks("json")))


def test_the_page_of_settings_is_up_to_date_and_explains_each() -> None:
    assert PAGES[configuration.PAGE] == configuration.page(), "run python -m tools.configuration"
    assert "|  |" not in PAGES[configuration.PAGE], "a setting has no comment in conf/config.yaml"


def test_the_tests_that_run_the_attacks_are_there() -> None:
    file, found = "", 0
    pattern = r"`(\w+/test_\w+\.py|test_\w+\.py)?(?:::)?(test_\w+)?`"
    for named, test in re.findall(pattern, PAGES[ROOT / "docs" / "security.md"]):
        file = named or file  # of the name before, if it is left out
        if file:
            text = (ROOT / "tests" / file).read_text()
            assert not test or f"\ndef {test}(" in text, f"{file} has no {test}"
            found += 1
    assert found >= 25


@pytest.mark.skipif(not importlib.util.find_spec("material"), reason="needs mkdocs-material (the extra docs)")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of a user with three runs and an image of a digit; HOME is there, and the working folder too.

    The models are those of the default, so that everything said about them holds. Training is shortened.
    """
    folder = tmp_path_factory.mktemp("user")
    runs = folder / ".flapp" / "runs"
    run_in_process(f"home={folder / '.flapp'}", "run_name=mine", "evaluate.every=20", *SMALL)
    shutil.copytree(runs / "mine", runs / "other")
    run_in_process(f"home={folder / '.flapp'}", "run_name=adapted", *ADAPTED, *SMALL, "num_rounds=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("DB", str(folder / ".flapp/checkpoints/mine/client_0/client_0_chunks.db"))
        patch.chdir(folder)
        (digit,) = [block for block in blocks("python") if "digit.png" in block]
        exec(compile(digit, "export.md", "exec"), {})
        yield folder


def run_in_process(*words: str) -> None:
    nodes = [{"partition-id": i, "num-partitions": 2} for i in range(2)]
    run_app(compose(list(words)), LocalGrid({}, nodes))


@pytest.mark.parametrize(
    "command",
    [each for each in dict.fromkeys([*pasted(), *mentioned()]) if READS_RUNS.match(each) and not has_placeholder(each)],
)
def test_commands_about_the_readers_own_runs_work(user: Path, command: str) -> None:
    _, _, module, *words = words_of(command)
    assert importlib.import_module(module).main(words) == 0


def test_the_variable_of_the_checkpoint_examples_is_the_store_of_a_client(user: Path) -> None:
    (assignment,) = [command for command in pasted() if command.startswith("DB=")]
    assert os.path.expanduser(assignment.removeprefix("DB=")) == os.environ["DB"]
    assert Path(os.environ["DB"]).is_file()


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_every_python_block_runs_by_itself(user: Path, number: int) -> None:
    block = blocks("python")[number]
    if "transformers" in block:
        pytest.importorskip("transformers")
    exec(compile(block, f"Python block {number + 1}", "exec"), {"__name__": "__main__"})


def test_the_page_of_your_own_data_works_from_top_to_bottom(user: Path) -> None:
    done = []
    for language, block in re.findall(r"^```(python|bash)\n(.*?)^```", PAGES[OWN_DATA], re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(compile(block, OWN_DATA.name, "exec"), {})
        for command in block.splitlines() if language == "bash" else ():
            _, _, module, *words = words_of(command)
            if module == "tools.run":
                run_in_process(f"home={user / '.flapp'}", *words, *SMALL, "num_rounds=1", f"run_name=page-{len(done)}")
            else:
                home = [f"home={user / '.flapp'}"] if module == "tools.prepare_data" else []
                assert importlib.import_module(module).main([*words, *home]) == 0
            done.append(module)
    assert {"tools.prepare_data", "tools.run", "tools.verify_data"} <= set(done)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_and_its_report_run_as_pasted_into_a_shell(tmp_path: Path) -> None:
    lines = [command for command in pasted() if re.search(r"run_name=lrs|runs/lrs", command)]
    assert len(lines) == 2
    env = {key: value for key, value in os.environ.items() if key != "FLAPP_HOME"}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = "\n".join(["set -e", f'python() {{ {shlex.quote(sys.executable)} "$@"; }}', *lines])
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr
    assert "lr=0.003" in (tmp_path / "sweep.html").read_text()
    assert list((tmp_path / "figures").glob("*.png"))
