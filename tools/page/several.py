"""The page about one run, several runs or a sweep, and its figures as PNG files."""

import re
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib import rc_context

from tools.cli import count
from tools.page.charts import best_of, by_name, colour_of, compare, pictures_of, swept
from tools.page.drawing import MOST_LINES, STYLE, Picture, themed
from tools.page.markup import Html, document, figures, folded, join, note, section, table, tag, tiles
from tools.page.run import Job, Run, differing
from tools.page.sections import (
    NONE,
    alerts,
    badge,
    brief,
    digits,
    epsilon_of,
    objectives,
    scores_of,
    sections_of,
    setup_of,
    summary_of,
)

MOST_DRAWN = 8  # runs with figures of their own
SHOWN = ("accuracy", "personal_accuracy", "loss")  # objectives that have a column anyway
Pictures = dict[str, Picture]  # by the name of the file


def page_of(runs: list[Run], jobs: list[Job], title: str, *more: Html) -> tuple[str, Pictures]:
    """Return the page about runs, with more sections at its end, and its pictures."""
    now = datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC")
    head = tag("header", tag("h1", title), tag("p", f"{count(len(runs), 'run')}. Written {now}."))
    with rc_context(STYLE):
        body, pictures = page_of_one(runs[0]) if len(runs) == 1 and not jobs else page_of_several(runs, jobs)
        return document(title, head, body, *more), pictures


def write_pngs(folder: Path, pictures: Pictures) -> None:
    """Write every picture as a PNG on white."""
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        for name, picture in pictures.items():
            path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.png"
            picture.figure.savefig(path, format="png", dpi=200, facecolor="white")


def page_of_one(run: Run) -> tuple[Html, Pictures]:
    """Return the page about one run and its pictures by name."""
    drawn = pictures_of(run)
    known = setup_of(run) | summary_of(run) | scores_of(run)
    if epsilon_of(run) is None:
        del known["epsilon"]
    summary = section("Summary", tiles(known.items()), objectives([run]))
    return join([alerts(run), summary, sections_of(run, drawn)]), by_name(drawn)


def page_of_several(runs: list[Run], jobs: list[Job]) -> tuple[Html, Pictures]:
    """Return the page about several runs and its pictures by name."""
    if not runs:
        return join([failed_jobs(jobs), section("Jobs of the sweep", jobs_table(jobs))]), {}
    drawn = [pictures_of(run) for run in runs[:MOST_DRAWN]]
    together, settings = compare(runs), swept(runs)
    common = {key: value for key, value in setup_of(runs[0]).items() if key not in columns_of(runs)}
    details = []
    for run, pictures in zip_longest(runs, drawn):
        inside = sections_of(run, pictures, "h3")
        details.append(folded(f"{run.title}: {run.name}", inside, opened=run.status == "failed"))
    if len(runs) > MOST_DRAWN:
        details.append(note(f"Only the first {MOST_DRAWN} runs have figures here: report the others by themselves."))
    body = [
        failed_jobs(jobs),
        *(alerts(run, f"Run {run.label}: ") for run in runs),
        section("Runs", tiles(common.items()), overview(runs), objectives(runs)),
        section("Jobs of the sweep", jobs_table(jobs)),
        section("Side by side", figures(together), legend(runs)),
        section("By setting", figures(settings), unended(runs) if settings else ""),
        section("Differences", differences(runs)),
        section("Time of a round", phase_table(runs)),
        section("Each run", *details),
    ]
    named = by_name({"": together + settings})
    for run, pictures in zip(runs, drawn, strict=False):
        named |= by_name(pictures, f"{run.label}-")
    return join(body), named


def columns_of(runs: list[Run]) -> list[str]:
    """Return in which of model, dataset, clients and strategy the runs differ."""
    setups = [setup_of(run) for run in runs]
    return [key for key in setups[0] if len({setup[key] for setup in setups}) > 1]


def overview(runs: list[Run]) -> Html:
    own, rows = columns_of(runs), []
    hidden = {"objective"} if all(run.objective in SHOWN for run in runs) else set()
    hidden |= {"epsilon"} if all(epsilon_of(run) is None for run in runs) else set()
    for i, run in enumerate(runs):
        told = [run.differs, run.name, *(setup_of(run)[key] for key in own)]
        found = {key: value for key, value in summary_of(run).items() if key not in hidden}
        patch = tag("span", class_="swatch", style=themed(f"background:{colour_of(runs, i)}"))
        rows.append([join([patch, run.label]), *(tag("div", text, class_="narrow") for text in told), *found.values()])
    first = 4 + len(own)  # behind the status, which is text; the last column is the digest
    return table(["run", "settings", "name", *own, *found], rows, range(first, len(rows[0]) - 1))


def jobs_table(jobs: list[Job]) -> Html:
    rows = [[job.number, job.overrides, badge(job.status), digits(job.objective), job.error] for job in jobs]
    return table(["job", "overrides", "status", "objective", "error"], rows, (3,))


def failed_jobs(jobs: list[Job]) -> Html:
    reasons: dict[str, list[str]] = {}
    for job in jobs:
        if job.status != "finished":
            reasons.setdefault(job.error or job.status, []).append(job.number)
    said = [tag("p", tag("b", f"Job {', '.join(who)}: "), why, class_="error") for why, who in reasons.items()]
    failed = sum(map(len, reasons.values()))
    return join([note(f"{failed} of {count(len(jobs), 'job')} failed."), *said]) if failed else Html()


def legend(runs: list[Run]) -> Html:
    if len(runs) > MOST_LINES:
        best = runs[best_of(runs)].label
        return note(f"Of more than {MOST_LINES} runs only the best by its objective, run {best}, has a colour.")
    return note("A legend names the settings in which a run differs from the others.")


def unended(runs: list[Run]) -> Html:
    """Return how to read the charts of settings, and which runs are not in them."""
    lacking = ", ".join(run.label for run in runs if run.final(run.objective) is None)
    said = "Each dot is a run. The line joins the medians of the values."
    return note(f"{said} Runs without an objective are not drawn: {lacking}." if lacking else said)


def differences(runs: list[Run]) -> Html:
    rows = [[key, *(tag("code", run.config.get(key, NONE)) for run in runs)] for key in differing(runs)]
    same = "The settings are the same." if all(run.config for run in runs) else "Not all settings are known."
    return table(["setting", *(run.label for run in runs)], rows) or note(same)


def phase_table(runs: list[Run]) -> Html:
    """Return the median seconds of each phase of each run."""
    found = {run.label: {name: np.median(seconds) for name, (_, seconds) in run.phases().items()} for run in runs}
    names = list(dict.fromkeys(name for medians in found.values() for name in medians))
    rows = [[label, *(brief(medians.get(name)) for name in names)] for label, medians in found.items()]
    return join([table(["run", *names], rows, range(1, 9)), note("Median seconds.")]) if names else Html()
