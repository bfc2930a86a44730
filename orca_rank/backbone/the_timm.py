"""timm without what it imports for its own training scripts alone."""

from __future__ import annotations

import sys

_there = "wandb" in sys.modules
if not _there:  # timm would import it, which takes a second
    sys.modules["wandb"] = None  # type: ignore[assignment]  # Python's own way to say: not to be found
import timm  # noqa: E402
from timm.layers import PatchEmbed  # noqa: E402

if not _there:
    del sys.modules["wandb"]

__all__ = ["PatchEmbed", "timm"]
