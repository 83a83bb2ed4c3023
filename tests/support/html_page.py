"""Read a page of tools.report: its text, its pictures, and what it would fetch."""

import json
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.support.run_files import write_run
from tools import report
from tools.page.drawing import Picture

VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """The content of a page: its text, its pictures, the URLs that it would fetch, and unclosed tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text()
        self.said, self.alts, self.fetched, self.open = "", [], [], []
        self.feed(self.html)
        self.close()
        self.said = " ".join(self.said.split())

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


def report_on(out: Path, *words: object, drawn: bool = False) -> Page:
    """Write and read a page, given run directories and options; its figures are empty unless drawn, which is slow."""
    with pytest.MonkeyPatch.context() as patch:
        if not drawn:
            patch.setattr(Picture, "svg", lambda self: f'<svg role="img" aria-label="{escape(self.alt)}"></svg>')
        assert report.main([*map(str, words), "--out", str(out)]) == 0
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
