"""Projects of a user's own: a folder with a task.py, and the settings of a command given there."""

from pathlib import Path
from textwrap import dedent

from flapp.config.load import compose, expand_words, project_words
from flapp.config.schema import Config
from tools.new import make


def new_project(folder: Path, template: str) -> Path:
    """Make a project and return its folder."""
    make(folder, template)
    return folder


def settings_in(folder: Path, home: Path, *words: str) -> Config:
    """Return the settings of `flapp run WORDS` in a folder."""
    given = expand_words([f"home={home}", *words])
    return compose([*project_words(folder, given), *given], folder)


def write_task(folder: Path, text: str) -> Path:
    """Write the task.py of a folder and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.py").write_text(dedent(text))
    return folder
