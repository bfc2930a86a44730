"""What a training loop calls around its steps; each walks the adapters and does nothing where none needs it."""

from typing import Any

import torch
from torch import Tensor, nn

from orca_rank.adapters.dylora import DyLoRA, begin_dylora
from orca_rank.adapters.linear import adapted, adapters
from orca_rank.adapters.peft_backed import tuner_of


def begin_step(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Before the first forward pass of an optimiser step: draw ranks, gates, projections.

    Raises:
        ValueError: if the model is merged, because a merged adapter does not learn.
    """
    if merged := [name for name, module in adapted(model).items() if module.merged]:
        raise ValueError(f"{merged[0]} is merged and would not learn; call unmerge(model) before training")
    begin_dylora(model, generator)
    for adapter in adapters(model).values():
        if not isinstance(adapter, DyLoRA):
            adapter.begin_step(generator)


def end_step(model: nn.Module) -> None:
    """After the optimiser's step: put frozen rows back, fold projections, follow the product."""
    for adapter in adapters(model).values():
        adapter.end_step()
    if tuner := tuner_of(model):
        tuner.end_step()


def extra_loss(model: nn.Module) -> Tensor | float:
    """The sum of the terms that adapters add to the loss; 0.0 when none has one."""
    terms = [term for adapter in adapters(model).values() if (term := adapter.extra_loss()) is not None]
    if (tuner := tuner_of(model)) and (term := tuner.extra_loss()) is not None:
        terms.append(term)
    return torch.stack(terms).sum() if terms else 0.0


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
