"""Reading back what W&B writes offline: a .wandb file is a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as messages

HEADER, BLOCK = 7, 32768  # bytes of the file's own header and of a record's; bytes of a block


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: after seven bytes, blocks of pieces (checksum 4, length 2, kind 1, then data), of
    which a record is one (kind 1) or several (first 2, middle 3, last 4)."""
    data, place, record = path.read_bytes(), HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # a block's end that no header fits
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        if kind == 0:
            return
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            message = messages.Record()
            message.ParseFromString(record)
            yield message
            record = b""


@dataclass
class Run:
    """What an offline run holds, by kind; artifacts: (name, type, used rather than made, digest, files)."""

    id: str = ""
    group: str = ""
    job_type: str = ""
    name: str = ""
    notes: str = ""
    exit: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    lowest: set[str] = field(default_factory=set)
    artifacts: list[tuple[str, str, bool, str, list[str]]] = field(default_factory=list)


def read(path: Path) -> Run:
    """The run in a .wandb file."""
    run = Run()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            given = record.run
            run.id, run.group, run.job_type = given.run_id, given.run_group, given.job_type
            run.name, run.notes = given.display_name, given.notes
            run.config |= _items(given.config.update)
        elif kind == "config":
            run.config |= _items(record.config.update)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary |= _items(record.summary.update)
        elif kind == "metric" and record.metric.summary.min:
            run.lowest.add(record.metric.name or record.metric.glob_name)
        elif kind == "artifact":
            given = record.artifact
            files = sorted(item.path for item in given.manifest.contents)
            run.artifacts.append((given.name, given.type, given.use_after_commit, given.digest, files))
        elif kind == "exit":
            run.exit = record.exit.exit_code
    return run


def read_all(folder: Path) -> list[Run]:
    """Every offline run below a folder, in the order in which they ended; folders say the second alone.

    W&B's own process may still be writing when its run has ended: a file is read once its end stands in it, or when
    none has come for a while, as after a kill.
    """
    patience = time.monotonic() + 10
    while any(read(path).exit is None for path in folder.rglob("*.wandb")) and time.monotonic() < patience:
        time.sleep(0.05)
    return [read(path) for path in sorted(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime_ns)]


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
