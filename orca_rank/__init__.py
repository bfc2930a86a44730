"""Measure the modality gap of every layer of a pretrained vision transformer and adapt it with LoRA ranks to match."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orca_rank.fitted import load

__all__ = ["load"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    # Torch and timm take seconds to import: `import orca_rank` alone should not.
    if name == "load":
        from importlib import import_module

        return import_module("orca_rank.fitted").load
    raise AttributeError(f"module 'orca_rank' has no attribute {name!r}")
