"""Pictures as SVG, in CSS pixels from the upper left corner: what the page's figures are drawn with.

Colours, weights and letters are classes of templates/figure.css, so that a picture follows the page it stands in, light
or dark. What a mark says when it is pointed at stands in `data-say`, which templates/page.js shows.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Number = float
COLOURS = 7  # classes c0 to c6, Okabe and Ito's, which remain distinct to colour-blind readers
SHAPES = "osdvx"
LETTER = 6.7  # pixels, about what a letter takes; a small one takes 5/6 of it
_PIXELS = 200  # of a field along a side
_UPPER = ("l2", "mmd", "otdd", "nmse", "mae", "iou", "f1")


def words(name: str) -> str:
    """A metric's name as a reader writes it: relative_l2 -> relative L2."""
    return " ".join(part.upper() if part in _UPPER else part for part in name.replace("_", " ").split())


def short(value: Number) -> str:
    """A number beside a mark or a tick: three significant digits, thousands as k, millions as M."""
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else 1e6):.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class Scale:
    """From values in low..high to pixels in start..end, in equal steps or equal ratios."""

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool = False

    def __call__(self, value: Number) -> float:
        low, high, value = (math.log(one) if self.log else one for one in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, count: int = 5) -> list[float]:
        """About so many round values inside."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
                found = [step * 10.0**decade for decade in decades for step in steps]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) >= min(3, count):
                    return found
        raw = (self.high - self.low) / max(1, count)
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * step for step in (1, 2, 5, 10) if power * step >= raw * 0.75)
        first = math.ceil(self.low / step - 1e-9)
        return [
            0.0 if number == 0 else number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)
        ]


def tick_labels(ticks: Sequence[Number]) -> list[tuple[Number, str]]:
    """Ticks with as many digits as keep them apart."""
    texts = [short(tick) for tick in ticks]
    for digits in range(4, 8):
        if len(set(texts)) < len(texts):
            texts = [f"{tick:.{digits}g}" for tick in ticks]
    return list(zip(ticks, texts, strict=True))


def scale(
    values: Iterable[Number],
    start: Number,
    end: Number,
    *,
    margin: Number = 0.08,
    zero: bool = False,
    wide: Number = 20,
) -> Scale:
    """A scale over all finite values with a margin, in equal ratios where positive values span more than `wide`.

    Args:
        zero: whether 0 belongs to an even scale.
    """
    known = [float(value) for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if low > 0 and high > wide * low:
        ratio = (high / low) ** margin
        return Scale(low / ratio, high * ratio, start, end, log=True)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    if high <= low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    room = margin * (high - low)
    least = max(low - room, 0.0) if low >= 0 else low - room  # nothing is drawn below 0 where nothing lies there
    return Scale(least, high + room, start, end)


class Picture:
    """An SVG of a width and a height, put together mark by mark."""

    def __init__(self, width: Number, height: Number) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def put(self, tag: str, kind: str = "", content: str = "", say: str = "", **attributes: Any) -> None:
        """An element of classes `kind`; numbers are rounded to a tenth of a pixel."""
        written = "".join(f' {name.replace("_", "-")}="{_written(value)}"' for name, value in attributes.items())
        written += f' class="{kind}"' if kind else ""
        written += f' data-say="{escape(say)}"' if say else ""
        self.parts.append(f"<{tag}{written}>{content}</{tag}>" if content else f"<{tag}{written}/>")

    def text(
        self, x: Number, y: Number, text: str, kind: str = "", *, at: str = "start", turn: Number = 0, say: str = ""
    ) -> None:
        """at: which end of the text stands at x: start, middle or end. turn: in degrees, clockwise."""
        turned = {"transform": f"rotate({turn:g} {x:.1f} {y:.1f})"} if turn else {}
        self.put("text", kind, escape(text), say, x=x, y=y, **({} if at == "start" else {"text_anchor": at}), **turned)

    def line(self, points: Sequence[tuple[Number, Number]], kind: str, say: str = "") -> None:
        path = " ".join(f"{_written(x)},{_written(y)}" for x, y in points)
        self.put("polyline", f"line {kind}", say=say, points=path)

    def box(
        self, x: Number, y: Number, width: Number, height: Number, kind: str, say: str = "", shade: Number = 1.0
    ) -> None:
        """A rectangle. shade: from 0, the page's colour, to 1."""
        faint = {} if shade == 1 else {"fill_opacity": f"{shade:.2f}"}
        self.put("rect", kind, say=say, x=x, y=y, width=max(0.0, width), height=max(0.0, height), **faint)

    def mark(self, x: Number, y: Number, kind: str, say: str = "", *, size: Number = 4.5, shape: str = "o") -> None:
        """A point: a circle, square, diamond, triangle or cross."""
        if shape == "o":
            return self.put("circle", kind, say=say, cx=x, cy=y, r=size)
        paths = {
            "s": "M-.9-.9H.9V.9H-.9Z", "d": "M0-1.25 1.25 0 0 1.25-1.25 0Z", "v": "M0-1.2 1.15.9H-1.15Z",
            "x": "M-1-.6-.6-1 0-.4.6-1 1-.6.4 0 1 .6.6 1 0 .4-.6 1-1 .6-.4 0Z",
        }  # fmt: skip
        place = f"translate({_written(x)} {_written(y)}) scale({size:g})"
        return self.put("path", kind, say=say, d=paths[shape], transform=place, vector_effect="non-scaling-stroke")

    def field(self, pixels: UInt8[np.ndarray, "h w 3"], box: tuple[Number, Number, Number, Number], say: str) -> None:
        """An image, its pixels as squares, in a box of x, y, width, height; of a large one every second, third, …"""
        step = -(-max(pixels.shape[:2]) // _PIXELS)
        pixels = np.ascontiguousarray(pixels[::step, ::step])
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, format="PNG", optimize=True)
        data = base64.b64encode(stream.getvalue()).decode()
        x, y, width, height = box
        href = f"data:image/png;base64,{data}"
        self.put(
            "image", "field", say=say, x=x, y=y, width=width, height=height, preserveAspectRatio="none", href=href
        )  # fmt: skip

    def legend(self, x: Number, y: Number, entries: Sequence[tuple[str, str, str]]) -> Number:
        """Marks with their names in one line: (shape or "-", kind, name). Returns where it ends."""
        for shape, kind, name in entries:
            if shape == "-":
                self.line([(x, y - 4), (x + 18, y - 4)], kind)
            else:
                self.mark(x + 9, y - 4, kind, shape=shape)
            self.text(x + 24, y, name)
            x += 42 + LETTER * len(name)
        return x

    def svg(self, label: str, *, alone: bool = False) -> str:
        """The picture as text. label: what it shows, for those who do not see it. alone: with its style, as a file."""
        size = f"0 0 {self.width:g} {self.height:g}"
        style = f"<style>{figure_style()}</style>" if alone else ""
        least = f' style="width:100%;min-width:{0.9 * self.width:.0f}px;max-width:{self.width:.0f}px"'
        said = f'xmlns="http://www.w3.org/2000/svg" width="{self.width:g}" height="{self.height:g}"' if alone else ""
        opened = f'<svg class="chart" {said or least.strip()} viewBox="{size}" role="img" aria-label="{escape(label)}">'
        return f"{opened}{style}{''.join(self.parts)}</svg>"


@dataclass(frozen=True)
class Panel:
    """A pair of axes in a picture; `across` and `up` say where it stands."""

    picture: Picture
    across: Scale
    up: Scale

    def frame(
        self,
        *,
        title: str = "",
        x: str = "",
        y: str = "",
        x_ticks: Sequence[tuple[Number, str]] | None = None,
        y_ticks: Sequence[tuple[Number, str]] | None = None,
    ) -> None:
        """Grid, ticks and labels. x_ticks, y_ticks: (value, text); None: round values."""
        draw, (left, right), (bottom, top) = self.picture, self.ends(self.across), self.ends(self.up)
        rows = tick_labels(self.up.ticks(4)) if y_ticks is None else y_ticks
        columns = tick_labels(self.across.ticks(max(2, int((right - left) / 90)))) if x_ticks is None else x_ticks
        for value, text in rows:
            draw.put("line", "grid", x1=left, x2=right, y1=self.up(value), y2=self.up(value))
            draw.text(left - 7, self.up(value) + 4, text, "small", at="end")
        for value, text in columns:
            draw.put("line", "axis", x1=self.across(value), x2=self.across(value), y1=bottom, y2=bottom + 4)
            draw.text(self.across(value), bottom + 17, text, "small", at="middle")
        draw.put("line", "axis", x1=left, x2=right, y1=bottom, y2=bottom)
        if title:
            draw.text(left, top - 9, title, "head")
        if x:
            draw.text((left + right) / 2, bottom + 35, x, at="middle")
        if y:
            draw.text(left - 50, (top + bottom) / 2, y, at="middle", turn=-90)

    @staticmethod
    def ends(scale: Scale) -> tuple[float, float]:
        return scale.start, scale.end

    def point(self, x: Number, y: Number) -> tuple[float, float]:
        return self.across(x), self.up(y)

    def line(self, points: Iterable[tuple[Number, Number]], kind: str, say: str = "") -> None:
        self.picture.line([self.point(x, y) for x, y in points], kind, say)

    def mark(self, x: Number, y: Number, kind: str, say: str = "", **look: Any) -> None:
        self.picture.mark(*self.point(x, y), kind, say, **look)

    def span(self, x: Number, low: Number | None, high: Number | None, kind: str) -> None:
        """An interval as an upright line; nothing where an end is not known."""
        if low is not None and high is not None:
            at = self.across(x)
            self.picture.put("line", f"span {kind}", x1=at, x2=at, y1=self.up(low), y2=self.up(high))

    def level(self, value: Number, kind: str, name: str, *, above: bool = True, say: str = "") -> None:
        """A line across at a value with its name."""
        left, right = self.ends(self.across)
        self.picture.line([(left, self.up(value)), (right, self.up(value))], kind, say or name)
        self.picture.text(right - 2, self.up(value) + (-5 if above else 14), name, f"small name {kind}", at="end")


def pixels(
    field: np.ndarray, low: Number, high: Number, colours: Sequence[tuple[int, int, int]]
) -> UInt8[np.ndarray, "h w 3"]:
    """A field (h, w) in colours that go evenly from the value low to the value high; what is not finite is grey."""
    place = np.clip((field - low) / ((high - low) or 1.0), 0, 1)
    steps = np.linspace(0, 1, len(colours))
    rgb = np.stack([np.interp(np.nan_to_num(place), steps, channel) for channel in np.array(colours, float).T], -1)
    rgb[~np.isfinite(field)] = 170
    return rgb.round().astype(np.uint8)


@cache
def figure_style() -> str:
    """The style of a picture that stands alone."""
    return resources.files("orca_rank.report").joinpath("templates/figure.css").read_text(encoding="utf-8")


def _written(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else escape(str(value))
