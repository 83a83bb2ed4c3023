"""Write one HTML page about one run, several runs or a sweep, which needs no network and no other file.

    python -m tools.report RUN_DIR --out report.html                 curves, classes, bytes, time, stores, failures
    python -m tools.report RUN_DIR RUN_DIR --out report.html         ... of each, and what they differ in
    python -m tools.report SWEEP_DIR --out report.html --png FIGURES ... of a sweep, and its figures as PNG too

RUN_DIR is a folder below home/runs; SWEEP_DIR is one whose folders are runs. Nothing in them is written. What a run
does not record is said in the page. Exits 0, or 1 with one line on standard error.
"""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from matplotlib import rc_context

from tools.checkpoints import count
from tools.page.charts import colour_of, compare, pictures_of, swept
from tools.page.drawing import MOST_LINES, STYLE, Picture
from tools.page.markup import Html, document, facts, figures, folded, join, note, section, table, tag
from tools.page.reading import ReportError, read_all
from tools.page.run import Job, Run, differing
from tools.page.sections import NONE, alerts, digits, sections_of, summary_of

MOST_DRAWN = 12  # runs with figures of their own
NOT_DRAWN: dict[str, list[Picture]] = {key: [] for key in ("learning", "classes", "traffic", "time", "stores")}


def page_of(runs: list[Run], jobs: list[Job], title: str) -> tuple[str, dict[str, Picture]]:
    """Return the page about runs, and its pictures by the name of their file."""
    with rc_context(STYLE):
        drawn = [pictures_of(run) if i < MOST_DRAWN else NOT_DRAWN for i, run in enumerate(runs)]
        if len(runs) == 1 and not jobs:
            body, shared = page_of_one(runs[0], drawn[0])
        else:
            body, shared = page_of_many(runs, jobs, drawn)
        now = datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC")
        head = tag("header", tag("h1", title), tag("p", f"{count(len(runs), 'run')}. Written {now}."))
        html = document(title, head, body)
    pictures = {picture.name: picture for picture in shared}
    for run, sections in zip(runs, drawn, strict=True):
        start = f"{run.label}-" if len(runs) > 1 else ""
        pictures |= {f"{start}{picture.name}": picture for found in sections.values() for picture in found}
    return html, pictures


def page_of_one(run: Run, drawn: dict[str, list[Picture]]) -> tuple[Html, list[Picture]]:
    """Return the page of one run, which is compared with none."""
    return join([alerts(run), section("Summary", facts(summary_of(run).items())), sections_of(run, drawn)]), []


def page_of_many(runs: list[Run], jobs: list[Job], drawn: list[dict[str, list[Picture]]]) -> tuple[Html, list[Picture]]:
    """Return the page of several runs and the pictures that compare them."""
    together = compare(runs) if runs else []
    by_setting = swept(runs) if runs and jobs else []
    rest = len(runs) - MOST_DRAWN
    parts = [
        *(alerts(run, f"Run {run.label}: ") for run in runs),
        section("Runs", overview(runs)),
        section("Jobs of the sweep", jobs_table(jobs)),
        section("Side by side", figures(together), legend(runs)),
        section("By setting", figures(by_setting), unended(runs) if by_setting else ""),
        section("Differences", differences(runs)),
        section("Time of a round", phase_table(runs)),
        section("Each run", *(one_of_many(run, found) for run, found in zip(runs, drawn, strict=True))),
        note(f"Figures of the last {rest} runs are left out: report them alone.") if rest > 0 else "",
    ]
    return join(parts), together + by_setting


def overview(runs: list[Run]) -> Html:
    named = [summary_of(run) for run in runs]
    rows = [[swatch(runs, i), runs[i].name, *found.values()] for i, found in enumerate(named)]
    return table(["run", "name", *named[0]], rows, range(3, 12)) if rows else Html()


def swatch(runs: list[Run], index: int) -> Html:
    """Return a run's label behind a patch of its colour."""
    patch = tag("span", class_="swatch", style=f"background:{colour_of(runs, index)}")
    return join([patch, runs[index].label])


def jobs_table(jobs: list[Job]) -> Html:
    rows = [
        [job.number, job.overrides, tag("span", job.status, class_=f"status {job.status}"), digits(job.objective)]
        + [job.error or NONE]
        for job in jobs
    ]
    return table(["job", "overrides", "status", "objective", "error"], rows, (3,))


def legend(runs: list[Run]) -> Html:
    if len(runs) <= MOST_LINES:
        return note("Runs are called as in the first column of the table.")
    return note(f"More than {MOST_LINES} runs: the best by its objective is in colour, the others are grey.")


def unended(runs: list[Run]) -> Html:
    lacking = [run.label for run in runs if run.final(run.objective) is None]
    return note(f"Without an objective, so not drawn: {', '.join(lacking)}.") if lacking else Html()


def differences(runs: list[Run]) -> Html:
    keys = differing(runs)
    if not keys:
        return note("The settings are the same." if all(run.config for run in runs) else "The settings are not known.")
    rows = [[key, *(tag("code", run.config.get(key, NONE)) for run in runs)] for key in keys]
    return table(["setting", *(run.label for run in runs)], rows)


def phase_table(runs: list[Run]) -> Html:
    """Return the median seconds of each phase of each run."""
    found = [run.phases() for run in runs]
    names = list(dict.fromkeys(name for phases in found for name in phases))
    rows = []
    for run, phases in zip(runs, found, strict=True):
        middles = [f"{np.median(phases[name][1]):.3g}" if name in phases else NONE for name in names]
        rows.append([run.label, *middles])
    return table(["run", *(f"{name}, median s" for name in names)], rows, range(1, 9)) if names else Html()


def one_of_many(run: Run, drawn: dict[str, list[Picture]]) -> Html:
    return folded(f"{run.label}: {run.name}", sections_of(run, drawn, "h3"))


def write(out: Path, html: str) -> None:
    """Write the page at once."""
    partial = out.with_name(f".{out.name}.tmp")
    partial.write_text(html)
    os.replace(partial, out)


def export(folder: Path, pictures: dict[str, Picture]) -> None:
    """Write every picture as a PNG on white."""
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        for name, picture in pictures.items():
            path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.png"
            picture.figure.savefig(path, format="png", dpi=200, facecolor="white")


def main(arguments: Sequence[str] | None = None) -> int:
    """Report the runs that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--png", type=Path, metavar="DIR", help="the figures as PNG files, too")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the browser has fonts for them
    try:
        runs, jobs = read_all(given.runs)
        title = runs[0].name if len(runs) == 1 else given.runs[0].absolute().name if len(given.runs) == 1 else "Runs"
        html, pictures = page_of(runs, jobs, title)
        write(given.out, html)
        if given.png:
            export(given.png, pictures)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
