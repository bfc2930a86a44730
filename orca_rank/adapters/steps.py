"""What a training loop calls around its steps; each does nothing where no adapter needs it."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orca_rank.adapters.dylora import DyLoRA, begin_dylora
from orca_rank.adapters.elastic import ElaLoRA, reallocate
from orca_rank.adapters.linear import adapted, adapters
from orca_rank.adapters.lora import LoRA
from orca_rank.adapters.peft_backed import tuner_of


class Steps:
    """The adapters of a model around the steps of one run: found once, since walking a model costs as much as a layer.

    Args:
        model: with all the adapters that it will have.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules, self.adapters, self.tuner = adapted(model), list(adapters(model).values()), tuner_of(model)
        self.nested = [adapter for adapter in self.adapters if isinstance(adapter, DyLoRA)]
        self.elastic = [adapter for adapter in self.adapters if isinstance(adapter, ElaLoRA)]
        self.others = [adapter for adapter in self.adapters if not isinstance(adapter, DyLoRA)]

    def run_of(self, steps: int) -> None:
        """Tell adapters with a schedule how many optimiser steps the run has."""
        if self.tuner:
            self.tuner.run_of(steps)
        for adapter in self.adapters:
            adapter.run_of(steps)

    def begin(self, generator: torch.Generator | None = None) -> None:
        """Before the first forward pass of an optimiser step: draw ranks, gates, projections.

        Raises:
            ValueError: if the model is merged, because a merged adapter does not learn.
        """
        if merged := [name for name, module in self.modules.items() if module.merged]:
            raise ValueError(f"{merged[0]} is merged and would not learn; call unmerge(model) before training")
        begin_dylora(self.nested, generator)
        for adapter in self.others:
            adapter.begin_step(generator)

    def end(self) -> None:
        """After the optimiser's step: put frozen rows back, fold projections, follow the product, move
        ranks."""
        for adapter in self.adapters:
            adapter.end_step()
        reallocate(self.elastic)
        if self.tuner:
            self.tuner.end_step()

    def extra_loss(self) -> Tensor | float:
        """The sum of the terms that adapters add to the loss; 0.0 when none has one."""
        terms = [term for adapter in self.adapters if (term := adapter.extra_loss()) is not None]
        if self.tuner and (term := self.tuner.extra_loss()) is not None:
            terms.append(term)
        return torch.stack(terms).sum() if terms else 0.0

    @property
    def settled(self) -> bool:
        """Whether every schedule is over by which a model before is of another kind than the one the run ends with:
        ranks that move, a budget that shrinks, a W that does not follow yet."""
        return all(adapter.settled for adapter in self.adapters) and (self.tuner is None or self.tuner.settled)

    def renewed(self) -> dict[str, Tensor]:
        """Parameter, by its name in the model -> a mask of what the last step set anew in it, see `LoRA.renewed`."""
        found = self.tuner.renewed() if self.tuner else {}
        for prefix, adapter in self._named():
            found |= {f"{prefix}.{name}": mask for name, mask in adapter.renewed().items()}
        return found

    def learned_buffers(self) -> set[str]:
        """The buffers that steps move as they do parameters, by their names in the model."""
        return {f"{prefix}.{name}" for prefix, adapter in self._named() for name in adapter.learned_buffers}

    def _named(self) -> Iterator[tuple[str, LoRA]]:
        for name, module in self.modules.items():
            yield from ((f"{name}.branches.{part}", branch) for part, branch in module.parts.items())

    def state_dict(self) -> dict[str, Any]:
        """What adapters go on from beside their tensors, as tensors and plain values."""
        return self.tuner.state_dict() if self.tuner else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        if self.tuner:
            self.tuner.load_state_dict(state)


def begin_step(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """`Steps.begin`, for a loop that walks the model in every step."""
    Steps(model).begin(generator)


def end_step(model: nn.Module) -> None:
    """`Steps.end`, likewise."""
    Steps(model).end()


def extra_loss(model: nn.Module) -> Tensor | float:
    """`Steps.extra_loss`, likewise."""
    return Steps(model).extra_loss()


def moved_ranks(model: nn.Module) -> dict[str, int]:
    """Layer -> the rank that it has now, of adapters that move ranks in training (AdaLoRA, ElaLoRA); else empty."""
    found = {name: int(one.alive.sum()) for name, one in adapters(model).items() if isinstance(one, ElaLoRA)}
    tuner = tuner_of(model)
    return found | (tuner.ranks() if tuner else {})


def scales(model: nn.Module) -> dict[str, float]:
    """Layer -> the scale s of its update as it is in effect, whatever α and rank it comes from."""
    tuner = tuner_of(model)
    return {name: one.scale for name, one in adapters(model).items()} | (tuner.scales() if tuner else {})


def parameter_groups(model: nn.Module, lr: float, ratio: float = 1.0) -> list[dict[str, Any]]:
    """Optimiser groups of the trainable parameters; LoRA+ (Hayou et al. 2024) trains B at ``ratio`` × ``lr``.

    Returns:
        Non-empty groups with ``params``, ``lr`` and ``name`` ("base" or "lora_B").

    Raises:
        ValueError: unless lr and ratio are positive.
    """
    if not (lr > 0 and ratio > 0):
        raise ValueError(f"lr is {lr}, ratio is {ratio}; expected positive numbers")
    fast = {id(p) for adapter in adapters(model).values() for p in adapter.parameters_like_b()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"name": "base", "params": [p for p in trained if id(p) not in fast], "lr": lr},
        {"name": "lora_B", "params": [p for p in trained if id(p) in fast], "lr": lr * ratio},
    ]
    return [group for group in groups if group["params"]]
