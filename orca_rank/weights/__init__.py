"""Weights that come with the package. README.md here is their model card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def record(name: str) -> dict[str, Any]:
    """What is known of shipped weights: their files, the backbone's name and options, a recorded output.

    Raises:
        KeyError: if no such weights are shipped.
    """
    path = _FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.json"))) or "none"
        raise KeyError(f"no weights {name!r} come with this package; it has: {known}")
    return json.loads(path.read_text())


def shipped(name: str, kind: str = "weights") -> Path:
    """The path of a shipped file, after a check of its SHA-256.

    Args:
        name: such as "swin_micro". kind: "weights", or "source" for the sample of source features beside them.

    Raises:
        KeyError: if no such weights are shipped. FileNotFoundError, ValueError: if the file is gone or was changed.
    """
    expected = record(name)[kind]
    path = _FOLDER / expected["file"]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the installation: install orca_rank again")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected["sha256"]:
        raise ValueError(
            f"{path} is not the file that was shipped: SHA-256 {found}, expected {expected['sha256']}; install "
            f"orca_rank again, or name your own with "
            f"{'backbone.pretrained' if kind == 'weights' else 'source.file'}=<path>"
        )
    return path
