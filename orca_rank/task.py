"""What a target dataset asks of a model: shapes, loss and metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Normaliser:
    """Per-pixel affine scaling, encode(x) = (x − mean) / std (the unit-Gaussian normaliser of FNO and ORCA).

    Args:
        mean, std: broadcastable to a sample, e.g. (c, H, W) or (1, 1, 1); std > 0.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, x: Float[Tensor, "n c h w"], epsilon: float = 1e-5) -> Normaliser:
        """Mean and standard deviation over the samples of x, one of each per pixel."""
        return cls(x.mean(0), x.std(0) + epsilon)

    def encode(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x)) / self.std.to(x)

    def decode(self, x: Tensor) -> Tensor:
        return x * self.std.to(x) + self.mean.to(x)


def relative_l2(prediction: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """‖û − u‖₂ / ‖u‖₂ of every sample (the metric of FNO and ORCA on Darcy flow); no mean is subtracted."""
    difference = (prediction - target).flatten(1).norm(dim=1)
    return difference / target.flatten(1).norm(dim=1).clamp_min(torch.finfo(target.dtype).tiny)


@dataclass(frozen=True)
class Task:
    """A target task.

    Args:
        kind: "classification" or "dense" (a field on a grid).
        input_shape: (C, H, W) of one input.
        output_shape: (classes,) for classification, (c, H, W) for a field.
        normaliser: for fields, maps the network's output back to physical units before loss and metric.
            Targets arrive in physical units.

    Raises:
        ValueError: for an unknown kind, or an output shape that does not fit the kind.
    """

    kind: str
    input_shape: tuple[int, int, int]
    output_shape: tuple[int, ...]
    normaliser: Normaliser | None = None

    def __post_init__(self) -> None:
        ranks = {"classification": 1, "dense": 3}
        if self.kind not in ranks:
            raise ValueError(f"task kind must be 'classification' or 'dense', received {self.kind!r}")
        if len(self.output_shape) != ranks[self.kind]:
            expected = "(classes,)" if self.kind == "classification" else "(c, H, W)"
            raise ValueError(f"a {self.kind} task needs output_shape {expected}, received {self.output_shape}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file; the normaliser's tensors are written beside them."""
        return {"kind": self.kind, "input_shape": list(self.input_shape), "output_shape": list(self.output_shape)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], normaliser: Normaliser | None = None) -> Task:
        """What `to_dict` wrote.

        Raises:
            ValueError: if the values are not those of a task.
        """
        try:
            channels, height, width = (int(length) for length in values["input_shape"])
            output_shape = tuple(int(length) for length in values["output_shape"])
            return cls(str(values["kind"]), (channels, height, width), output_shape, normaliser)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the description of a task ({error}): {dict(values)}") from error

    @property
    def metric_name(self) -> str:
        return "error" if self.kind == "classification" else "relative_l2"

    @property
    def metric_unit(self) -> str:
        """Both metrics are fractions and lower is better."""
        return "fraction of images" if self.kind == "classification" else "fraction of the field's norm"

    def decode(self, prediction: Tensor) -> Tensor:
        """The network's output in physical units."""
        return self.normaliser.decode(prediction) if self.normaliser is not None else prediction

    def loss(self, prediction: Tensor, target: Tensor) -> Float[Tensor, ""]:
        """Cross-entropy, or relative L2 after decoding; the mean over the batch, in float32."""
        if self.kind == "classification":
            return F.cross_entropy(prediction.float(), target)
        return self.metric(prediction, target).mean()

    def metric(self, prediction: Tensor, target: Tensor) -> Float[Tensor, " b"]:
        """Per sample: 1 where the top class is wrong, or the relative L2 error after decoding."""
        if self.kind == "classification":
            return (prediction.argmax(1) != target).float()
        return relative_l2(self.decode(prediction.float()), target.float())
