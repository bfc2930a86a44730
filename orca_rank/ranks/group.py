"""Layers that share their measurements: one number for a block, a stage or a kind of module."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from orca_rank.measuring.hidden import block_of
from orca_rank.measuring.records import Dimension, Gap, Layer, WeightRank

BY = ("block", "stage", "module")


def averaged(layers: Sequence[Layer], by: str | None) -> list[Layer]:
    """The layers with every scalar measurement replaced by its group's mean, so that a rule gives them equal weight.

    Of a gap the value and both ends of its interval are averaged and the smallest p-value is kept: it is that of the
    most different layer, not a p-value of the mean. What one layer lacks, none of the group has. Spectra stay each
    layer's own.

    Args:
        by: `block` (all up to `blocks.<i>`), `stage` (`layers.<s>` of a Swin) or `module` (what follows the block, such
            as `mlp.fc1`, across all blocks); None leaves the layers as they are. A layer that stands in no block is a
            block of its own.

    Raises:
        ValueError: for another `by`, or `stage` where the model has none (a ViT).
    """
    if by is None:
        return list(layers)
    if by not in BY:
        raise ValueError(f"layers.group must be null or one of {', '.join(BY)}, received {by!r}")
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(_group(layer.name, by), []).append(layer)
    shared = {name: _shared(members) for name, members in groups.items()}
    means = [shared[_group(layer.name, by)] for layer in layers]
    return [
        replace(mean, name=layer.name, d_in=layer.d_in, d_out=layer.d_out, spectra=layer.spectra)
        for layer, mean in zip(layers, means, strict=True)
    ]


def _group(name: str, by: str) -> str:
    if by == "module":
        return re.sub(r"^(layers\.\d+\.)?(blocks\.\d+\.)?", "", name)
    if by == "block":
        return block_of(name)
    found = re.match(r"layers\.\d+(?=\.)", name)
    if found is None:
        raise ValueError(f"layers.group=stage needs a model with stages (layers.<s>, as a Swin); {name} stands in none")
    return found.group()


def _shared(members: Sequence[Layer]) -> Layer:
    """The first of the members with the group's means in place of its own."""
    metrics = [metric for metric in members[0].gap if all(metric in member.gap for member in members)]
    stable = _mean([None if member.weight is None else member.weight.stable_rank for member in members])
    effective = _mean([None if member.weight is None else member.weight.effective_rank for member in members])
    before = _mean(
        [None if member.intrinsic_dimension is None else member.intrinsic_dimension.input for member in members]
    )
    after = _mean(
        [None if member.intrinsic_dimension is None else member.intrinsic_dimension.output for member in members]
    )
    return replace(
        members[0],
        gap={metric: _mean_gap([member.gap[metric] for member in members]) for metric in metrics},
        weight=None if stable is None or effective is None else WeightRank(stable, effective),
        intrinsic_dimension=None if before is None or after is None else Dimension(before, after),
        importance=_mean([member.importance for member in members]),
        fisher=_mean([member.fisher for member in members]),
    )


def _mean_gap(gaps: Sequence[Gap]) -> Gap:
    value = float(np.mean([gap.value for gap in gaps]))
    low, high = _mean([gap.low for gap in gaps]), _mean([gap.high for gap in gaps])
    return Gap(value, low, high, _smallest([gap.p for gap in gaps]), _smallest([gap.p_family for gap in gaps]))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _smallest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if len(known) == len(values) else None
