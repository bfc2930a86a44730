"""The only call to hydra.utils.instantiate."""

from __future__ import annotations

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate


def build(node: Any, **extra: Any) -> Any:
    """Instantiate a config node that carries a `_target_`; `extra` completes or replaces its options.

    An error that the target itself raises on bad input comes through unwrapped, so that the user reads one sentence.

    Raises:
        ValueError: if the node names no target, or one that cannot be imported or called with these options.
    """
    if node is None or "_target_" not in node:
        raise ValueError(f"this part of the config names no _target_ to build: {node}")
    try:
        return instantiate(node, _convert_="all", **extra)
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, TypeError | ImportError | AttributeError):
            raise ValueError(f"could not build {node['_target_']}: {error}") from error
        raise cause from None
