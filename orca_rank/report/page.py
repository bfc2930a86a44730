"""A self-contained HTML page: inline style, figures as base64 PNG, nothing fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from orca_rank.report.figures import png

_WIDE = 11.6  # inches; wider figures scroll sideways instead of shrinking
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --card: #f6f8fa; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9da7b3; --line: #3d444d; --card: #161b22; --page: #0d1117; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; margin: 0.4rem 0 0; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 0.6rem; padding-top: 0.5rem; border-top: 1px solid var(--line); }
p, figcaption { max-width: 78ch; }
nav { margin: 0.8rem 0 1.2rem; }
nav a { margin-right: 1.1rem; color: inherit; }
.lead, figcaption, caption { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0.8rem; margin: 1rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.7rem 0.9rem; }
.card b { display: block; font-size: 1.35rem; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: 0.9rem; overflow-wrap: anywhere; }
.note { background: var(--card); border-left: 4px solid #e69f00; padding: 0.6rem 0.9rem; margin: 0.8rem 0; }
.note ul { margin: 0.3rem 0; padding-left: 1.2rem; }
figure { margin: 1rem 0 1.6rem; }
.frame { overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
.frame img { display: block; max-width: 100%; height: auto; }
.frame.wide img { max-width: none; }
figcaption { margin-top: 0.5rem; }
.scroll { overflow-x: auto; margin: 0.8rem 0 1.2rem; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.28rem 0.75rem; border-bottom: 1px solid var(--line); white-space: nowrap; text-align: left; }
td.number, th.number { text-align: right; }
code, pre { font: 0.88em ui-monospace, monospace; background: var(--card); border-radius: 4px; padding: 0.1em 0.3em; }
pre { padding: 0.8rem; overflow-x: auto; }
summary { cursor: pointer; }
"""


class Page:
    """Collects the parts of a page in order; `html()` is the whole file.

    Every text given is escaped here, so callers pass plain text.

    Args:
        title: of the page. lead: one line under it.
    """

    def __init__(self, title: str, lead: str) -> None:
        self.title, self.lead = title, lead
        self.images: dict[str, bytes] = {}
        self._sections: list[tuple[str, str]] = []
        self._parts: list[str] = []

    def section(self, anchor: str, title: str) -> None:
        """Start a section that the links at the top lead to."""
        self._sections.append((anchor, title))
        self._parts.append(f'<h2 id="{escape(anchor)}">{escape(title)}</h2>')

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{escape(text)}</p>")

    def cards(self, cards: Sequence[tuple[str, str, str]]) -> None:
        """Small boxes: label, large value, explanation."""
        boxes = [
            f'<div class="card"><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>'
            for label, value, note in cards
        ]
        self._parts.append(f'<div class="cards">{"".join(boxes)}</div>')

    def missing(self, items: Sequence[tuple[str, str]]) -> None:
        """What is not there, each with the command that makes it."""
        lines = [f"<li>{escape(what)}: <code>{escape(command)}</code></li>" for what, command in items]
        self._parts.append(f'<div class="note">Not there yet:<ul>{"".join(lines)}</ul></div>')

    def note(self, text: str) -> None:
        self._parts.append(f'<div class="note">{escape(text)}</div>')

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """A figure with its caption; its PNG is kept in `images` under this name."""
        self.images[name] = data = png(figure)
        inches = float(figure.get_size_inches()[0])
        wide = " wide" if inches > _WIDE else ""
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        image = f'<img alt="{escape(name)}" src="{source}" width="{round(96 * inches)}">'
        self._parts.append(
            f'<figure><div class="frame{wide}">{image}</div><figcaption>{escape(caption)}</figcaption></figure>'
        )

    def table(self, rows: Sequence[Mapping[str, Any]], caption: str = "", folded: str = "") -> None:
        """A table whose columns are the names in the rows; numbers stand right.

        Args:
            rows: name -> text or number. caption: above it. folded: a title to click on to see it; empty: shown.
        """
        names = list(dict.fromkeys(name for row in rows for name in row))
        right = {name for name in names if all(isinstance(row.get(name, 0), int | float) for row in rows)}
        mark = {name: ' class="number"' if name in right else "" for name in names}
        head = "".join(f"<th{mark[name]}>{escape(name)}</th>" for name in names)
        body = "".join(
            "<tr>" + "".join(f"<td{mark[name]}>{escape(cell(row.get(name, '')))}</td>" for name in names) + "</tr>"
            for row in rows
        )
        title = f"<caption>{escape(caption)}</caption>" if caption else ""
        table = f'<div class="scroll"><table>{title}<tr>{head}</tr>{body}</table></div>'
        self._parts.append(f"<details><summary>{escape(folded)}</summary>{table}</details>" if folded else table)

    def folded(self, title: str, text: str) -> None:
        """Preformatted text behind a title to click on."""
        self._parts.append(f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>")

    def html(self) -> str:
        links = "".join(f'<a href="#{escape(anchor)}">{escape(title)}</a>' for anchor, title in self._sections)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
            f'<h1>{escape(self.title)}</h1>\n<p class="lead">{escape(self.lead)}</p>\n<nav>{links}</nav>\n'
            + "\n".join(self._parts)
            + "\n</main>\n</body>\n</html>\n"
        )


def cell(value: Any) -> str:
    """A number as a reader wants it: thousands apart, four significant digits."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)
