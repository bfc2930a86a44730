"""Checkpoints of many small tensors, written as a few large ones: the cost of a file no longer counts its tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

BUFFERS = "packed"  # of a packed checkpoint: dtype -> all its values; a place there: (BUFFERS, dtype, start, shape)
SMALL = 2**16  # larger tensors stay as they are: their own cost is small beside their values', and nothing is copied


class PackedIO(TorchCheckpointIO):
    """Lightning's checkpoints, packed: torch.save takes a fraction of a millisecond for every tensor, and adapters with
    their optimiser's state are a thousand. Checkpoints that are not packed are read as they are."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        super().save_checkpoint(pack(checkpoint), path, storage_options)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return unpack(super().load_checkpoint(path, map_location, weights_only))


def pack(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The same nest of dicts, lists and tuples, with places in the buffers where dense tensors were."""
    values: dict[str, list[Tensor]] = {}
    ends: dict[str, int] = {}

    def put(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided or leaf.is_quantized or leaf.numel() > SMALL:
            return leaf
        dtype = str(leaf.dtype)
        start = ends.get(dtype, 0)
        ends[dtype] = start + leaf.numel()
        values.setdefault(dtype, []).append(leaf.detach().cpu().flatten())
        return (BUFFERS, dtype, start, tuple(leaf.shape))

    packed = {name: _map(value, put) for name, value in checkpoint.items()}
    return {**packed, BUFFERS: {dtype: torch.cat(parts) for dtype, parts in values.items()}}


def unpack(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What `pack` was given; a checkpoint that it did not make comes back as it is."""
    buffers = checkpoint.pop(BUFFERS, None)
    if buffers is None:
        return checkpoint

    def take(leaf: Any) -> Any:
        if not _is_place(leaf):
            return leaf
        _, dtype, start, shape = leaf
        size = torch.Size(shape)
        return buffers[dtype][start : start + size.numel()].view(size).clone()

    return {name: _map(value, take) for name, value in checkpoint.items()}


def _is_place(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 4 and value[0] == BUFFERS


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """A nest of plain containers with every leaf changed; the nest itself is new."""
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _map(one, change)) for key, one in value.items())
    if type(value) in (list, tuple) and not _is_place(value):
        return type(value)(_map(one, change) for one in value)
    return change(value)
