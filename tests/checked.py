"""The type checker of the test run: an int is a float to it, as it is to Python's typing (PEP 484)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its types checked, from its first call on: most of a package is not called in one test process,
    and writing the checks of a function takes longer than most calls."""
    checked: Callable[..., Any] | None = None

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        checked = checked or _check(function)
        return checked(*args, **kwargs)

    return call
