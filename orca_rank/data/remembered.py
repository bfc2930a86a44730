"""What passes over data that stay on disk have found, kept for the processes that read the same data later."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from orca_rank.artifacts.files import write_tensors
from orca_rank.artifacts.provenance import changed, key
from orca_rank.artifacts.shared import making
from orca_rank.normaliser import Normaliser, named, take_named
from orca_rank.task import Task

_FORMAT = 1  # another one once what is found is another


class Judged(NamedTuple):
    """Of loaded data: the task with its statistics, those of the inputs, notes; see `orca_rank.data.module.Parts`."""

    task: Task
    inputs: Normaliser | None
    notes: tuple[str, ...]


def place_of(folder: Path, files: Sequence[Path], options: Any, contents: str) -> Path:
    """The file for what is found in some files, read with these options; another one as soon as a file was written.

    Args:
        contents: a hash of what they hold, which need not see every byte.
    """
    when = [changed(file) for file in files]
    return folder / f"statistics-{key([_FORMAT, options, contents, when])}.safetensors"


def remembered(path: Path, judge: Callable[[], Judged]) -> Judged:
    """What `judge` finds, from `path` where it was found before; left there otherwise."""
    known = _read(path)
    if known is not None:
        return known
    with making(path):
        known = _read(path)  # of a process that was faster
        if known is not None:
            return known
        found = judge()
        statistics = named({"inputs": found.inputs, "outputs": found.task.normaliser})
        values = {"task": found.task.to_dict(), "notes": list(found.notes)}
        write_tensors(path, statistics, {"judged": json.dumps(values)})
    return found


def _read(path: Path) -> Judged | None:
    """What was found before; None if it is not there, or of no use."""
    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
            values = json.loads((stream.metadata() or {})["judged"])
        inputs, outputs = take_named(tensors, "inputs"), take_named(tensors, "outputs")
        return Judged(Task.from_dict(values["task"], outputs), inputs, tuple(values["notes"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
