"""What a fine-tuned model makes of arrays."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orca_rank.build import build_read
from orca_rank.fitted import Fitted, load
from orca_rank.normaliser import Normaliser


@torch.no_grad()
def predict(
    fitted: Fitted | str | Path,
    x: np.ndarray | Tensor,
    *,
    tag: str | None = None,
    batch_size: int = 64,
    trust: Collection[str] = (),
) -> np.ndarray:
    """What a fine-tuned model says of new inputs, which are normalised by the statistics of its training data.

    Args:
        fitted: a run folder, or what `load` gave. x: inputs (n, C, H, W), or (n, H, W) of one channel, or series
            (n, C, L) or (n, L), in the unit of the training data and as its files hold them: for Darcy flow the
            coefficient alone.
        tag, trust: see `load`. batch_size: inputs of a forward pass.

    Returns:
        what the task asks, such as class scores (n, classes) or fields (n, c, H, W), of series (n, c, L), in physical
            units.

    Raises:
        ValueError: for inputs of another shape or other channels, or as `load`.
    """
    model = fitted if isinstance(fitted, Fitted) else load(fitted, tag, trust)
    images, series = torch.as_tensor(x), model.task.series
    axes, whole, one = (3, "(n, C, L)", "(n, L)") if series else (4, "(n, C, H, W)", "(n, H, W)")
    images = images[:, None] if images.ndim == axes - 1 else images
    if images.ndim != axes or not len(images):
        raise ValueError(f"x has shape {tuple(x.shape)}: expected {whole}, or {one} of one channel, n >= 1")
    images = images[:, :, None] if series else images  # (n, C, 1, L)
    encode, device = _encoder(model, images, trust), next(model.parameters()).device
    found = []
    for part in images.split(batch_size):
        encoded = encode(part)  # (b, C, H, W)
        model.check(encoded)
        found.append(model(encoded.to(device)).cpu())
    answer = torch.cat(found).numpy()
    return answer.squeeze(-2) if series and answer.ndim > 2 and answer.shape[-2] == 1 else answer


def _encoder(fitted: Fitted, x: Tensor, trust: Collection[str]) -> Callable[[Tensor], Tensor]:
    """How inputs as files hold them become what the network sees."""
    inputs: Normaliser | None = fitted.inputs
    if inputs is None:
        return lambda part: part.float()
    inputs.check(tuple(x.shape[1:]))
    if x.shape[1] == fitted.task.input_shape[0]:
        return inputs.encode
    # A data module that does more than normalise, such as add coordinates.
    data: Any = build_read(fitted.metrics["config"]["data"], "data", trust, "metrics.json")
    data.given = inputs
    return data.encoder()
