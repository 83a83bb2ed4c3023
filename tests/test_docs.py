"""What the pages in docs/ refer to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = (ROOT / "docs" / "security.md").read_text()
NAMED = re.findall(r"`(\w+/test_\w+\.py|test_\w+\.py)?(?:::)?(test_\w+)?`", TABLE)


def named_tests() -> list[tuple[str, str]]:
    """Return (file, test) of every test that the page names; the file is that of the name before it, if left out."""
    found, file = [], ""
    for named, test in NAMED:
        file = named or file
        if file:
            found.append((file, test))
    return found


@pytest.mark.parametrize(("file", "test"), named_tests())
def test_the_tests_that_run_the_attacks_are_there(file: str, test: str) -> None:
    text = (ROOT / "tests" / file).read_text()
    assert not test or f"\ndef {test}(" in text


def test_the_table_names_tests() -> None:
    assert len(named_tests()) > 25
