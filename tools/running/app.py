"""The folder of the Flower app that runs are started from."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flapp.config.load import CONF, PACKAGE

APP = PACKAGE.parent  # what flapp and tools are imported from: the checkout, or site-packages
SHIPPED = ("pyproject.toml", "README.md")  # a wheel has them in the package, beside conf/


@contextmanager
def app_folder() -> Iterator[Path]:
    """Give a folder with pyproject.toml, flapp/ and conf/: the checkout, or a temporary copy of an installed wheel."""
    if CONF.parent != PACKAGE:
        yield APP
        return
    with tempfile.TemporaryDirectory(prefix="flapp-app-") as made:
        folder = Path(made)
        shutil.copytree(PACKAGE, folder / "flapp", ignore=shutil.ignore_patterns("__pycache__", "conf", *SHIPPED))
        shutil.copytree(CONF, folder / "conf")
        for name in SHIPPED:
            shutil.copy(PACKAGE / name, folder)
        yield folder
