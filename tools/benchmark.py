"""Measure flapp against what people use otherwise, and print each ratio beside its target.

    python -m tools.benchmark round aggregate        some topics
    python -m tools.benchmark all --json OUT         every topic, also as JSON

Ratios are medians of interleaved turns in one process; absolute times are no part of them, machines are noisy.
"""

import argparse
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tools.bench import Row

# each a module of tools.bench with rows() -> list[Row]
TOPICS = ("data", "checkpoint", "lora", "aggregate", "round", "deployment")


def table(rows: list[Row]) -> str:
    """Return the rows as an aligned text table."""
    cells = [("what", "against", "ratio", "target", "", "note")]
    for row in rows:
        sign = "" if row.higher_is_better else "at most "
        verdict = "met" if row.met else "MISSED"
        figures = (f"{row.ratio:.2f}{row.unit}", f"{sign}{row.target:g}{row.unit}")
        cells.append((row.what, row.against, *figures, verdict, row.note))
    widths = [max(len(line[i]) for line in cells) for i in range(6)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def main() -> int:
    """Run the topics asked for; exits 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topics", nargs="+", choices=[*TOPICS, "all"])
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    arguments = parser.parse_args()
    topics = TOPICS if "all" in arguments.topics else arguments.topics
    rows = [row for topic in topics for row in importlib.import_module(f"tools.bench.{topic}").rows()]
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) | {"met": row.met} for row in rows], indent=1))
    return int(not all(row.met for row in rows))


if __name__ == "__main__":
    sys.exit(main())
