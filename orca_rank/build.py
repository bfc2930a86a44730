"""The only call to hydra.utils.instantiate."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

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
        reason = " ".join(str(cause or error).split())
        raise ValueError(f"could not build {node['_target_']}: {reason}") from error
    if isinstance(built, functools.partial):
        _check_names(built)
    return built


def targets(node: Any) -> set[str]:
    """Every `_target_` in plain values or a config node, however deep."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, Mapping):
        own = {str(node["_target_"])} if "_target_" in node else set()
        return own.union(*(targets(value) for value in node.values()))
    return set().union(*(targets(value) for value in node)) if isinstance(node, list | tuple) else set()


def build_read(node: Any, room: str, trusted: Collection[str], where: str) -> Any:
    """`build` for a node that was read from a file, after `check_targets`."""
    check_targets(node, room, trusted, where)
    return build(node)


def check_targets(node: Any, room: str, trusted: Collection[str], where: str) -> None:
    """Refuse a node that was read from a file, which may name anything, unless all that it would import and call is
    defined in one room of this package, or `trusted`.

    Args:
        room: such as "predictors". trusted: further targets. where: the file, for the message.

    Raises:
        ValueError: for any other target.
    """
    home = f"orca_rank.{room}"
    for target in sorted(targets(node) - set(trusted)):
        found = None
        if target.startswith(f"{home}."):
            with contextlib.suppress(Exception):  # it is not there, however Hydra says so
                found = get_object(target)
        if not str(getattr(found, "__module__", "")).startswith(home):
            raise ValueError(
                f"{where} names {target}, which is not part of {home} and could run any code: if you know it, repeat "
                f"the command with the config that names it, or orca_rank.load with trust=[{target!r}]"
            )


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
