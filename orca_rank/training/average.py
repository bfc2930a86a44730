"""The moving average of the weights over a run's steps, which is what is judged and kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor


def decay_at(step: int, decay: float) -> float:
    """β_t = min(β, (1 + t)/(10 + t)) after optimiser step t = 1, 2, …: a short run forgets its start too."""
    return min(decay, (1 + step) / (10 + step))


class Average(Callback):
    """θ̄ ← β_t θ̄ + (1 − β_t) θ after every optimiser step, with β_t as `decay_at` gives it; θ̄ is θ at the start.

    Validation during training is of the average, and `values` are what a fine-tune keeps; training goes on with θ.

    Means are of what steps move. Counters, masks and copies of an earlier θ say what the model is, and a mean of two of
    them describes neither: they are those of θ. Where a step sets parameters anew, as it prunes them or starts them
    afresh, earlier values are another model's, and the average begins there again.

    Args:
        decay: β. tensors: what training changes, each call giving the model's own tensors. learned: the names of those
            that are averaged; the others are copied. renewed: called after each step, name -> a mask that broadcasts
            of the entries that it set anew.
    """

    def __init__(
        self,
        decay: float,
        tensors: Callable[[], dict[str, Tensor]],
        learned: Collection[str],
        renewed: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        self.decay, self.tensors, self.learned, self.renewed = decay, tensors, frozenset(learned), renewed
        self.values: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.steps = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        own = self.tensors()
        found = self.values or own
        self.values = {name: found[name].detach().clone().to(tensor.device) for name, tensor in own.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        if trainer.global_step == self.steps:
            return
        self.steps = trainer.global_step
        rest = 1 - decay_at(self.steps, self.decay)
        own = self.tensors()
        for name, tensor in own.items():
            if name in self.learned:
                self.values[name].lerp_(tensor, rest)
            else:
                self.values[name].copy_(tensor)
        for name, mask in self.renewed().items():
            torch.where(mask, own[name], self.values[name], out=self.values[name])

    @torch.no_grad()
    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self.values:
            own = self.tensors()
            self.kept = {name: tensor.detach().clone() for name, tensor in own.items()}
            for name, tensor in own.items():
                tensor.copy_(self.values[name])

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.kept:
            for name, tensor in self.tensors().items():
                tensor.copy_(self.kept[name])
            self.kept = {}

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values, self.steps = state_dict["values"], state_dict["steps"]
