"""What loaded data cannot be trained on, and what a user should know of them before they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from orca_rank.data.stored import Stored
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
        return _unscaled(x, "inputs", "the network sees them as they are")
    if not (inputs.std > 0).any():
        raise ValueError("inputs are the same in every training sample: there is nothing to tell them apart by")
    notes = [_coarse(x, inputs, "inputs")]
    fixed = inputs.std == 0
    if inputs.std.numel() == len(inputs.std):  # pixels at a border may well never vary
        notes.append(_fixed(inputs, "channels of the inputs", "left out"))
    if fixed.any():
        for part in ("val", "test"):
            held = parts[part][0]
            others = (some.double() for some in held.split(chunk_of(held)))
            if any(((other != inputs.mean) & ~other.isnan() & fixed).any() for other in others):
                notes.append(f"some pixels or channels of the inputs vary in {part} but never in training: left out")
    return [note for note in notes if note is not None]


def seen(parts: Loaded, name: object) -> list[str]:
    """A sentence where inputs of "test" stand in "train" or "val" too; not looked for where they stay on disk.

    Args:
        name: of the file or folder of the test samples.
    """
    if any(isinstance(x, Stored) for x, _ in parts.values()):
        return []
    known = {hash(x.numpy().tobytes()) for part in ("train", "val") for x in parts[part][0]}
    test = parts["test"][0]
    if not (count := sum(hash(x.numpy().tobytes()) in known for x in test)):
        return []
    return [
        f"{count} of {len(test)} test samples of {name} are among the training or validation samples too: their error "
        f"is no test error"
    ]


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
        both = [
            _varying(y, task.normaliser, "targets"),
            _fixed(task.normaliser, "numbers of the targets", "not counted"),
        ]
        return [note for note in both if note is not None]
    if task.normaliser is None:
        if y.dtype == torch.float64:
            raise ValueError("float32 cannot hold the fields as they are: set data.normalise=channel or pixel")
        notes: list[str | None] = [*_unscaled(y, "fields", "the network has to give them as they are")]
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


def _unscaled(x: Tensor, name: str, so: str) -> list[str]:
    """A sentence where values that nothing standardises are far from what networks are made for."""
    std = Normaliser.fit(x, "channel").std
    if not (off := std[(std > 0) & ((std < 1e-3) | (std > 1e3))]).numel():
        return []
    return [
        f"{name} vary by {float(off[0]):.3g} and data.normalise=none: {so}, far from deviations near 1, which networks "
        f"are made for; data.normalise=channel standardises them"
    ]


def _fixed(statistics: Normaliser, name: str, so: str) -> str | None:
    """A sentence on channels or numbers that never vary in training."""
    if not (found := torch.nonzero(statistics.std.flatten() == 0).flatten().tolist()):
        return None
    return f"{len(found)} {name} never vary in training, or are missing: {', '.join(map(str, found[:8]))}; {so}"


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
