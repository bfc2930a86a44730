"""Passes of images through a model whose modules are watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


def limited(batches: Iterable[Sequence[Tensor]], limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, y) of the first `limit` images of (x, y, ...) batches, read only as far as needed."""
    seen = 0
    for x, y, *_ in batches:
        yield x[: limit - seen], y[: limit - seen]
        seen += len(x)
        if seen >= limit:
            return


@contextmanager
def watch(modules: Mapping[str, nn.Module], seen: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call seen(name, input, output) whenever one of the modules has run."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, given, output: seen(name, given[0], output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def linear(body: nn.Module, name: str) -> nn.Linear:
    """The Linear of this name.

    Raises:
        TypeError: if the module is no Linear.
    """
    module = body.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}; only Linear modules are measured")
    return module
