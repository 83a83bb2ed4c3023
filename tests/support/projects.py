"""Projects of a user's own: a folder with a task.py, and settings that name what is in it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

from flapp import custom
from flapp.config.load import compose, own_choices, project_words
from flapp.config.schema import Config
from tools.new import make


def settings_in(folder: Path, home: Path, *words: str) -> Config:
    """Return the settings of `flapp run WORDS` in a folder."""
    given = [f"home={home}", *words]
    return compose([*project_words(folder, given), *given], folder)


def project(folder: Path, template: str) -> Path:
    """Return the folder of a new project; small, so that a run takes a second."""
    make(folder, template)
    return folder


def write_task(folder: Path, text: str) -> Path:
    """Write the task.py of a folder and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.py").write_text(dedent(text))
    return folder


@contextmanager
def clean_imports() -> Iterator[None]:
    """Forget, when the block ends, the modules and folders of projects."""
    path, modules = list(sys.path), set(sys.modules)
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if getattr(sys.modules[name], "__file__", None) in custom._own_files:
                del sys.modules[name]


__all__ = ["clean_imports", "own_choices", "project", "settings_in", "write_task"]
