"""Expect an error as users shall see it: in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def refused(
    kind: type[BaseException], message: str = ".", path: Path | None = None, longest: int | None = None
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Expect an error of this kind, in one line in which `message`, a regular expression, is found.

    The line must name `path`, if one is given, and have fewer than `longest` characters.
    """
    with pytest.raises(kind, match=message) as caught:
        yield caught
    said = str(caught.value)
    assert "\n" not in said
    assert path is None or str(path) in said
    assert longest is None or len(said) < longest
