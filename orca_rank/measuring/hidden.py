"""The hidden states between the blocks of a body, and how many dimensions the images fill there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.measuring.passes import Shared, check_seen, joined, mapped, portions, watch
from orca_rank.measuring.spectra import intrinsic_dimension

BLOCK = re.compile(r"(.*\b)?blocks\.\d+(?=\.)")


def block_of(layer: str) -> str:
    """The block that a layer stands in: its name up to `blocks.<i>`; one outside of blocks stands for itself."""
    found = BLOCK.match(layer)
    return layer if found is None else found.group()


def hidden_dimensions(
    model: Callable[[Any], object],
    modules: Mapping[str, nn.Module],
    blocks: Mapping[str, nn.Module],
    batches: Iterable[Sequence[Any]],
    samples: int,
    *,
    device: torch.device | str = "cpu",
    shared: Shared | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> dict[str, tuple[float, float]]:
    """Intrinsic dimension (TwoNN) of the hidden states that go into and come out of every block, as GeLoRA takes it
    (arXiv 2412.09250); the hidden state of an image is the mean over its tokens.

    Args:
        model: images -> anything; run without gradients. modules: the layers in question, by name, which tell how wide
            a block's hidden states are. blocks: by name, those and others; a layer outside of blocks counts as one.
        batches, samples, device, shared, advance: as in `activations.collect`.

    Returns:
        name of a block, or of a module outside of blocks -> dimensions at its input and at its output.

    Raises:
        ValueError: if a block takes no part, its states cannot be told apart by image, or fewer than 10 images differ.
    """
    names = list(dict.fromkeys(block_of(name) for name in modules))
    widths = {
        name: {width for module in modules if block_of(module) == name for width in _sides(modules[module])}
        for name in names
    }
    states: dict[str, tuple[list[tuple[slice, Tensor]], ...]] = {name: ([], []) for name in names}
    count = 0

    def keep(name: str, x: Tensor, output: Any) -> None:
        for end, state in zip(states[name], (x, output), strict=True):
            state = state[0] if isinstance(state, tuple) else state
            end.append((part.places(), pooled(state.detach(), len(part.own), widths[name], name)))

    watched = {name: modules.get(name) or blocks[name] for name in names}
    with watch(watched, keep) as seen, torch.no_grad():
        for part in portions(batches, samples, shared):
            if part.own:
                model(mapped(part.x, lambda values: values.to(device)))
            count += part.images
            advance(part.images)
    check_seen(watched, seen)
    return {
        name: (intrinsic_dimension(joined(before, count, shared)), intrinsic_dimension(joined(after, count, shared)))
        for name, (before, after) in states.items()
    }


def pooled(state: Tensor, images: int, widths: set[int], name: str) -> Float[Tensor, "images d"]:
    """The mean over tokens of (images, ..., d), or over pixels of (images, d, h, w): whichever axis is as wide as one
    of the block's layers.

    Raises:
        ValueError: where neither is, or images cannot be told apart.
    """
    if state.shape[-1] not in widths and state.ndim == 4 and state.shape[1] in widths:
        state = state.movedim(1, -1)
    if state.shape[-1] not in widths or state.numel() % (images * state.shape[-1]):
        raise ValueError(
            f"the hidden state of {name} has shape {tuple(state.shape)}, which is not a number of tokens of width "
            f"{' or '.join(map(str, sorted(widths)))} for each of {images} images: set "
            f"gap.measurements.intrinsic_dimension=false, or leave its layers out"
        )
    return state.reshape(images, -1, state.shape[-1]).float().mean(1).cpu()


def _sides(module: nn.Module) -> tuple[int, int]:
    d_out, d_in = module.get_parameter("weight").flatten(1).shape
    return d_in, d_out
