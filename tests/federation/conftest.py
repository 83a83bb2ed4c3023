"""Fixtures of the tests with code of a user's own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.own_runs import TASK
from tests.support.projects import write_task


@pytest.fixture(autouse=True)
def imports() -> Iterator[None]:
    """Forget the folders of projects afterwards."""
    before = list(sys.path)
    yield
    sys.path[:] = before
    for name in ("task", "network", "texts", "rows", "bert", "mods", "helper"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_task(tmp_path / "mine", TASK)
