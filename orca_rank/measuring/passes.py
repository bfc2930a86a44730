"""Passes of images through a model whose modules are watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from orca_rank.processes import add_up


def limited(batches: Iterable[Sequence[Any]], limit: int) -> Iterator[tuple[Any, Any]]:
    """(x, y) of the first `limit` images of (x, y, ...) batches, read only as far as needed.

    x is a tensor, or a mapping of tensors by the name of a model's argument; y a tensor, or None.
    """
    seen = 0
    for x, y, *_ in batches:
        images = count_of(x)
        rest = slice(min(limit - seen, images))
        yield mapped(x, lambda values: values[rest]), None if y is None else y[rest]  # noqa: B023 (called at once)
        seen += images
        if seen >= limit:
            return


class Shared(NamedTuple):
    """How processes share batches: process `rank` of `size` sees every size-th image of each from number `rank` on,
    and one to be left out where that is none. images: of a whole batch, by its number."""

    rank: int
    size: int
    images: Callable[[int], int]


class Portion(NamedTuple):
    """What this process sees of a batch. x, y: as in `limited`, its own images. own: their numbers among all images of
    the pass. images: of the whole batch."""

    x: Any
    y: Any
    own: range
    images: int

    def places(self, limit: int | None = None) -> slice:
        """Those of the own images in tensors of all, or of all below `limit`."""
        return slice(self.own.start, self.own.stop if limit is None else min(self.own.stop, limit), self.own.step)


def portions(batches: Iterable[Sequence[Any]], limit: int, shared: Shared | None) -> Iterator[Portion]:
    """What this process sees of the first `limit` images, a batch at a time: all of it where it is alone, and nothing
    (x of no image) of a last batch that has fewer images than there are processes."""
    seen = 0
    if shared is None:
        for x, y in limited(batches, limit):
            images = count_of(x)
            yield Portion(x, y, range(seen, seen + images), images)
            seen += images
        return
    for index, (x, y, *_) in enumerate(batches):
        images = min(limit - seen, shared.images(index))
        own = range(seen + shared.rank, seen + images, shared.size)
        rows = slice(len(own))
        yield Portion(mapped(x, lambda values: values[rows]), None if y is None else y[rows], own, images)  # noqa: B023 (called at once)
        seen += images
        if seen >= limit:
            return


def joined(pieces: Sequence[tuple[slice, Tensor]], images: int, shared: Shared | None) -> Tensor:
    """The rows (images, ...) of a pass from pieces of them and their places; all together where it is shared."""
    if shared is None:
        return torch.cat([rows for _, rows in pieces])
    whole = pieces[0][1].new_zeros(images, *pieces[0][1].shape[1:])
    for place, rows in pieces:
        whole[place] = rows
    add_up(whole)
    return whole


def count_of(x: Tensor | Mapping[str, Tensor]) -> int:
    """How many images a batch has."""
    return len(x if isinstance(x, Tensor) else next(iter(x.values())))


def mapped(x: Tensor | Mapping[str, Tensor], change: Callable[[Tensor], Tensor]) -> Tensor | dict[str, Tensor]:
    """A batch with every tensor of it changed."""
    return change(x) if isinstance(x, Tensor) else {name: change(values) for name, values in x.items()}


class Reads(TorchFunctionMode):
    """Sees every product with one of these weights, whoever makes it.

    Args:
        weights: name -> weight. inside: names of modules that are running. seen: called with name, input and output of
            a product that is not such a module's own.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], inside: set[str], seen: Callable[[str, Tensor, Tensor], None]
    ) -> None:
        super().__init__()
        self.weights = dict(weights)  # held, so that no other tensor can take over an id
        self.names, self.inside, self.seen = {id(weight): name for name, weight in weights.items()}, inside, seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        output = function(*args, **named)
        if function is F.linear:
            weight = args[1] if len(args) > 1 else named["weight"]
            name = self.names.get(id(weight))
            if name is not None and name not in self.inside:
                self.seen(name, args[0] if args else named["input"], output)
        return output


@contextmanager
def watch(modules: Mapping[str, nn.Module], seen: Callable[[str, Tensor, Any], None]) -> Iterator[set[str]]:
    """Call seen(name, input, output) whenever one of the modules has run, or its weight has been read for `F.linear`.

    timm's SwinV2, BEiT and EVA-02 never call ``attn.qkv``, so that a hook on it alone is never run.

    Yields:
        the names seen so far, for `check_seen`.
    """
    inside: set[str] = set()
    names: set[str] = set()

    def note(name: str, x: Tensor, output: Any) -> None:
        names.add(name)
        seen(name, x, output)

    def before(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, given: inside.add(name)

    def after(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            inside.discard(name)
            note(name, given[0], output)

        return hook

    weights = {name: module.weight for name, module in modules.items() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_pre_hook(before(name)) for name, module in modules.items()]
    handles += [module.register_forward_hook(after(name)) for name, module in modules.items()]
    try:
        # Only where a weight may be read: the mode passes every call of torch through Python.
        with Reads(weights, inside, note) if weights else nullcontext():
            yield names
    finally:
        for handle in handles:
            handle.remove()


def check_seen(modules: Mapping[str, nn.Module], names: set[str]) -> None:
    """Refuse to go on where images have passed and a module has not been seen.

    Raises:
        ValueError: naming it.
    """
    if missing := [name for name in modules if name not in names]:
        raise ValueError(
            f"{missing[0]} took no part in the forward pass ({len(missing)} of {len(modules)} such layers): the model "
            "neither calls it nor multiplies by its weight in F.linear, so that nothing reaches it; leave it out"
        )
