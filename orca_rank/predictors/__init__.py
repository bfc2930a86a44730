"""From the body's features to what the task asks for. `predictor=<name>` chooses one; yours is one `_target_`.

A predictor is built as ``factory(stages, output_shape)``, where `stages` (`Stages`) says what the body offers and
`output_shape` is (classes,), (labels,) or (numbers,), (c, H, W) of a field or (classes, H, W) of a segmentation. It
is a module whose attribute `reads` lists the stages it wants, as indices into `stages` (negative ones count from the
last), and whose ``forward(maps)`` receives their feature maps in order, each (B, h, w, d): tokens at their places,
class and register tokens left out, the last stage after the final normalisation. It returns (B, *output_shape); fields
and vectors are in the task's normalised units. A module without `reads` receives what the body returns, as it is.
Reading the last stage alone costs nothing beside the body.
"""

from __future__ import annotations

from typing import NamedTuple


class Stages(NamedTuple):
    """What a body offers, shallow to deep: the stages of a hierarchy, or the blocks of a columnar ViT.

    widths: features d of each. reductions: image pixels per token of each. image: pixels (H, W) that the embedder
    resizes to.
    """

    widths: tuple[int, ...]
    reductions: tuple[int, ...]
    image: tuple[int, int]
