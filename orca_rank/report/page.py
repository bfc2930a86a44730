"""A self-contained HTML page: inline style, figures as base64 PNG, nothing fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from matplotlib.figure import Figure

from orca_rank.report.canvas import PAGE, png


def cell(value: Any) -> str:
    """A number as a reader wants it: thousands apart, four significant digits."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("orca_rank.report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_ENVIRONMENT.filters["cell"] = cell


class Page:
    """Collects the parts of a page in order; `html()` is the whole file.

    Every text given is escaped by the template, so callers pass plain text.

    Args:
        title: of the page. lead: one line under it.
    """

    def __init__(self, title: str, lead: str) -> None:
        self.title, self.lead = title, lead
        self.images: dict[str, bytes] = {}
        self.parts: list[dict[str, Any]] = []  # what templates/page.html.j2 lays out, by `kind`

    def section(self, anchor: str, title: str) -> None:
        """Start a section that the links at the top lead to."""
        self._add("section", anchor=anchor, title=title)

    def text(self, text: str) -> None:
        self._add("text", text=text)

    def note(self, text: str) -> None:
        """A sentence that stands out."""
        self._add("note", text=text)

    def cards(self, cards: Sequence[tuple[str, str, str]]) -> None:
        """Small boxes: label, large value, explanation."""
        self._add("cards", cards=cards)

    def missing(self, items: Sequence[tuple[str, str]], more: int = 0) -> None:
        """What is not there, each with the command that makes it, and how many more are not."""
        self._add("missing", missing=items, more=more)

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """A figure with its caption; its PNG is kept in `images` under this name."""
        self.images[name] = png(figure)
        inches = float(figure.get_size_inches()[0])
        self._add("figure", name=name, caption=caption, wide=inches > PAGE + 0.1, width=round(96 * inches))

    def table(self, rows: Sequence[Mapping[str, Any]], caption: str = "", folded: str = "") -> None:
        """A table whose columns are the names in the rows; numbers stand right.

        Args:
            rows: name -> text or number. caption: above it. folded: a title to click on to see it; empty: shown.
        """
        names = list(dict.fromkeys(name for row in rows for name in row))
        numbers = {name for name in names if all(isinstance(row.get(name, 0), int | float) for row in rows)}
        self._add("table", rows=rows, names=names, numbers=numbers, caption=caption, folded=folded)

    def folded(self, title: str, text: str) -> None:
        """Preformatted text behind a title to click on."""
        self._add("folded", title=title, text=text)

    def html(self) -> str:
        images = {name: base64.b64encode(image).decode() for name, image in self.images.items()}
        return _ENVIRONMENT.get_template("page.html.j2").render(page=self, images=images) + "\n"

    def _add(self, kind: str, **content: Any) -> None:
        self.parts.append({"kind": kind, **content})
