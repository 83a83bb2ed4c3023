"""metrics.csv: a row a round with the numbers of its lines in metrics.jsonl, for spreadsheets and data frames.

The columns are the same in every run, named <kind>_<key>; what a round has not measured is empty.
"""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flapp.server.stopwatch import PHASES

EXCHANGE = ("asked", "replies", "absent", "failures", "bytes_down", "bytes_up", "seconds")
MEASURED = ("loss", "accuracy", "personal_loss", "personal_accuracy")
NAMES = {
    "train": ("loss", "aggregation_error", *EXCHANGE),
    "evaluate": (*MEASURED, *(f"val_{figure}" for figure in MEASURED), *EXCHANGE),
    "central": ("loss", "accuracy"),
    "round": ("seconds", *(f"phases_{phase}" for phase in PHASES), "store_bytes", "store_stored", "store_total"),
}
COLUMNS = ["round", "time", *(f"{kind}_{name}" for kind, names in NAMES.items() for name in names)]


def scalars(line: Mapping[str, Any], separator: str) -> dict[str, float]:
    """Return the numbers of a line as <kind><separator><key>: of lists their length, of phases, store and spreads all.

    What a line says client by client is left out.
    """
    found: dict[str, Any] = {}
    for key, value in line.items():
        if key in ("phases", "store") or key.endswith("_spread"):
            found |= {key + separator + name: inner for name, inner in value.items()}
        elif key not in ("round", "time"):
            found[key] = len(value) if isinstance(value, list) else value
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
    return {f"{line['kind']}{separator}{key}": value for key, value in numbers.items()}


class MetricsCsv:
    """Write metrics.csv at `path`, a row whenever a round is over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._row: dict[str, Any] = {}

    def add(self, line: Mapping[str, Any]) -> None:
        """Take a line of metrics.jsonl; the line `round` is a round's last."""
        if line["round"] != self._row.get("round"):
            self._row = {}
        self._row |= _cells(line)
        if line["kind"] == "round":
            new = not self.path.exists()
            with self.path.open("a", newline="") as file:
                file.write(_text([self._row], new))

    def rewrite(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows of these lines in place of all that is there."""
        rows: dict[int, dict[str, Any]] = {}
        for line in lines:
            if line["round"] and line["kind"] in NAMES:  # others may be of a later start
                rows.setdefault(line["round"], {}).update(_cells(line))
        partial = self.path.with_name(self.path.name + ".tmp")
        partial.write_text(_text(rows.values(), True), newline="")
        os.replace(partial, self.path)


def _cells(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"round": line["round"], "time": line["time"]} | scalars(line, "_")


def _text(rows: Iterable[Mapping[str, Any]], header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
