"""The only call to hydra.utils.instantiate."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from orca_rank.errors import foreseen, passes_through_package
from orca_rank.options import shown, unfit

PLACEHOLDER = "gaps"  # adapter.module.concentration=gaps: stage=finetune puts numbers in its place


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
        # As likely as not for a value of another kind, unless there is no such target.
        if cause is not None and not isinstance(cause, ImportError) and foreseen(cause) is None:
            check_kinds(get_object(node["_target_"]), {**plain_options(node), **extra})
        if cause is not None and passes_through_package(cause.__traceback__, but=__file__):
            raise cause from cause.__cause__
        reason = " ".join(str(cause or error).split())
        raise ValueError(f"could not build {node['_target_']}: {reason}") from error
    if isinstance(built, functools.partial):
        _check_names(built)
        check_kinds(built.func, built.keywords)
    else:
        check_kinds(get_object(node["_target_"]), {**plain_options(node), **extra})
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


def plain_options(node: Any) -> dict[str, Any]:
    """The options of a node, without Hydra's own and without those that are built themselves."""
    values: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return {
        str(name): value
        for name, value in values.items()
        if not str(name).startswith("_") and not targets({"value": value})
    }


def check_kinds(function: Any, values: Mapping[str, Any], *, ours: bool = True) -> None:
    """Refuse values of another kind than a function or class says it takes: maybe for true or false, a number for a
    name.

    Args:
        ours: look at those of this package only, whose annotations can be relied on.

    Raises:
        ValueError: with the option, what was received and what is expected.
    """
    if ours and not str(getattr(function, "__module__", "")).startswith("orca_rank"):
        return
    hints: dict[str, Any] = {}
    for one in (
        [vars(base).get("__init__") for base in reversed(function.__mro__)] if inspect.isclass(function) else [function]
    ):
        with contextlib.suppress(NameError, TypeError, AttributeError):  # annotations that only a type checker can read
            hints |= get_type_hints(one)
    for name in values.keys() & hints.keys():
        if values[name] != PLACEHOLDER and (expected := unfit(values[name], hints[name])) is not None:
            raise ValueError(f"{function.__qualname__}: {name}={shown(values[name])}: expected {expected}")


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
