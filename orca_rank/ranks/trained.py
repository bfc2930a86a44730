"""Ranks from what was learned: train high, cut by one global threshold, train again (PARA, arXiv 2604.27796)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from orca_rank.measuring.records import LayerLike, as_layers
from orca_rank.ranks.allocate import greedy
from orca_rank.ranks.plan import Budget, RankPlan
from orca_rank.ranks.rules import need_budget
from orca_rank.ranks.theory import updates


def trained(
    layers: Sequence[LayerLike],
    budget: Budget | None = None,
    *,
    update: Mapping[str, ArrayLike] | str | Path | None = None,
) -> RankPlan:
    """Units of rank by s_k² of the trained ΔW per parameter, largest of all layers first, until the budget is spent:
    the ranks that one threshold on the spectra of all layers leaves. The budget decides the threshold, and what is then
    too little for the next unit is filled with cheaper ones below it, so that the plan is not exactly one threshold's.

    Args:
        update: layer -> ΔW (d_out, d_in) of exactly these layers, or the safetensors file of them that stage=finetune
            writes with finetune.keep_update=true, from a fine-tune of higher ranks than the budget affords.

    Raises:
        ValueError: without an update, or for one that does not fit the layers. FileNotFoundError: if there is no file.
    """
    records = as_layers(layers)
    limit = need_budget(budget, "trained")
    if update is None:
        raise ValueError(
            "rank=trained reads what a fine-tune has learned: set rank.update=<finetune folder>/update.safetensors"
        )
    matrices = updates(records, update)
    values = [np.square(np.linalg.svd(matrices[layer.name], compute_uv=False)) for layer in records]
    options = {"update": str(update)} if isinstance(update, str | Path) else {}
    return RankPlan(greedy(records, limit, values), "trained", limit, options)
