"""The report of a sweep is legible in a real browser, at a desk and on a phone, and asks for nothing else."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chromium import Chromium, needs_chromium
from tests.support.html_page import report_on, write_sweep
from tests.support.run_files import add_lines, write_run


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a sweep of four runs and a job that failed, and of a run with a long name and reasons."""
    folder = tmp_path_factory.mktemp("sweep")
    four, odd = write_sweep(folder / "runs" / "four"), write_run(folder / "runs" / ("long_name_" * 12), 2)
    reason = "has a key that is pinned for no client in /" + "a_long_folder/" * 12
    add_lines(odd, {"kind": "refused", "round": 2, "refused": {"node 1": reason}})
    add_lines(odd, {"kind": "resumed_anyway", "round": 1, "changed": [reason]})
    report_on(folder / "sweep.html", four, odd, drawn=True)
    return folder / "sweep.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


COLOURS = """[getComputedStyle(document.body).backgroundColor,
    getComputedStyle(document.querySelector('svg text')).fill]"""
FONT_SIZES = """[...document.querySelectorAll('svg text')].filter(t => t.getClientRects().length)
    .map(t => parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b))"""
OUTSIDE = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg'))
    .filter(e => e.getClientRects().length && e.getBoundingClientRect().right > innerWidth).map(e => e.textContent)"""
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
    assert chromium.evaluate(OUTSIDE) == []
    lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in chromium.evaluate(COLOURS)]
    assert (lightness[0] < 200 < 550 < lightness[1]) if dark else (lightness[1] < 200 < 550 < lightness[0])


@needs_chromium
def test_the_browser_would_hear_of_what_a_page_asks_for(chromium: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='missing.png'><script>console.log('hello'); nothing()</script>")
    chromium.open(page, 400)
    assert len(chromium.requests()) == 2
    assert len(chromium.complaints()) >= 2
