"""Another forward pass for one module, for a while."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Let this module compute `forward`; its hooks, and its class, stay as they are.

    Returns:
        what gives it back the one that it had.
    """
    before = vars(module).get("forward")  # such as an adapter's fast one
    vars(module)["forward"] = forward
    return partial(_restore, module, before)


def _restore(module: nn.Module, before: Callable[..., Any] | None) -> None:
    if before is None:
        del vars(module)["forward"]
    else:
        vars(module)["forward"] = before
