"""Build HTML. Everything that is not Html is escaped. The page has no scripts, and its policy forbids any loading."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from tools.page.drawing import PALETTE, Picture

PAGE_COLOURS = {  # in the light, in the dark; besides those of the figures
    "page": ("#ffffff", "#14171b"),
    "card": ("#f4f6f8", "#1e232a"),
    "soft": ("#57606a", "#a3adb8"),
    "good": ("#15703a", "#56d07f"),
    "bad": ("#b42318", "#ff8a80"),
    "warn": ("#8a5a00", "#f2c14b"),
}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
LONG = 44  # characters of a cell that may be broken


class Html(str):
    """Text that is already HTML."""


def tag(name: str, *inside: object, **attributes: str) -> Html:
    """Return an element. class_ is its class, aria_label its aria-label; empty attributes are left out."""
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value}
    said = "".join(f' {key}="{escape(value)}"' for key, value in named.items())
    return Html(f"<{name}{said}>{join(inside)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in parts))


def note(*inside: object) -> Html:
    return tag("p", *inside, class_="note")


def section(title: str, *inside: object, level: str = "h2") -> Html:
    """Return a section with a title; empty if it has no content."""
    body = join(part for part in inside if part)
    return tag("section", tag(level, title), body) if body else Html()


def folded(title: object, *inside: object, opened: bool = False) -> Html:
    """Return a part of the page that the reader can open and close."""
    found = tag("details", tag("summary", title), *inside)
    return Html(found.replace("<details", "<details open", 1)) if opened else found


def table(heads: Sequence[object], rows: Sequence[Sequence[object]], right: Iterable[int] = ()) -> Html:
    """Return a table in a box of its own that scrolls; the columns in `right` hold numbers."""
    if not rows:
        return Html()
    numbers = set(right)
    lines = [tag("tr", *(tag("th", head, class_="right" * (i in numbers)) for i, head in enumerate(heads)))]
    for row in rows:
        kinds = (
            "right" if i in numbers else "long" * (not isinstance(cell, Html) and len(str(cell)) > LONG)
            for i, cell in enumerate(row)
        )
        lines.append(tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True))))
    return tag("div", tag("table", tag("thead", lines[0]), tag("tbody", *lines[1:])), class_="scroll")


def tiles(pairs: Iterable[tuple[object, object]]) -> Html:
    """Return names and values in tiles."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs))


def facts(pairs: Iterable[tuple[object, object]]) -> Html:
    """Return a table of names and values."""
    rows = [tag("tr", tag("th", name), tag("td", value, class_="long")) for name, value in pairs]
    return tag("div", tag("table", tag("tbody", *rows)), class_="scroll") if rows else Html()


def figures(pictures: Sequence[Picture], *beside: Html) -> Html:
    """Return pictures and other blocks side by side, or below each other on a phone."""
    found = [*map(figure, pictures), *filter(None, beside)]
    return tag("div", *found, class_="figures") if found else Html()


def figure(picture: Picture) -> Html:
    """Return a picture with its content in words for screen readers."""
    width, height = picture.size
    box = f"0 0 {width:g} {height:g}"
    drawing = tag("svg", Html(picture.svg()), viewBox=box, role="img", aria_label=picture.alt)
    caption = tag("figcaption", picture.note) if picture.note else ""
    return tag("figure", tag("div", drawing, class_="scroll"), caption, class_="wide" * picture.wide)


def document(title: str, *body: object) -> str:
    """Return the whole page."""
    style = Path(__file__).with_name("page.css").read_text()
    colours = PALETTE | PAGE_COLOURS
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in colours.items()) for i in (0, 1))
    themes = f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{themes}{style}</style>
</head>
<body>
<main>
{join(body)}
</main>
</body>
</html>
"""
