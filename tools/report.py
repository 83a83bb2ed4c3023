"""Write one HTML page about one run, several runs or a sweep. It needs no network and no other file.

    python -m tools.report RUN_DIR --out report.html                 curves, classes, bytes, time, stores, failures
    python -m tools.report RUN_DIR RUN_DIR --out report.html         ... of each run, and a comparison
    python -m tools.report SWEEP_DIR --out report.html --png FIGURES ... of a sweep, with the figures as PNG files
    python -m tools.report RUN_DIR --benchmark benchmark.json        ... with the results of tools.benchmark --json

RUN_DIR is a folder below home/runs; SWEEP_DIR is a folder of runs. Nothing is written to them. If a run did not record
something, the page says so. Exits 0, or 1 with one line on standard error.
"""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from flapp.files import write_bytes
from tools.cli import errors_in_one_line, new_parser
from tools.page.reading import ReportError, read_all


@errors_in_one_line(ReportError, OSError)
def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page that the command line asks for."""
    parser = new_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--png", type=Path, metavar="DIR", help="also write the figures as PNG files")
    parser.add_argument("--benchmark", type=Path, metavar="JSON", help="also show a file of tools.benchmark --json")
    given = parser.parse_args(arguments)
    if not (folder := given.out.absolute().parent).is_dir():
        raise ReportError(f"the folder {folder} does not exist: make it first")
    runs, jobs = read_all(given.runs)
    from tools.page import sections, several  # imports Matplotlib

    warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the browser has fonts for missing glyphs
    more = [sections.benchmarks(given.benchmark)] if given.benchmark else []
    title = given.runs[0].absolute().name if len(given.runs) == 1 else f"{len(runs)} runs"
    html, pictures = several.page_of(runs, jobs, runs[0].name if len(runs) == 1 else title, *more)
    write_bytes(given.out, html.encode(errors="replace"))  # some paths are not valid UTF-8
    if given.png:
        several.write_pngs(given.png, pictures)
    print(given.out)


if __name__ == "__main__":
    sys.exit(main())
