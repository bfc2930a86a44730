"""A self-contained HTML page: style, script and figures inline, nothing fetched from anywhere."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import jinja2

from orca_rank.report.draw import Picture

_INLINE = 150_000  # bytes of a CSV that the page itself holds; a larger one lies beside it only


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

    Attributes:
        files: name -> content, the figures and their data as files of their own.
    """

    def __init__(self, title: str, lead: str) -> None:
        self.title, self.lead = title, lead
        self.files: dict[str, str] = {}
        self.figures = 0
        self.parts: list[dict[str, Any]] = []  # what templates/page.html.j2 lays out, by `kind`

    def section(self, anchor: str, title: str) -> None:
        """Start a section that the links at the top lead to."""
        self._add("section", anchor=anchor, title=title)

    def answer(self, asked: str, found: str, beside: str, to_do: str, command: str = "") -> None:
        """The first thing to read: a question, its answer, what to compare it with, and what to do next."""
        self._add("answer", asked=asked, found=found, beside=beside, next=to_do, command=command)

    def text(self, text: str) -> None:
        self._add("text", text=text)

    def note(self, text: str) -> None:
        """A sentence that stands out."""
        self._add("note", text=text)

    def missing(self, items: Sequence[tuple[str, str]], more: int = 0) -> None:
        """What is not there, each with the command that makes it, and how many more are not."""
        self._add("missing", missing=items, more=more)

    def figure(self, name: str, figure: Picture, caption: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A figure with its caption. rows: the data that it draws, as CSV beside the page and, if small, inside it."""
        self.figures += 1
        self.files |= {f"{name}.svg": figure.svg(caption, alone=True), f"{name}.csv": _csv(rows)}
        data = self.files[f"{name}.csv"]
        link = f"data:text/csv;charset=utf-8,{quote(data, safe=' ,;:!()[]')}" if len(data) <= _INLINE else ""
        self._add("figure", name=name, caption=caption, svg=figure.svg(caption), link=link)

    def table(self, rows: Sequence[Mapping[str, Any]], caption: str = "", folded: str = "", keys: int = 1) -> None:
        """A table whose columns are the names in the rows, without those that are empty in all; numbers stand right, a
        click on a name sorts.

        Args:
            rows: name -> text or number. caption: above it. folded: a title to click on to see it; empty: shown.
            keys: how many columns at the left stay in sight.
        """
        names = list(dict.fromkeys(name for row in rows for name, value in row.items() if value not in ("", None)))
        numbers = {name for name in names if all(isinstance(row.get(name, 0), int | float) for row in rows)}
        self._add("table", rows=rows, names=names, numbers=numbers, caption=caption, folded=folded, sticky=keys)

    def folded(self, title: str, text: str) -> None:
        """Preformatted text behind a title to click on."""
        self._add("folded", title=title, text=text)

    @contextlib.contextmanager
    def fold(self, title: str) -> Iterator[None]:
        """What is added inside stands behind a title to click on."""
        self._add("open", title=title)
        yield
        if self.parts[-1]["kind"] == "open":
            self.parts.pop()  # nothing was added
        else:
            self._add("close")

    def html(self) -> str:
        return _ENVIRONMENT.get_template("page.html.j2").render(page=self) + "\n"

    def _add(self, kind: str, **content: Any) -> None:
        self.parts.append({"kind": kind, **content})


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
