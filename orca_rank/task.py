"""What a target dataset asks of a model: shapes, loss and metric, the same in every unit of measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from orca_rank.normaliser import Normaliser

__all__ = ["Normaliser", "Task", "relative_l2", "typical_norm"]

# Below this share of a typical field's norm a field counts as all zero: its own norm is no scale for an error.
ZERO = 1e-6


@dataclass(frozen=True)
class Task:
    """A target task.

    Args:
        kind: "classification" or "dense" (a field on a grid).
        input_shape: (C, H, W) of one input.
        output_shape: (classes,) for classification, (c, H, W) for a field.
        normaliser: for fields, maps the network's output back to physical units.
            Targets arrive in physical units; NaN in a target marks a value that is missing and is not counted.
        typical_norm: for fields, the root mean square norm of the training fields, in physical units: what the error of
            an all-zero field is relative to.
        classes: for classification, what the file calls the classes 0, 1, …; None where it calls them so.

    Raises:
        ValueError: for an unknown kind, or an output shape that does not fit the kind.
    """

    kind: str
    input_shape: tuple[int, int, int]
    output_shape: tuple[int, ...]
    normaliser: Normaliser | None = None
    typical_norm: float | None = None
    classes: tuple[int | str, ...] | None = None

    def __post_init__(self) -> None:
        ranks = {"classification": 1, "dense": 3}
        if self.kind not in ranks:
            raise ValueError(f"task kind must be 'classification' or 'dense', received {self.kind!r}")
        if len(self.output_shape) != ranks[self.kind]:
            expected = "(classes,)" if self.kind == "classification" else "(c, H, W)"
            raise ValueError(f"a {self.kind} task needs output_shape {expected}, received {self.output_shape}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file; the normaliser's tensors are written beside them."""
        values: dict[str, Any] = {
            "kind": self.kind,
            "input_shape": list(self.input_shape),
            "output_shape": list(self.output_shape),
        }
        if self.typical_norm is not None:
            values["typical_norm"] = self.typical_norm
        if self.classes is not None:
            values["classes"] = list(self.classes)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], normaliser: Normaliser | None = None) -> Task:
        """What `to_dict` wrote.

        Raises:
            ValueError: if the values are not those of a task.
        """
        try:
            channels, height, width = (int(length) for length in values["input_shape"])
            output_shape = tuple(int(length) for length in values["output_shape"])
            norm, classes = values.get("typical_norm"), values.get("classes")
            return cls(
                str(values["kind"]),
                (channels, height, width),
                output_shape,
                normaliser,
                None if norm is None else float(norm),
                None if classes is None else tuple(classes),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the description of a task ({error}): {values}") from error

    @property
    def metric_name(self) -> str:
        return "error" if self.kind == "classification" else "relative_l2"

    @property
    def metric_unit(self) -> str:
        """Both metrics are fractions and lower is better."""
        return "fraction of images" if self.kind == "classification" else "fraction of the field's norm"

    def decode(self, prediction: Tensor) -> Tensor:
        """The network's output in physical units; float64 where float32 cannot hold them."""
        return self.normaliser.decode(prediction) if self.normaliser is not None else prediction

    def loss(self, prediction: Tensor, target: Tensor) -> Float[Tensor, ""]:
        """Cross-entropy, or the mean over the batch of the relative L2 error after decoding; in float32."""
        if self.kind == "classification":
            return F.cross_entropy(prediction.float(), target)
        return self.metric(prediction, target).mean()

    def metric(self, prediction: Tensor, target: Tensor) -> Float[Tensor, " b"]:
        """Per sample: 1 where the top class is wrong and NaN where a score is; or ‖û − u‖₂ / ‖u‖₂ after decoding, as
        `relative_l2` defines it.

        û − u is taken before an offset is added back and both norms in the normaliser's own unit, so that neither a
        large offset nor a small unit costs digits.
        """
        if self.kind == "classification":
            wrong = (prediction.argmax(1) != target).float()
            return torch.where(prediction.isnan().any(1), torch.nan, wrong)
        if self.normaliser is None:
            return relative_l2(prediction.float(), target, self.typical_norm)
        unit, normaliser = self.normaliser.unit, self.normaliser
        mean, std, target = normaliser.like(target)
        difference = (std / unit).float() * prediction.float() - ((target - mean) / unit).float()
        norm = None if self.typical_norm is None else self.typical_norm / unit
        offset = (mean / unit).float()
        return _relative(difference, (target / unit).float(), norm, prediction.float() * (std / unit).float() + offset)


def relative_l2(
    prediction: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], typical_norm: float | None = None
) -> Float[Tensor, " b"]:
    """‖û − u‖₂ / ‖u‖₂ of every sample (the metric of FNO and ORCA on Darcy flow); no mean is subtracted.

    Where u is all zero (its norm at most 1e-6 of the typical one) the ratio has no meaning: the error is then
    ‖û − u‖₂ over the typical norm, or, where that is not known, 1 unless û is zero too. Missing values of u (NaN) count
    in neither norm. Any unit of û and u gives the same.

    Args:
        typical_norm: root mean square of ‖u‖₂ over the training fields, see `typical_norm`.
    """
    return _relative(prediction - target, target, typical_norm, prediction)


def _relative(difference: Tensor, target: Tensor, typical_norm: float | None, prediction: Tensor) -> Tensor:
    valid = ~target.isnan()
    zero = torch.zeros((), dtype=target.dtype, device=target.device)
    error, size = _norm(torch.where(valid, difference, zero)), _norm(torch.where(valid, target, zero))
    if typical_norm is None:
        own = _norm(torch.where(valid, prediction.detach().to(target.dtype), zero))
        return error / torch.where(size > 0, size, torch.where(own > 0, own, 1.0))
    # A typical norm of 0: every training field is zero.
    return error / torch.where(size > ZERO * typical_norm, size, typical_norm or 1.0)


def _norm(x: Tensor) -> Float[Tensor, " b"]:
    """‖x‖₂ of every sample, whose squares neither overflow nor vanish."""
    flat = x.flatten(1)
    scale = flat.detach().abs().amax(1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    return (flat / scale).norm(dim=1) * scale[:, 0]


def typical_norm(y: Float[Tensor, "n c h w"]) -> float:
    """Root mean square of ‖u‖₂ over fields, missing values (NaN) aside."""
    norms = torch.cat([_norm(part.double().nan_to_num(0.0)) for part in y.split(256)])
    return float(_norm(norms[None])) / math.sqrt(len(norms))


def zero_fields(y: Float[Tensor, "n c h w"], norm: float) -> Int[Tensor, " k"]:
    """Numbers of the fields that are all zero, see `relative_l2`."""
    norms = torch.cat([_norm(part.double().nan_to_num(0.0)) for part in y.split(256)])
    return torch.nonzero(norms <= ZERO * norm).flatten()
