"""What a Picture holds, read back from its SVG."""

from __future__ import annotations

from xml.etree import ElementTree

from orca_rank.report.draw import Picture

SVG = "{http://www.w3.org/2000/svg}"


def marks(picture: Picture) -> list[ElementTree.Element]:
    """All its elements in order, as a parser of XML sees them."""
    return list(ElementTree.fromstring(picture.svg("what it shows", alone=True)))[1:]  # after the style


def texts(picture: Picture) -> list[str]:
    return [mark.text or "" for mark in marks(picture) if mark.tag == f"{SVG}text"]


def says(picture: Picture) -> dict[str, ElementTree.Element]:
    """What is said of a mark that is pointed at -> the mark."""
    return {said: mark for mark in marks(picture) if (said := mark.get("data-say"))}


def place(mark: ElementTree.Element) -> tuple[float, float]:
    """The middle of a circle, or of a mark of another shape."""
    if mark.tag == f"{SVG}circle":
        return float(mark.get("cx", "")), float(mark.get("cy", ""))
    x, y = mark.get("transform", "").removeprefix("translate(").partition(")")[0].split()
    return float(x), float(y)
