"""The text in README.md, CONTRIBUTING.md and docs/ is true: Python blocks run as pasted, commands are run or parsed.

A command that no line of CHECKS in support/doc_commands.py knows fails: whoever adds one says there how it is checked.
"""

import configparser
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from flapp.config.load import ConfigError, compose
from flapp.config.plain import setting_types
from tests.support.commands import run_here
from tests.support.doc_commands import (
    CHECKS,
    PAGES,
    ROOT,
    blocks,
    composes,
    has_placeholder,
    is_flwr,
    is_installed,
    is_parsed,
    is_ray,
    is_superlink,
    is_supernode,
    mentioned,
    pasted,
    words_of,
)
from tests.support.own_runs import run
from tools import cli, configuration

OWN_DATA = ROOT / "docs" / "own_data.md"
READS_RUNS = re.compile(
    r"python -m tools\.(report|checkpoints|split_model|verify_data|predict|export) "
    r"(?!.*(--benchmark|runs/lrs|data/pets))"
)
SMALL = ("clients=2", "train.steps=1", "train.batch_size=2", "evaluate.personal_epochs=0")
ADAPTED = ("strategy=fedlora", "lora=default", "model.channels=3")


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    run(compose([f"home={folder / '.flapp'}", "run_name=mine", "evaluate.every=20", *SMALL]))
    shutil.copytree(runs / "mine", runs / "other")
    run(compose([f"home={folder / '.flapp'}", "run_name=adapted", *ADAPTED, *SMALL, "num_rounds=1"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("DB", str(folder / ".flapp/checkpoints/mine/client_0/client_0_chunks.db"))
        patch.chdir(folder)
        (digit,) = [block for block in blocks("python") if "digit.png" in block]
        exec(compile(digit, "export.md", "exec"), {})
        yield folder


@pytest.mark.slow
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
    for command in pasted():  # those that write what the block reads, unless a test above has run them
        out = command.partition(" --out ")[2]
        if out and re.search(rf'[":]{re.escape(out)}["/]', block) and not Path(out).exists():
            _, _, module, *words = words_of(command)
            assert importlib.import_module(module).main(words) == 0
    exec(compile(block, f"Python block {number + 1}", "exec"), {"__name__": "__main__"})


@pytest.mark.slow
def test_the_page_of_your_own_data_works_from_top_to_bottom(user: Path) -> None:
    done = []
    for language, block in re.findall(r"^```(python|bash)\n(.*?)^```", PAGES[OWN_DATA], re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(compile(block, OWN_DATA.name, "exec"), {})
        for command in block.splitlines() if language == "bash" else ():
            _, _, module, *words = words_of(command)
            if module == "tools.run":
                words += [f"home={user / '.flapp'}", *SMALL, "num_rounds=1", f"run_name=page-{len(done)}"]
                run(compose(words))
            else:
                home = [f"home={user / '.flapp'}"] if module == "tools.prepare_data" else []
                assert importlib.import_module(module).main([*words, *home]) == 0
            done.append(module)
    assert {"tools.prepare_data", "tools.run", "tools.verify_data"} <= set(done)


@pytest.mark.slow
def test_a_sweep_and_its_report_run_as_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the rounds and the processes are fewer than in the page."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLAPP_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    sweep, shown = [words_of(command) for command in pasted() if re.search(r"run_name=lrs|runs/lrs", command)]
    assert sweep[:3] == ["python", "-m", "tools.run"]
    assert run_here(*sweep[3:], "num_rounds=2", "deployment.workers=0", *SMALL) == 0
    assert importlib.import_module(shown[2]).main(shown[3:]) == 0
    assert "lr=0.003" in (tmp_path / "sweep.html").read_text()
    assert list((tmp_path / "figures").glob("*.png"))
