"""The report says what runs did in one page that needs nothing else, and says what it has not found."""

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.chromium import Chromium, needs_chromium
from tests.run_files import MODEL_BYTES, add_store, write_run
from tools import report
from tools.page import reading, several
from tools.page.charts import by_traffic
from tools.page.drawing import PALETTE, grouped
from tools.page.sections import ranges

VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """What a page holds: its text, its pictures, what it would fetch, and tags that were left open."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text()
        self.said, self.alts, self.fetched, self.open = "", [], [], []
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.fetched += [v for k, v in values.items() if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        assert tag != "script"
        assert not [key for key in values if key.startswith("on")]
        if tag == "svg":
            assert values["role"] == "img"
            self.alts.append(values["aria-label"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.said += data + " "


def report_on(out: Path, *runs: Path) -> Page:
    assert report.main([*map(str, runs), "--out", str(out)]) == 0
    return Page(out)


def write_sweep(path: Path, jobs: int = 4) -> Path:
    outcomes = []
    for job in range(jobs):
        run = path / str(job)
        write_run(run, 3, 3, 4, seed=job // 2, train={"lr": (0.1, 0.01)[job % 2]}, run_name=f"{path.name}/{job}")
        outcomes.append({"job": job, "overrides": f"seed={job // 2}", "status": "finished", "objective": 0.9})
    failed = {"job": jobs, "overrides": "train.lr=-1", "status": "failed", "error": "train.lr=-1 must be > 0 <b>"}
    (path / "sweep.json").write_text(json.dumps([*outcomes, failed]))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home with a whole run, its stores and those of its clients."""
    home = tmp_path_factory.mktemp("home")
    run = write_run(home / "runs" / "whole", rounds=6, clients=4)
    add_store(run / "server_chunks.db", 6)
    for client in range(4):
        add_store(home / "checkpoints" / "whole" / f"client_{client}" / f"client_{client}_chunks.db", 6)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "stop", "round": 6, "time": 7, "metric": "accuracy", "best_round": 5, "patience": 1}\n')
    return home


@pytest.fixture(scope="module")
def whole(home: Path) -> Page:
    return report_on(home / "whole.html", home / "runs" / "whole")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a sweep of four runs and a job that failed."""
    folder = tmp_path_factory.mktemp("sweep")
    out = folder / "sweep.html"
    report_on(out, write_sweep(folder / "runs" / "four"))
    return out


def test_a_page_needs_nothing_else_and_describes_every_picture(whole: Page, sweep: Path) -> None:
    for page in (whole, Page(sweep)):
        assert page.open == []
        assert [url for url in page.fetched if not url.startswith("data:")] == []
        assert len(page.alts) > 10
        assert all(re.search(r"\d", alt) for alt in page.alts)
        assert not re.search(r"url\((?!#)|@import", page.html)


def test_a_whole_run_is_shown_from_curves_to_digests(whole: Page) -> None:
    pictures = " ".join(whole.alts)
    for title in ("Accuracy. global", "Loss. global", "Accuracy over clients", "Samples by client and class"):
        assert title in pictures
    for title in ("Bytes of a round", "Bytes so far", "Time by phase", "The server's store"):
        assert title in pictures
    assert "on the server" not in pictures
    for words in ("best, selected", "configure", "aggregate", "The phases add up to 99.0% of", "patience is 1"):
        assert words in whole.said
    assert "m" * 64 in whole.said
    assert "c" * 64 in whole.said
    assert "not recorded" in whole.said.partition("source")[2]


def test_every_colour_follows_light_and_dark(sweep: Path) -> None:
    style, _, body = sweep.read_text().partition("</style>")
    assert not [light for light, _ in PALETTE.values() if light in body]
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", style + body))
    assert {"--c0", "--ink", "--page", "--bad"} <= used
    for name in used:
        assert style.count(f"{name}:#") == 2, name


def test_nothing_is_written_into_what_is_reported(home: Path, tmp_path: Path) -> None:
    def state() -> list[tuple[str, int, str]]:
        files = sorted(path for path in home.rglob("*") if path.is_file())
        return [(str(f), f.stat().st_mtime_ns, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]

    before = state()
    report_on(tmp_path / "out.html", home / "runs" / "whole")
    assert state() == before


def test_stores_are_added_up_and_a_sample_is_called_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = reading.read_run(home / "runs" / "whole")
    assert run.server is not None
    assert (run.server.rounds, run.server.logical_bytes, run.server.stored_bytes) == (2, 80_000, 60_000)
    assert run.homes is not None
    assert (run.homes.files, run.homes.opened, run.homes.rounds) == (4, 4, 8)
    monkeypatch.setattr(reading, "STORES_OPENED", 2)
    sampled = reading.read_run(home / "runs" / "whole").homes
    assert sampled is not None
    assert (sampled.files, sampled.opened, sampled.file_bytes) == (4, 2, run.homes.file_bytes)


def test_a_store_that_cannot_be_read_or_is_being_written_is_said_in_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "r", rounds=1, classes=0, old=True)
    (run / "server_chunks.db").write_bytes(b"no database" * 100)
    assert "Not read: " in report_on(tmp_path / "r.html", run).said
    (run / "server_chunks.db").unlink()
    add_store(run / "server_chunks.db", 1)
    (run / "server_chunks.db-journal").write_bytes(b"hot")
    assert "it has a journal" in report_on(tmp_path / "r.html", run).said
    assert (run / "server_chunks.db-journal").read_bytes() == b"hot"


def test_a_run_that_has_only_a_config_says_what_it_lacks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "empty", rounds=1, status=None)
    (run / "metrics.jsonl").unlink()
    page = report_on(tmp_path / "empty.html", run)
    for words in ("No round has begun", "metrics.jsonl cannot be read", "Nothing has been evaluated"):
        assert words in page.said
    for words in ("No bytes are recorded", "No times are recorded", "store is not in the run", "model not recorded"):
        assert words in " ".join(page.said.split())
    assert page.alts == []


def test_a_crashed_run_shows_its_error_first_its_log_last_and_the_lines_that_are_whole(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "crashed", rounds=3, classes=0, status="failed")
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines[: lines.rindex("{") + 30])
    (run / "log.txt").write_text("the beginning\n" + "\x1b[91mline\x1b[0m\n" * 100 + "ValueError: <x>\n")
    page = report_on(tmp_path / "crashed.html", run)
    assert page.said.index("1 of 3 clients gave") < page.said.index("Summary")
    assert "ValueError: <x>" in page.said.partition("Digests")[2]
    assert "\x1b" not in page.said
    assert "the beginning" not in page.said
    assert "was cut off" in page.said


def test_a_running_run_says_where_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "running", rounds=2, classes=0, status=None)
    progress = {"round": 3, "rounds": 9, "phase": "train", "replies": 1, "asked": 4}
    (run / "progress.json").write_text(json.dumps(progress))
    page = report_on(tmp_path / "running.html", run)
    assert "still running, or it was killed. progress.json: round 3 of 9, train, 1 of 4 replies" in page.said
    assert "The data have no classes" in page.said
    assert "metrics.jsonl was last written at" in page.said


def test_an_old_run_shows_what_it_has_and_says_what_it_has_not(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "old", rounds=3, old=True)
    page = report_on(tmp_path / "old.html", run)
    for words in (
        "Only the times of the two exchanges",
        "No growth by round",
        "samples of each client and class",
    ):
        assert words in page.said
    assert "names no best round" in page.said
    assert "Time by phase. Medians: train 0.5, evaluate 0.5" in page.alts


def test_a_resumed_run_is_read_through_all_its_starts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "resumed", rounds=4, classes=0)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    again = json.loads(lines[0]) | {"round": 2, "refused": {"9": "is <not> known"}, "warnings": {"1": "odd"}}
    (run / "metrics.jsonl").write_text("\n".join([*lines[:7], json.dumps(again), *lines[7:]]) + "\n")
    read = reading.read_run(run)
    assert read.series("train", "loss")[0].tolist() == [1, 2, 3, 4]
    page = report_on(tmp_path / "resumed.html", run)
    for words in ("Resumed after round 2.", "is <not> known", "let in with a warning"):
        assert words in page.said


def test_names_and_errors_of_runs_are_text_not_markup(tmp_path: Path) -> None:
    name = "<script>alert('$x$')</script>"
    run = write_run(tmp_path / "runs" / "r", rounds=2, classes=0, status="failed", run_name=name)
    text = (run / "metrics.jsonl").read_text().replace('"0"', json.dumps(name))
    (run / "metrics.jsonl").write_text(text)
    summary = json.loads((run / "metrics.json").read_text()) | {"error": f"client {name} & <b>"}
    (run / "metrics.json").write_text(json.dumps(summary))
    page = report_on(tmp_path / "r.html", run)
    assert page.said.count(name) >= 5
    assert "alert('$x$')</script>" not in page.html


def test_several_runs_are_compared_in_what_they_differ(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs" / f"r{lr}", 3, 3, 4, old=True, train={"lr": lr}) for lr in (0.1, 0.5)]
    page = report_on(tmp_path / "two.html", *runs)
    section = page.said.partition("Differences")[2].partition("Time of a round")[0]
    assert section.split() == ["setting", "A", "B", "train.lr", "0.1", "0.5"]
    assert any(alt.startswith("Accuracy. A ") and "; B " in alt for alt in page.alts)
    per_megabyte = 0.9 / (3 * 3 * 3 * MODEL_BYTES / 1e6)
    assert page.said.count(f"{per_megabyte:.3g}") == 2


def test_runs_beyond_the_first_are_told_without_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "MOST_DRAWN", 0)
    runs = [write_run(tmp_path / "runs" / str(i), 2, 2, 0, seed=i) for i in range(9)]
    page = report_on(tmp_path / "nine.html", *runs)
    assert "Only the first 0 runs have figures" in page.said
    assert not [words for words in ("No bytes", "No growth", "No times", "are not recorded") if words in page.said]
    best = min(runs, key=lambda run: reading.read_run(run).final("loss") or 0)
    assert f"only the best by its objective, run {'ABCDEFGHI'[runs.index(best)]}, has a colour" in page.said


def test_a_sweep_shows_its_settings_and_the_jobs_that_failed(sweep: Path) -> None:
    page = Page(sweep)
    assert "train.lr=-1 must be > 0 <b>" in page.said
    assert "1 of 5 jobs failed" in page.said
    for key in ("seed", "train.lr"):
        assert any(alt.startswith(f"Accuracy by {key}. Medians") for alt in page.alts)
    assert not any("run_name" in alt for alt in page.alts)


def test_a_folder_of_runs_without_sweep_json_is_one_of_several_runs(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "plain"
    for job in (10, 2):
        write_run(folder / str(job), 1, 2, 0, old=True)
    runs, jobs = reading.read_all([folder])
    assert [run.label for run in runs] == ["2", "10"]
    assert jobs == []


def test_pictures_are_exported_as_png(tmp_path: Path) -> None:
    from PIL import Image

    run = write_run(tmp_path / "runs" / "r", rounds=1)
    assert report.main([str(run), "--out", str(tmp_path / "r.html"), "--png", str(tmp_path / "png")]) == 0
    found = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert {"accuracy.png", "loss.png", "classes.png", "phases.png", "bytes.png", "store.png"} <= set(found)
    with Image.open(tmp_path / "png" / "accuracy.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[0] == 255).all()
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "runs" / "r", rounds=1, classes=0)
    (tmp_path / "nothing").mkdir()
    for arguments, reason in (
        ([tmp_path / "nothing"], "is no run and holds none"),
        ([tmp_path / "absent"], "is no folder"),
        ([run / "config.yaml"], "is no folder"),
        ([run, "--out", tmp_path / "no" / "out.html"], "out.html cannot be used (No such file"),
    ):
        assert report.main(list(map(str, arguments))) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert reason in error
        assert error.count("\n") == 1


def test_odd_files_are_noted_not_fatal(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "r", rounds=1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train"}\nnot json\n[1]\n{"kind": "evaluate", "round": 2, "accuracy": NaN, "loss": "x"}\n')
    (run / "metrics.json").write_text("{")
    (run / "config.yaml").write_text(": :\n- {")
    page = report_on(tmp_path / "r.html", run)
    for words in ("3 lines of metrics.jsonl", "metrics.json cannot be read", "config.yaml cannot be read"):
        assert words in page.said


def test_the_best_round_is_by_the_objective_of_the_run(tmp_path: Path) -> None:
    for objective, best in (("accuracy", 2), ("loss", 1)):
        run = write_run(tmp_path / objective, 3, old=True, evaluate={"objective": objective})
        figures = [{"accuracy": 0.5, "loss": 0.1}, {"accuracy": 0.9, "loss": 0.5}, {"accuracy": 0.7, "loss": 0.3}]
        lines = [{"kind": "evaluate", "round": i + 1, **found} for i, found in enumerate(figures)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert reading.read_run(run).best() == (best, figures[best - 1][objective])


def test_accuracy_is_set_against_all_bytes_up_to_its_round(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", 3, old=True)
    lines = [{"kind": "train", "round": i, "bytes_up": 1_000_000, "bytes_down": 2_000_000} for i in (1, 2, 3)]
    lines.append({"kind": "evaluate", "round": 2, "accuracy": 0.5, "bytes_up": 0, "bytes_down": 4_000_000})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    megabytes, accuracy = by_traffic(reading.read_run(run))
    assert (megabytes.tolist(), accuracy.tolist()) == ([10.0], [0.5])


def test_failures_are_grouped_by_reason(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "r", rounds=1, clients=3)
    for server_round in (2, 3, 5):
        failures = [{"client": str(i), "reason": "sent NaN"} for i in range(2)]
        line = {"kind": "train", "round": server_round, "failures": failures, "absent": ["2"]}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    found = reading.read_run(run).clients
    failed = found.failures["train", "sent NaN"]
    assert (failed.count, failed.rounds, failed.clients) == (6, {2, 3, 5}, {"0", "1"})
    assert found.absent == {"2": 3}
    assert ranges(failed.rounds) == "2-3, 5"


def test_many_clients_are_drawn_as_sums_of_neighbours() -> None:
    table = np.random.default_rng(0).integers(0, 9, (1000, 62)).astype(float)
    rows, together = grouped(table, 100)
    assert (rows.shape, together) == ((100, 62), 10)
    assert np.array_equal(rows[3], table[30:40].sum(axis=0))
    assert rows.sum() == table.sum()
    uneven, together = grouped(table[:250], 100)
    assert (len(uneven), together) == (84, 3)
    assert uneven.sum() == table[:250].sum()


@pytest.mark.slow
def test_500_rounds_of_1000_clients_are_rendered(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "big", rounds=500, clients=1000, classes=62)
    page = report_on(tmp_path / "big.html", run)
    assert "Each row is the sum of 10 of the 1,000 clients" in page.said
    assert "20 of 1,000 clients" in page.said
    assert len(page.html) < 2_000_000


@pytest.fixture(scope="module")
def chromium() -> Chromium:
    with Chromium() as browser:
        yield browser


COLOURS = """[getComputedStyle(document.body).backgroundColor,
    getComputedStyle(document.querySelector('svg text')).fill]"""
FONT_SIZES = """[...document.querySelectorAll('svg text')].filter(t => t.getClientRects().length)
    .map(t => parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b))"""
CLIPPED = """[...document.querySelectorAll('svg text')].filter(t => t.getClientRects().length).filter(t => {
    const [a, b] = [t.getBoundingClientRect(), t.closest('svg').getBoundingClientRect()];
    return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
}).map(t => t.textContent)"""


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_a_browser_shows_the_sweep_legibly(chromium: Chromium, sweep: Path, width: int, dark: bool) -> None:
    chromium.open(sweep, width, dark=dark)
    chromium.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert chromium.complaints() == []
    assert chromium.requests() == [sweep.as_uri()]
    assert chromium.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    sizes = chromium.evaluate(FONT_SIZES)
    assert len(sizes) > 500
    assert min(sizes) >= 11
    assert chromium.evaluate(CLIPPED) == []
    lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in chromium.evaluate(COLOURS)]
    assert (lightness[0] < 200 < 550 < lightness[1]) if dark else (lightness[1] < 200 < 550 < lightness[0])


@needs_chromium
def test_the_browser_would_hear_of_what_a_page_asks_for(chromium: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='missing.png'><script>console.log('hello'); nothing()</script>")
    chromium.open(page, 400)
    assert len(chromium.requests()) == 2
    assert len(chromium.complaints()) >= 2
