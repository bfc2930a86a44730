"""What a stage has to show once its files are written: tables, charts, pictures and files, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One stage at work in its folder, which is one page of a tracking service.

    Args:
        run: name of the run folder, by which pages are grouped. stage: its kind. folder: of the stage. tag: of a
            fine-tune. swept: the options that tell this point of a sweep from the others.
    """

    run: str
    stage: str
    folder: Path
    tag: str = ""
    swept: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The tag, or else the stage, and what the sweep varies."""
        return " ".join([self.tag or self.stage, *self.swept])


class Chart(NamedTuple):
    """A chart of one of a page's tables. kind: "bar" (x are names), "scatter" or "line". stroke: column that says which
    line a row belongs to."""

    kind: str
    table: str
    x: str
    y: str
    title: str
    stroke: str | None = None


class Files(NamedTuple):
    """Files that one stage makes and others use: the same name and the same contents are the same thing.

    kind: such as "embedder". files: name -> path, or the text itself.
    """

    name: str
    kind: str
    files: Mapping[str, Path | str]


@dataclass(frozen=True)
class Page:
    """What is shown of a finished stage.

    Args:
        config: further options, by a short name. summary: final figures. tables: name -> rows, all with the same
            columns. pictures: name -> PNG. used: what the stage was made from. made: what it leaves.
    """

    config: Row = field(default_factory=dict)
    summary: Row = field(default_factory=dict)
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    charts: Mapping[str, Chart] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    used: Sequence[Files] = ()
    made: Sequence[Files] = ()
