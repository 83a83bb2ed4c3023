"""What the tests of all tools share."""

from collections.abc import Callable

import pytest

Refusal = Callable[..., str]  # what the fixture `refusal` gives


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Return a function that runs a tool, which must fail with one line of error, and returns that line.

    has_begun: it prints what it has done before it fails; otherwise nothing.
    """

    def refuse(main: Callable[[list[str]], int], *words: object, has_begun: bool = False) -> str:
        capsys.readouterr()
        assert main([*map(str, words)]) == 1
        printed, said = capsys.readouterr()
        assert bool(printed) == has_begun
        (line,) = said.splitlines()
        assert line.startswith("error: ")
        return line

    return refuse
