"""Whether every adapter takes part in what the model computes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from orca_rank.adapters.linear import adapters
from orca_rank.adapters.peft_backed import tuner_of


def probe(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    """Run once, and check that a gradient reaches every adapter; nothing of the model is changed.

    A gradient of zero is one: it is what a residual branch gives whose last norm starts at zero.

    Args:
        model: with adapters. forward: calls it, or what it is a part of, on one batch.

    Raises:
        ValueError: naming the layers that the output does not depend on.
    """
    tuner = tuner_of(model)
    layers: dict[str, nn.Module] = {**adapters(model), **(tuner.layers() if tuner else {})}
    learning = {name: [p for p in layer.parameters() if p.requires_grad] for name, layer in layers.items()}
    flat = [p for parameters in learning.values() for p in parameters]
    with torch.enable_grad():
        output = forward()
        reached = output.requires_grad and bool(flat)
        grads = torch.autograd.grad(output.sum(), flat, allow_unused=True) if reached else [None] * len(flat)
    alive = {id(p) for p, grad in zip(flat, grads, strict=True) if grad is not None}
    if dead := [name for name, parameters in learning.items() if not any(id(p) in alive for p in parameters)]:
        raise ValueError(
            f"{len(dead)} of {len(layers)} adapters get no gradient and would never train, the first {dead[0]}: the "
            "model neither calls that layer nor is known to read its weight. Leave such layers out of the rank plan"
        )
