"""One streaming pass over a frozen body: what reaches the input of every adaptable layer.

Memory is 4 bytes × (samples + tokens) × the sum of the widths, whatever the size of the dataset. The buffers are laid
out once: small pieces kept between the large temporaries of a forward pass would tear the heap apart (5 × as much).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.measuring.matrices import inputs_of
from orca_rank.measuring.passes import Shared, check_seen, joined, mapped, portions, watch
from orca_rank.processes import add_up


class Inputs(NamedTuple):
    """What one layer received.

    pooled: the mean over the tokens of each image, for gaps. tokens: a few tokens of each image at random places, for
    spectra, of the first p ≤ n images; the image stays the first axis because tokens of one image are correlated.
    """

    pooled: Float[Tensor, "n d"]
    tokens: Float[Tensor, "p t d"]


def module_of(layer: str, body: nn.Module) -> str:
    """The module behind a layer name: `<module>.q`, `.k` and `.v` are thirds of one fused matrix with one input."""
    parent, _, part = layer.rpartition(".")
    modules = dict(body.named_modules())
    if layer in modules:
        return layer
    if part in ("q", "k", "v") and parent in modules:
        return parent
    raise ValueError(f"the body has no module for the layer {layer!r}")


def collect(
    model: Callable[[Any], object],
    modules: Mapping[str, nn.Module],
    batches: Iterable[Sequence[Any]],
    samples: int,
    *,
    tokens: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    shared: Shared | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> tuple[dict[str, Inputs], Tensor | None]:
    """Pass up to `samples` images through the model and keep what reaches each module.

    Args:
        model: images (B, C, H, W) -> anything; run without gradients. modules: the layers to watch, by name.
        batches: (x, y, ...) batches as in `limited`, read only as far as needed. samples: images to keep.
        tokens: how many tokens to keep for spectra in all, the same number of each image (all, if it has fewer) and one
            of each of the first `tokens` where there are more images than that; 0 for none.
        seed: of the places of the tokens, drawn anew for every batch and module.
        shared: how processes share the batches, each of which returns what one alone would; None for one alone.
        advance: called with the number of images after every batch, for a progress bar.

    Returns:
        module -> `Inputs` on the CPU, and the labels or fields y (n, ...), None where the batches have none.

    Raises:
        ValueError: if there are no images, a module takes no part, what reaches it cannot be told apart by image, or
            holds NaN or infinity.
    """
    generator = torch.Generator().manual_seed(seed)
    each, bearers = max(1, tokens // samples), min(samples, tokens)  # tokens of an image, images that give some
    pooled: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    labels: list[tuple[slice, Tensor]] = []
    count = 0
    blank = torch.empty if shared is None else torch.zeros  # what others fill is added

    def keep(
        name: str, x: Tensor, _: Tensor
    ) -> None:  # x (B, ..., d), or windows (B nW, ..., d) with the image outermost
        x = inputs_of(modules[name], x.detach())
        images = len(part.own)
        if x.numel() % (images * x.shape[-1]):
            raise ValueError(
                f"what reaches {name} has shape {tuple(x.shape)}, which is not a number of tokens for each of the "
                f"{images} images: leave it out"
            )
        x = x.reshape(images, -1, x.shape[-1]).float()
        if name not in pooled:
            pooled[name] = blank(samples, x.shape[2])
            kept[name] = blank(bearers, min(each, x.shape[1]), x.shape[2])
        pooled[name][part.places()] = x.mean(1)
        if count < bearers:  # also where the own ones are all after them: every process draws the same
            place = torch.randperm(x.shape[1], generator=generator)[: kept[name].shape[1]]
            rows = kept[name][part.places(bearers)]
            rows.copy_(x[: len(rows), place.to(x.device)])

    with watch(modules, keep) as names, torch.no_grad():  # no inference mode: a model may keep what it makes
        for part in portions(batches, samples, shared):
            if part.own:
                model(mapped(part.x, lambda values: values.to(device)))
                if part.y is not None:
                    labels.append((part.places(), part.y.cpu()))
            count += part.images
            advance(part.images)
    if not count:
        raise ValueError("there are no images to measure: the data loader is empty")
    check_seen(modules, names)
    for name, rows in pooled.items():
        if shared is not None:
            add_up(rows[:count], kept[name][:count])
        if not torch.isfinite(rows[:count]).all():
            raise ValueError(f"the input of {name} holds NaN or infinity: check the data and the embedder")
    result = {name: Inputs(pooled[name][:count], kept[name][:count]) for name in modules}
    return result, joined(labels, count, shared) if labels else None
