"""The section of the report that shows what tools.benchmark wrote as JSON."""

from dataclasses import fields
from pathlib import Path

from flapp.untrusted import read_json
from tools.bench import HEADS, Row
from tools.page.markup import Html, facts, note, section, table, tag
from tools.page.reading import ReportError

STATUS = {"met": "finished", "within limit": "unfinished"}  # by verdict, a class of page.css; any other is bad


def benchmark_section(path: Path) -> Html:
    """Return the table and the machine; raises ReportError when the file is not of tools.benchmark."""
    try:
        found = read_json(path)
        rows = [cells_of(Row(**{field.name: row[field.name] for field in fields(Row)})) for row in found["rows"]]
        machine = facts(found["machine"].items())
        took = f"Measured in {found['seconds']:.0f} s, ratios by medians of interleaved turns."
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        raise ReportError(f"{path} is not of tools.benchmark: write it with its --json") from None
    return section("Benchmarks", table(HEADS, rows, (2, 3, 4)), note(took), machine)


def cells_of(row: Row) -> list[object]:
    cells: list[object] = list(row.cells())
    cells[HEADS.index("verdict")] = tag("span", row.verdict, class_=f"status {STATUS.get(row.verdict, 'failed')}")
    return cells
