"""What outlives an interruption: parts of a stage's work, and whether a checkpoint may be gone on from."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from orca_rank.artifacts.command import command, leave
from orca_rank.artifacts.damaged import DamagedFile, reading
from orca_rank.artifacts.files import atomic, remove_parts
from orca_rank.artifacts.lock import LOCK, locked
from orca_rank.artifacts.plain import check_sums, load_plain
from orca_rank.artifacts.provenance import differences, key, plain

CHECKPOINTS = ("last.ckpt", "previous.ckpt")
MARK = "begun.json"


def begin(
    folder: Path, made_from: Mapping[str, Any], inputs: Mapping[str, str], *, force: bool, results: Sequence[str]
) -> bool:
    """Whether a stage goes on with what an interrupted run of the same left in its folder.

    If not, checkpoints and results of whatever ran there before are removed. With `force` only a run that was begun
    with `force` is gone on with, so that redoing a stage can be interrupted too.

    Args:
        folder: of the stage. made_from: the options that it depends on. inputs: the files that it is made from and
            their hashes. results: names of files and folders that the stage writes.

    Raises:
        ValueError: if a checkpoint of other options is there, unless `force`.
    """
    leave(folder)
    mark = folder / MARK
    begun = _read_mark(mark)
    options = json.loads(json.dumps(plain(made_from), default=str))
    if begun is not None:
        changed = sorted(differences(begun["made_from"], options))
        left = [folder / name for name in CHECKPOINTS if (folder / name).exists()]
        if left and changed and not force:
            raise ValueError(
                f"{folder} holds an unfinished run with other options ({'; '.join(changed[:6])}): repeat its command "
                f"to go on with it, run `{command('force=true')}` to start again, or add run=<another name>"
            )
        if not changed and begun["inputs"] == dict(inputs) and (begun["forced"] or not force):
            return True
    for name in (*results, *CHECKPOINTS):
        _remove(folder / name)
    with atomic(mark) as temporary:
        temporary.write_text(json.dumps({"made_from": options, "inputs": dict(inputs), "forced": force}))
    return False


def finish(folder: Path) -> None:
    """The stage is done: nothing is left to go on with."""
    for name in (*CHECKPOINTS, MARK):
        _remove(folder / name)


def tidy(folder: Path) -> None:
    """Remove what a stage left that was killed after its result was there; parts of a redo with force stay, and all of
    it where another process is at work."""
    parts = folder / "unfinished"
    leavings = (*CHECKPOINTS, MARK, parts.name, LOCK)
    if not any((folder / name).exists() for name in leavings) and not any(folder.glob(".*.part")):
        return
    with contextlib.suppress(BlockingIOError), locked(folder):
        finish(folder)
        remove_parts(folder)
        for part in parts.iterdir() if parts.exists() else ():
            if not part.name.endswith("-forced"):
                shutil.rmtree(part)
        with contextlib.suppress(OSError):
            parts.rmdir()


def _read_mark(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        found = json.loads(path.read_text())
        if isinstance(found, dict) and found.keys() == {"made_from", "inputs", "forced"}:
            return found
    return None


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


class Unfinished:
    """One file a part under <folder>/unfinished, kept until the stage is done.

    Args:
        folder: of the stage. made_from: what the parts depend on; parts of anything else are thrown away.
        force: throw away the parts that were not made with force too.
        records: the classes whose instances parts hold, beside tensors, arrays and plain values; a part that holds
            anything else counts as damaged and is never unpickled.
    """

    def __init__(self, folder: Path, made_from: Any, *, force: bool = False, records: Sequence[type] = ()) -> None:
        self.root, self.records = folder / "unfinished", records
        self.folder = self.root / (key(made_from) + ("-forced" if force else ""))
        if self.root.exists():
            for other in self.root.iterdir():
                if other != self.folder:
                    shutil.rmtree(other)

    def part(self, name: str, compute: Callable[..., Any], *inputs: Any) -> Any:
        """The part as it was left, or compute(*inputs), kept."""
        path = self.folder / f"{name}.pt"
        if path.exists():
            with contextlib.suppress(DamagedFile), reading(path, "it is made again"):
                check_sums(path)
                return load_plain(path, self.records)
        value = compute(*inputs)
        with atomic(path) as temporary:
            torch.save(value, temporary)
        return value

    def drop(self) -> None:
        """Throw all parts away: the stage is done."""
        shutil.rmtree(self.root, ignore_errors=True)
