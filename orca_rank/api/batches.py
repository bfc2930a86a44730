"""Batches as users have them, made into what measuring and alignment read: (x, y) with x a tensor or named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from orca_rank.measuring.passes import count_of, limited

IMAGES = ("x", "image", "images")  # passed to the model by place, not by name
LABELS = ("labels", "label", "y", "target", "targets")
ACCEPTED = (
    "a tensor or array x; a tuple or list (x,), (x, y) or longer; or a dict with x, image, images or the names of the "
    "model's own arguments such as pixel_values, and labels, label, y, target or targets"
)


class Batch(NamedTuple):
    """x: (B, ...), or tensors (B, ...) by the name of the model's argument; y: (B, ...) or None."""

    x: Tensor | dict[str, Tensor]
    y: Tensor | None


def batches_of(data: Any, batch_size: int, side: str) -> Iterator[Batch]:
    """The batches of a loader, of any other iterable of batches, or of one tensor or array of images.

    Args:
        batch_size: of a tensor or array (n, ...). side: "source" or "target", for messages.

    Raises:
        TypeError: for something that gives no batches, or a batch of another form.
    """
    if isinstance(data, Tensor | np.ndarray):
        yield from (Batch(x, None) for x in torch.as_tensor(data).split(batch_size))
        return
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"{side} is a {type(data).__name__}, which gives single images: wrap it in a torch DataLoader, which gives "
            f"batches"
        )
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        raise TypeError(f"{side} is a {type(data).__name__}: expected a loader, or an iterable of batches")
    yield from (one for given in data if count_of((one := batch_of(given, side)).x))


def batch_of(given: Any, side: str) -> Batch:
    """One batch of any accepted form.

    Raises:
        TypeError: for another form. ValueError: for tensors of different lengths.
    """
    x, y = given, None
    if isinstance(given, Mapping):
        named = {name: value for name, value in given.items() if name not in LABELS and value is not None}
        y = next((given[name] for name in LABELS if name in given), None)
        place = next((name for name in IMAGES if name in named), None)
        x = named if place is None else named[place]
    elif isinstance(given, Sequence) and not isinstance(given, str | bytes) and len(given):
        x, y = given[0], given[1] if len(given) > 1 else None
    result = Batch(_inputs(x, side), None if y is None else _tensor(y, side))
    lengths = {len(value) for value in _all(result)}
    if len(lengths) != 1:
        raise ValueError(f"the tensors of a {side} batch have different lengths: {sorted(lengths)}")
    return result


def gathered(data: Any, limit: int, side: str) -> tuple[Tensor, Tensor | None]:
    """The first `limit` images (n, ...) of what `batches_of` takes, and their labels, None where a batch has none.

    Raises:
        ValueError: if there are no images, or they come as named tensors.
    """
    xs: list[Tensor] = []
    ys: list[Tensor | None] = []
    for x, y in limited(batches_of(data, 64, side), limit):
        if not isinstance(x, Tensor):
            raise ValueError(f"the {side} batches hold named tensors: expected one tensor of images x in every batch")
        xs.append(x)
        ys.append(y)
    if not xs:
        raise ValueError(empty(side))
    labels = [y for y in ys if y is not None]
    return torch.cat(xs), torch.cat(labels) if len(labels) == len(xs) else None


def empty(side: str) -> str:
    return f"the {side} loader gave no images: a generator gives its batches only once; a DataLoader or a list, anew"


def _inputs(x: Any, side: str) -> Tensor | dict[str, Tensor]:
    if isinstance(x, Mapping) and x:
        return {str(name): _tensor(value, side) for name, value in x.items()}
    return _tensor(x, side)


def _tensor(value: Any, side: str) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.as_tensor(value)
    if not isinstance(value, Tensor) or value.ndim == 0:
        what = "a tensor without dimensions" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TypeError(f"a {side} batch holds {what}: expected {ACCEPTED}")
    return value


def _all(batch: Batch) -> list[Tensor]:
    found = [batch.x] if isinstance(batch.x, Tensor) else list(batch.x.values())
    return found if batch.y is None else [*found, batch.y]
