"""What the figures share: their look, their places in inches, the PNG of one and how names are written.

Figures are made without pyplot, so there is no global state and nothing to close. Colours are Okabe and Ito's, which
remain distinct to colour-blind readers. Every axes has its place in inches (`grid`): matplotlib's searches for a layout
cost more than drawing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, INK = "#8a8f98", "#24292f"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
STYLE: dict[Any, Any] = {  # matplotlib types its names one by one
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titley": 1.0,  # not searched for
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
PAGE = 10.9  # inches, what fits the page without scrolling
PIXELS = 144  # per inch; the page shows an inch as 96 of its own pixels, of which a screen has one or two
Number = float
_UPPER = ("l2", "mmd", "otdd", "nmse", "mae", "iou", "f1")
LETTER = 0.078  # inches, about what a letter takes


def styled() -> Any:
    """The look of all figures, as a context manager or a decorator."""
    return matplotlib.rc_context(STYLE)


def png(figure: Figure, dpi: Number = PIXELS) -> bytes:
    """The figure as PNG bytes, the same for the same data."""
    stream = io.BytesIO()
    with styled():
        figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


def grid(
    columns: Sequence[Number],
    rows: Sequence[Number],
    *,
    left: Number = 0.8,
    right: Number = 0.15,
    top: Number = 0.35,
    bottom: Number = 0.55,
    across: Number = 0.0,
    down: Number = 0.0,
) -> tuple[Figure, list[list[Axes]]]:
    """A figure and its axes, row by row, all lengths in inches.

    Args:
        columns: widths. rows: heights. left, right, top, bottom: margins for labels. across, down: between axes.
    """
    width = left + sum(columns) + across * (len(columns) - 1) + right
    height = top + sum(rows) + down * (len(rows) - 1) + bottom
    figure = Figure(figsize=(width, height))
    axes: list[list[Axes]] = []
    y = height - top
    for tall in rows:
        y, x = y - tall, left
        axes.append([])
        for wide in columns:
            axes[-1].append(figure.add_axes((x / width, y / height, wide / width, tall / height)))
            x += wide + across
        y -= down
    return figure, axes


def sheet(width: Number, height: Number) -> tuple[Figure, Axes]:
    """A figure that is one axes without ticks, in inches from its upper left corner: dozens of small panels drawn on it
    cost a tenth of dozens of axes."""
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    return figure, axis


def words(name: str) -> str:
    """A metric's name as a reader writes it: relative_l2 -> relative L2."""
    return " ".join(part.upper() if part in _UPPER else part for part in name.replace("_", " ").split())
