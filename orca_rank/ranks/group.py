"""Layers that share their measurements: one number for a block, a stage or a kind of module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from orca_rank.measuring.records import Layer

BY = ("block", "stage", "module")
SMALLEST = ("p", "p_family")  # a group differs if one of its layers does


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
    shared = {
        name: (_mean([member.gap for member in members]), _mean([member.measured for member in members]))
        for name, members in groups.items()
    }
    found = []
    for layer in layers:
        gap, measured = shared[_group(layer.name, by)]
        own = {name: value for name, value in layer.measured.items() if _is_spectrum(value)}
        found.append(replace(layer, gap=gap, measured={**measured, **own}))
    return found


def _group(name: str, by: str) -> str:
    if by == "module":
        return re.sub(r"^(layers\.\d+\.)?(blocks\.\d+\.)?", "", name)
    found = re.match(r"(.*\b)?blocks\.\d+(?=\.)" if by == "block" else r"layers\.\d+(?=\.)", name)
    if found is None and by == "stage":
        raise ValueError(f"layers.group=stage needs a model with stages (layers.<s>, as a Swin); {name} stands in none")
    return name if found is None else found.group()


def _mean(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of the numbers that all records have, nested as they are."""
    found: dict[str, Any] = {}
    for key in records[0]:
        values = [record.get(key) for record in records]
        if all(isinstance(value, Mapping) for value in values):
            if not any(_is_spectrum(value) for value in values):
                found[key] = _mean(values)
        elif all(isinstance(value, int | float) for value in values):
            found[key] = float(np.min(values) if key in SMALLEST else np.mean(values))
        else:
            found[key] = None
    return found


def _is_spectrum(value: Any) -> bool:
    return isinstance(value, Mapping) and "singular_values" in value
