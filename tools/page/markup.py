"""Build HTML. Everything that is not Html is escaped. The page has no scripts, and its policy forbids any loading."""

from collections.abc import Iterable, Sequence
from html import escape
from string import Template

from tools.page.drawing import FOLDER, Picture

LONG = 44  # characters; a longer cell may break into lines


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
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs))


def facts(pairs: Iterable[tuple[object, object]]) -> Html:
    rows = [tag("tr", tag("th", name), tag("td", value, class_="long")) for name, value in pairs]
    return tag("div", tag("table", tag("tbody", *rows)), class_="scroll") if rows else Html()


def figures(pictures: Sequence[Picture], *beside: Html) -> Html:
    """Return pictures and other blocks side by side, or below each other on a phone."""
    found = [*map(figure, pictures), *filter(None, beside)]
    return tag("div", *found, class_="figures") if found else Html()


def figure(picture: Picture) -> Html:
    caption = tag("figcaption", picture.note) if picture.note else ""
    return tag("figure", tag("div", Html(picture.svg()), class_="scroll"), caption, class_="wide" * picture.wide)


def document(title: str, *body: object) -> str:
    page, style = ((FOLDER / name).read_text() for name in ("page.html", "page.css"))
    return Template(page).substitute(title=escape(title), style=style, body=join(body))
