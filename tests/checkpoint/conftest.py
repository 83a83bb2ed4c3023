"""What the tests of the checkpoint store share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flapp.checkpoint.manager import ChunkManager


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a store that tools.checkpoints finds, where nothing is yet."""
    return tmp_path / "client_0_chunks.db"


@pytest.fixture
def store(path: Path) -> Iterator[ChunkManager]:
    """Return an open store without rounds."""
    with ChunkManager(path) as manager:
        yield manager
