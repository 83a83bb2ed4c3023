"""`flapp new` and `flapp run` in a folder of a user's own."""

import compileall
import re
import shutil
from pathlib import Path

import pytest

from flapp.config.load import own_choices, project_words
from flapp.config.schema import ConfigError
from tests.support.commands import run_here
from tests.support.projects import new_project, settings_in
from tests.tools.conftest import Refusal
from tools import new

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["Mine", "1st", "my-model", "tools", "digits", "digits_fedavg", "task"])
def test_a_name_that_does_not_fit_is_refused_and_nothing_is_made(name: str, tmp_path: Path, refusal: Refusal) -> None:
    assert name in refusal(new.main, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "mine").mkdir()
    assert "exists" in refusal(new.main, tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_compiled_files_of_an_installed_flapp_are_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(new.TEMPLATES, tmp_path / "templates")
    assert compileall.compile_dir(tmp_path / "templates", quiet=1)
    monkeypatch.setattr(new, "TEMPLATES", tmp_path / "templates")
    project = new_project(tmp_path / "mine", "text")
    files = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    assert files == {"task.py", "conf/experiment/mine.yaml", "README.md", "pyproject.toml"}


def test_a_project_asks_for_no_package_of_another_publisher(tmp_path: Path) -> None:
    text = (new_project(tmp_path / "mine", "vision") / "pyproject.toml").read_text()
    assert re.search(r"^dependencies = \[\]", text, re.MULTILINE)


def test_the_page_shows_the_template_as_it_is(tmp_path: Path) -> None:
    task = (new_project(tmp_path / "mine", "vision") / "task.py").read_text()
    assert f"```python\n{task}```" in (DOCS / "own_model.md").read_text()


@pytest.mark.slow
def test_the_commands_of_the_page_work_in_a_new_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags may stand before, between and after settings."""
    assert new.main([str(tmp_path / "mine")]) == 0
    monkeypatch.setenv("FLAPP_HOME", str(tmp_path))
    small = ("clients=2", "num_rounds=1", "train.steps=1", "evaluate.personal_epochs=0", "deployment.workers=0")
    for folder, said, words in (
        ("mine", "finished", ("run_name=kwargs", "-m", "model.kwargs.width=4,8")),
        ("mine", "finished", ("run_name=adapted", "lora=default", "strategy=fedlora", "lora.targets=[conv2,head]")),
        ("mine", "task:build_model", ("--cfg", "job")),
        (".", "finished", (f"code={tmp_path / 'mine'}", "experiment=mine")),
    ):
        monkeypatch.chdir(tmp_path / folder)
        assert run_here(*words, *small) == 0
        assert said in capsys.readouterr().out
    assert (tmp_path / "runs" / "kwargs" / "1" / "model.safetensors").exists()


def test_settings_of_other_projects_are_left_alone_and_damaged_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("a: 1")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    assert own_choices([tmp_path]) == []
    assert project_words(tmp_path, []) == []
    project = new_project(tmp_path / "mine", "vision")
    assert project_words(project, ["experiment=other"]) == []
    clash = project / "conf" / "model" / "cnn.yaml"
    clash.parent.mkdir()
    clash.write_text("name: linear")
    with pytest.raises(ConfigError, match=re.escape(str(clash))):
        own_choices([project])
    (project / "pyproject.toml").write_text("x = [")
    with pytest.raises(ConfigError, match=r"pyproject\.toml is not TOML"):
        project_words(project, [])


def test_a_folder_may_have_a_quote_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "it's, {mine}").mkdir()
    project = new_project(tmp_path / "it's, {mine}" / "mine", "vision")
    assert settings_in(project, tmp_path).experiment == "mine"
