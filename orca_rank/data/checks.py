"""What loaded data cannot be trained on, and what a user should know of them before they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from orca_rank.normaliser import Normaliser, chunk_of, resolution
from orca_rank.task import Task, zero_fields

Loaded = Mapping[str, tuple[Tensor, Tensor]]


def check_inputs(parts: Loaded, inputs: Normaliser | None) -> list[str]:
    """Notes on the inputs of "train", "val" and "test".

    Args:
        inputs: what they are standardised by, if they are.

    Raises:
        ValueError: for inputs that never vary, or that float32 cannot hold as they are.
    """
    x = parts["train"][0]
    if inputs is None:
        if x.dtype == torch.float64:
            raise ValueError(
                "float32 cannot hold the inputs as they are (they are very large or small, or vary little about a "
                "large offset): set data.normalise=channel or pixel"
            )
        return []
    if not (inputs.std > 0).any():
        raise ValueError("inputs are the same in every training sample: there is nothing to tell them apart by")
    notes = [_coarse(x, inputs, "inputs")]
    fixed = inputs.std == 0
    if fixed.any():
        for part in ("val", "test"):
            held = parts[part][0]
            others = (some.double() for some in held.split(chunk_of(held)))
            if any(((other != inputs.mean) & ~other.isnan() & fixed).any() for other in others):
                notes.append(f"some pixels or channels of the inputs vary in {part} but never in training: left out")
    return [note for note in notes if note is not None]


def check_targets(parts: Loaded, task: Task) -> list[str]:
    """Notes on the targets of "train", "val" and "test".

    Raises:
        ValueError: for fields, vectors, labels or pixels that never vary, or that float32 cannot hold as they are.
    """
    y = parts["train"][1]
    if task.kind == "classification":
        return []
    if task.kind in ("multilabel", "segmentation"):
        return _rare(parts, task)
    if task.kind == "regression" and task.normaliser is not None:
        note = _varying(y, task.normaliser, "targets")
        return [] if note is None else [note]
    if task.normaliser is None:
        if y.dtype == torch.float64:
            raise ValueError("float32 cannot hold the fields as they are: set data.normalise=channel or pixel")
        notes: list[str | None] = []
    else:
        notes = [_varying(y, task.normaliser, "fields")]
    norm = task.typical_norm or 0.0
    zero = {part: len(zero_fields(pair[1], norm)) for part, pair in parts.items()}
    if any(zero.values()):
        counts = ", ".join(f"{zero[part]} of {len(pair[1])} in {part}" for part, pair in parts.items())
        notes.append(
            f"some fields are all zero ({counts}): an error relative to their own norm has no meaning, so it is taken "
            f"relative to the norm of a typical training field"
        )
    return [note for note in notes if note is not None]


def _varying(y: Tensor, statistics: Normaliser, name: str) -> str | None:
    if not (statistics.std > 0).any():
        raise ValueError(f"{name} are the same in every training sample: there is nothing to learn")
    return _coarse(y, statistics, name)


def _rare(parts: Loaded, task: Task) -> list[str]:
    """Sentences on labels, or classes of pixels, that a part has not: nothing is learned or measured of these."""
    count, what = task.output_shape[0], "labels" if task.kind == "multilabel" else "classes"
    lacking = {}
    for part, (_, y) in parts.items():
        there = y.any(0) if task.kind == "multilabel" else torch.stack([(y == k).any() for k in range(count)])
        lacking[part] = [str(k if task.classes is None else task.classes[k]) for k in range(count) if not there[k]]
    if len(lacking["train"]) >= count - (task.kind == "segmentation"):
        raise ValueError(f"the training samples have too few {what} to learn: {count - len(lacking['train'])}")
    return [
        f"{len(names)} of {count} {what} occur in no sample of {part}: {', '.join(names[:8])}"
        for part, names in lacking.items()
        if names
    ]


def _coarse(x: Tensor, statistics: Normaliser, name: str) -> str | None:
    """A sentence where values vary by little more than the steps of their own precision, else None."""
    if not x.is_floating_point():
        return None
    step = resolution(x.dtype) * torch.maximum(statistics.mean.abs(), statistics.std)
    steps = torch.where(statistics.std > 0, statistics.std / step, torch.inf)
    if (fewest := float(steps.min())) >= 100:
        return None
    return (
        f"{name} vary by only {fewest:.0f} steps of the resolution of {str(x.dtype).removeprefix('torch.')} at their "
        f"offset: subtract the offset before they are saved, or save them as float64"
    )
