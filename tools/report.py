"""Write one HTML page about one run, several runs or a sweep. It needs no network and no other file.

    python -m tools.report RUN_DIR --out report.html                 curves, classes, bytes, time, stores, failures
    python -m tools.report RUN_DIR RUN_DIR --out report.html         ... of each run, and a comparison
    python -m tools.report SWEEP_DIR --out report.html --png FIGURES ... of a sweep, with the figures as PNG files
    python -m tools.report RUN_DIR --benchmark benchmark.json        ... with the results of tools.benchmark --json

RUN_DIR is a folder below home/runs; SWEEP_DIR is a folder of runs. Nothing is written to them. If a run did not record
something, the page says so. Exits 0, or 1 with one line on standard error.
"""

import re
import sys
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from matplotlib import rc_context

from flapp.files import write_bytes
from tools.checkpoints import count
from tools.cli import as_called, new_parser
from tools.page.charts import by_name, pictures_of
from tools.page.drawing import STYLE, Picture
from tools.page.markup import Html, document, join, section, tag, tiles
from tools.page.reading import ReportError, read_all
from tools.page.run import Job, Run
from tools.page.sections import alerts, benchmarks, epsilon_of, objectives, scores_of, sections_of, setup_of, summary_of
from tools.page.several import page_of_several

Pictures = dict[str, Picture]  # by the name of the file


def page_of(runs: list[Run], jobs: list[Job], title: str, *more: Html) -> tuple[str, Pictures]:
    """Return the page about runs, with more sections at its end, and its pictures."""
    now = datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC")
    head = tag("header", tag("h1", title), tag("p", f"{count(len(runs), 'run')}. Written {now}."))
    with rc_context(STYLE):
        if len(runs) != 1 or jobs:
            body, pictures = page_of_several(runs, jobs)
        else:
            drawn = pictures_of(runs[0])
            known = setup_of(runs[0]) | summary_of(runs[0]) | scores_of(runs[0])
            if epsilon_of(runs[0]) is None:
                del known["epsilon"]
            facts = tiles(known.items())
            summary = section("Summary", facts, objectives(runs))
            body, pictures = join([alerts(runs[0]), summary, sections_of(runs[0], drawn)]), by_name(drawn)
        return document(title, head, body, *more), pictures


def export(folder: Path, pictures: Pictures) -> None:
    """Write every picture as a PNG on white."""
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        for name, picture in pictures.items():
            path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.png"
            picture.figure.savefig(path, format="png", dpi=200, facecolor="white")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page that the command line asks for; returns the exit status."""
    parser = new_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--png", type=Path, metavar="DIR", help="also write the figures as PNG files")
    parser.add_argument("--benchmark", type=Path, metavar="JSON", help="also show a file of tools.benchmark --json")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the browser has fonts for missing glyphs
    try:
        if not given.out.absolute().parent.is_dir():
            raise ReportError(f"there is no folder for {given.out}: make it first")
        runs, jobs = read_all(given.runs)
        more = [benchmarks(given.benchmark)] if given.benchmark else []
        title = given.runs[0].absolute().name if len(given.runs) == 1 else f"{len(runs)} runs"
        html, pictures = page_of(runs, jobs, runs[0].name if len(runs) == 1 else title, *more)
        write_bytes(given.out, html.encode(errors="replace"))  # some paths are not valid UTF-8
        if given.png:
            export(given.png, pictures)
    except (ReportError, OSError) as error:
        said = f"{error.filename} cannot be used ({error.strerror})" if isinstance(error, OSError) else error
        print(as_called(f"error: {said}"), file=sys.stderr)
        return 1
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
