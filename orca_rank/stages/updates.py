"""What training did to every layer, as a matrix: update.safetensors, which rank=trained and rank=theory read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from orca_rank.adapters import adapters
from orca_rank.measuring import matrices
from orca_rank.measuring.activations import module_of
from orca_rank.measuring.records import Layer


def update_of(body: nn.Module, layers: Sequence[Layer], injected: bool) -> Callable[[], dict[str, Tensor]]:
    """A function that gives layer -> ΔW (d_out, d_in): an adapter's own, or how far the weights have moved by then.

    Raises:
        ValueError: if an adapter's change is no matrix added to W₀.
    """
    if not injected:
        start = {layer.name: weight_of(body, layer.name).clone() for layer in layers}
        return lambda: {name: weight_of(body, name) - before for name, before in start.items()}
    found = adapters(body)

    def learned() -> dict[str, Tensor]:
        deltas = {name: adapter.delta_weight() for name, adapter in found.items()}
        size = {layer.name: (layer.d_out, layer.d_in) for layer in layers}
        like = next(iter(deltas.values()))
        return {name: deltas.get(name, like.new_zeros(shape)) for name, shape in size.items()}

    if not found or not all(hasattr(adapter, "delta_weight") for adapter in found.values()):
        raise ValueError("finetune.keep_update=true needs an adapter of this package with a ΔW, such as adapter=lora")
    learned()  # one without a ΔW says so before the work
    return learned


def weight_of(body: nn.Module, layer: str) -> Tensor:
    """The matrix of a layer, detached: a whole one, or the third of a fused one that q, k or v is."""
    module = module_of(layer, body)
    weight = matrices.weight_of(matrices.matrix_of(body, module)).detach()
    return weight if module == layer else weight.chunk(3)["qkv".index(layer.rpartition(".")[2])]
