"""Parts of a stage's work that outlive an interruption."""

from __future__ import annotations

import contextlib
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from orca_rank.artifacts.files import atomic
from orca_rank.artifacts.provenance import key


class Unfinished:
    """One file a part under <folder>/unfinished, kept until the stage is done.

    Args:
        folder: of the stage. made_from: what the parts depend on; parts of anything else are thrown away.
        force: throw all parts away.
    """

    def __init__(self, folder: Path, made_from: Any, *, force: bool = False) -> None:
        self.root = folder / "unfinished"
        self.folder = self.root / key(made_from)
        if self.root.exists():
            for other in self.root.iterdir():
                if force or other != self.folder:
                    shutil.rmtree(other)

    def part(self, name: str, compute: Callable[..., Any], *inputs: Any) -> Any:
        """The part as it was left, or compute(*inputs), kept."""
        path = self.folder / f"{name}.pt"
        if path.exists():
            with contextlib.suppress(RuntimeError, EOFError, pickle.UnpicklingError):  # a damaged part is made again
                return torch.load(path, weights_only=False)  # parts hold the project's own classes
        value = compute(*inputs)
        with atomic(path) as temporary:
            torch.save(value, temporary)
        return value

    def drop(self) -> None:
        """Throw all parts away: the stage is done."""
        shutil.rmtree(self.root, ignore_errors=True)
