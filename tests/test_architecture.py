"""docs/architecture.md is true of the code: its names exist, and its guides work when followed to the letter."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
SECTIONS = {text.partition("\n")[0]: text for text in re.split(r"^##+ ", PAGE, flags=re.MULTILINE)[1:]}
GUIDES = [title for title in SECTIONS if title.startswith("Add a ")]
STEP = re.compile(r"^\d\. (Create|Append to|In) `(.*?)`.*?^    ```\w+\n(.*?)^    ```", re.DOTALL | re.MULTILINE)
SIGNS = {
    "Add a client mod": "sends 2 tensors"
}  # in the log of the run, where its success alone does not prove the change
RUN_ALL = """
import json, sys
from tools import run

for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    if run.main():
        sys.exit(f"failed: {words}")
"""  # in one process, because starting takes longer than a run
CHEAP = "train.steps=1 train.batch_size=2 evaluate.personal_epochs=0 checkpoint=off deployment.workers=0"


def resolve(name: str) -> object:
    """Import a dotted name: a module, and what it holds."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def test_every_step_of_the_walk_of_an_update_is_a_function() -> None:
    steps = re.findall(r"^\d+\. `(flapp\.[\w.]+)`", SECTIONS["The walk of an update"], re.MULTILINE)
    assert 10 < len(steps) <= 20
    assert all(callable(resolve(step)) for step in steps)


def test_every_name_in_the_text_exists() -> None:
    text = "\n".join(SECTIONS[title] for title in SECTIONS if title not in GUIDES)
    for name in re.findall(r"`((?:flapp|tools)\.[\w.]+)`", text):
        resolve(name)
    for path in re.findall(r"`((?:flapp|tools|conf|tests|docs)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


def follow(guide: str, checkout: Path) -> set[str]:
    """Apply the steps of a guide to a copy of the code, and return the files that they touch."""
    touched = set()
    for verb, name, indented in STEP.findall(SECTIONS[guide]):
        path, block = checkout / name, textwrap.dedent(indented)
        touched.add(name)
        if verb == "Create":
            assert not path.exists()
            path.write_text(block)
        elif verb == "Append to":
            path.write_text(f"{path.read_text()}\n\n{block}")
        else:
            for hunk in block.split("@@\n"):
                lines = hunk.splitlines(keepends=True)
                before = "".join(line[1:] for line in lines if line[0] in " -")
                after = "".join(line[1:] for line in lines if line[0] in " +")
                text = path.read_text()
                assert text.count(before) == 1, f"{name} has not exactly one place for:\n{hunk}"
                path.write_text(text.replace(before, after))
    return touched


@pytest.mark.slow
def test_the_guides_work_when_followed_to_the_letter(tmp_path: Path, data_home: Path) -> None:
    checkout, commands = tmp_path / "checkout", []
    for folder in ("flapp", "tools", "conf"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for guide in GUIDES:
        assert 1 <= len(follow(guide, checkout)) <= 3
        (command,) = re.findall(r"^```sh\npython -m tools.run (.*)\n```", SECTIONS[guide], re.MULTILINE)
        commands.append([*shlex.split(command), *CHEAP.split(), f"home={data_home}", f"run_name={guide}"])
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    python = [sys.executable, "-c", RUN_ALL, json.dumps(commands)]
    done = subprocess.run(python, cwd=checkout, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished 1 round in") == len(GUIDES)
    for guide in GUIDES:
        assert SIGNS.get(guide, "") in (data_home / "runs" / guide / "log.txt").read_text()


def test_there_is_a_guide_for_each_kind_of_extension() -> None:
    assert [f"Add a {kind}" for kind in ("dataset", "model", "LoRA rule", "strategy", "client mod")] == GUIDES
