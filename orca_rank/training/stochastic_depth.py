"""Stochastic depth where several processes share a batch: the same samples skip the same blocks as in one process."""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import DropPath
from torch import Tensor, nn


class SharedPaths:
    """Lets a model's DropPath modules draw for the whole batch and keep the draws of this process's samples.

    Args:
        model: whose DropPath modules are changed in place. rank, size: of the process, whose samples are every size-th
            of a batch from number `rank` on, or its first where that is none.
    """

    def __init__(self, model: nn.Module, rank: int, size: int) -> None:
        self.rank, self.size, self.count = rank, size, 0
        self.draws = torch.Generator()
        for module in model.modules():
            if isinstance(module, DropPath):
                # No hook: those keep adapters from their fast paths.
                module.forward = partial(self._drop, module)  # type: ignore[method-assign]  # of this instance

    def begin(self, seed: int, count: int, device: torch.device) -> None:
        """Before a batch of `count` samples in all: draw what one process draws after torch.manual_seed(seed)."""
        self.count = count
        self.draws = torch.Generator(device).manual_seed(seed)

    def _drop(self, module: DropPath, x: Tensor) -> Tensor:
        if module.drop_prob == 0 or not module.training:
            return x
        keep = 1 - module.drop_prob
        paths = x.new_empty(self.count).bernoulli_(keep, generator=self.draws)
        if keep > 0 and module.scale_by_keep:
            paths = paths / keep
        own = paths[self.rank :: self.size] if self.count > self.rank else paths[:1]
        return x * own.view(-1, *(1,) * (x.ndim - 1))
