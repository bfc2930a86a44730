"""What the files of a run folder hold, kept in one file: a report of thousands of fine-tunes opens that one and those
that have changed since."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orca_rank.artifacts.damaged import DamagedFile, reading
from orca_rank.artifacts.files import SCHEMA, atomic

NAME = "report/index.json"


class Kept:
    """Plain values by the file that they were read from; an entry holds as long as the file's size and time of change.

    Args:
        run: the run folder. A damaged index is made again.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / NAME
        self.entries: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}
        if self.path.exists():
            with contextlib.suppress(DamagedFile), reading(self.path, "it is made again"):
                found = json.loads(self.path.read_bytes())
                self.entries = dict(found["files"]) if found["schema"] == SCHEMA else {}

    def get(self, path: Path, read: Callable[[], Any]) -> Any:
        """What is known of an existing file, or what `read` reads from it now."""
        name, state = path.relative_to(self.run).as_posix(), path.stat()
        stamp = [state.st_mtime_ns, state.st_size, state.st_ino]
        entry = self.entries.get(name)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == stamp):
            entry = [stamp, read()]
        self.asked[name] = entry
        return entry[1]

    def save(self) -> None:
        """Keep what was asked for, if it is not what was there."""
        if len(self.asked) != len(self.entries) or any(self.entries.get(name) is not entry
                                                       for name, entry in self.asked.items()):  # fmt: skip
            with atomic(self.path) as temporary:
                temporary.write_text(json.dumps({"schema": SCHEMA, "files": self.asked}))
