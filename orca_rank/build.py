"""The only call to hydra.utils.instantiate."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from orca_rank.errors import passes_through_package


def build(node: Any, **extra: Any) -> Any:
    """Instantiate a config node that carries a `_target_`; `extra` completes or replaces its options.

    An error that a target of this package raises comes through unwrapped, so that the user reads one sentence; what
    another library says of its options is quoted.

    Raises:
        ValueError: if the node names no target, or one that cannot be imported or called with these options.
    """
    if node is None or "_target_" not in node:
        raise ValueError(f"this part of the config names no _target_ to build: {node}")
    try:
        built = instantiate(node, _convert_="all", **extra)
    except InstantiationException as error:
        cause = error.__cause__
        if cause is not None and passes_through_package(cause.__traceback__, but=__file__):
            raise cause from cause.__cause__
        raise ValueError(f"could not build {node['_target_']}: {cause or error}") from error
    if isinstance(built, functools.partial):
        _check_names(built)
    return built


def _check_names(built: functools.partial) -> None:
    """Refuse an option that the function does not have now, and not in the middle of the work."""
    try:
        signature = inspect.signature(built.func)
    except ValueError:  # a function in C may have none
        return
    try:
        signature.bind_partial(*built.args, **built.keywords)
    except TypeError as error:
        raise ValueError(f"could not build {built.func.__qualname__}: {error}") from error
