"""docs/architecture.md is true of the code: its names exist, and its guides work when followed to the letter."""

import importlib
import json
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
# The packages of others are imported once; each run is a fork of that process, with a checkout of its own.
RUN_EACH = """
import json, os, runpy, sys
import flwr.serverapp, hydra, pydantic, torch, tqdm

for checkout, log, words in json.loads(sys.argv[1]):
    if os.fork() == 0:
        os.chdir(checkout)
        sys.path.insert(0, checkout)
        sys.argv = ["run", *words]
        file = os.open(log, os.O_CREAT | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        try:
            runpy.run_module("tools.run", run_name="__main__")
        except SystemExit:
            sys.stdout.flush()
            os._exit(0)  # a normal exit takes a second to unload PyTorch
    os.wait()
"""
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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home with a run for each guide, by a copy of the code in which only this guide was followed."""
    home, runs = tmp_path_factory.mktemp("guides"), []
    for guide in GUIDES:
        checkout = home / guide
        for folder in ("flapp", "tools", "conf"):
            shutil.copytree(ROOT / folder, checkout / folder)  # with what is compiled
        assert 1 <= len(follow(guide, checkout)) <= 3
        (command,) = re.findall(r"^```sh\npython -m tools.run (.*)\n```", SECTIONS[guide], re.MULTILINE)
        words = [*shlex.split(command), *CHEAP.split(), f"home={home}", f"run_name='{guide}'"]
        runs.append((str(checkout), str(home / f"{guide}.txt"), words))
    subprocess.run([sys.executable, "-P", "-c", RUN_EACH, json.dumps(runs)], check=True, timeout=300)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_works_when_followed_to_the_letter(guide: str, home: Path) -> None:
    assert "finished 1 round in" in (said := (home / f"{guide}.txt").read_text()), said
    assert SIGNS.get(guide, "") in (home / "runs" / guide / "log.txt").read_text()


def test_there_is_a_guide_for_each_kind_of_extension() -> None:
    assert [f"Add a {kind}" for kind in ("dataset", "model", "LoRA rule", "strategy", "client mod")] == GUIDES
