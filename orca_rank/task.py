"""What a target dataset asks of a model: shapes, loss and metric, the same in every unit of measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from orca_rank import scoring
from orca_rank.normaliser import Normaliser
from orca_rank.scoring import relative_l2, typical_norm, zero_fields

__all__ = ["KINDS", "Kind", "Normaliser", "Task", "relative_l2", "typical_norm", "zero_fields"]

COMPONENTS = 8  # of a vector, up to which each has an absolute error of its own among the metrics


class Kind(NamedTuple):
    """A kind of target. output: the axes of a task's output_shape; metric: what is monitored, lower is better; unit:
    of the metric; targets: what the targets of a batch are."""

    output: tuple[str, ...]
    metric: str
    unit: str
    targets: str


KINDS = {
    "classification": Kind(("classes",), "error", "fraction of images", "classes (n,)"),
    "multilabel": Kind(("labels",), "label_error", "fraction of labels", "booleans (n, labels)"),
    "regression": Kind(("numbers",), "nmse", "fraction of the training targets' variance", "floats (n, k)"),
    "dense": Kind(("c", "H", "W"), "relative_l2", "fraction of the field's norm", "float fields (n, c, H, W)"),
    "segmentation": Kind(("classes", "H", "W"), "pixel_error", "fraction of pixels", "classes (n, H, W)"),
}


@dataclass(frozen=True)
class Task:
    """A target task.

    Args:
        kind: "classification" (one class an image), "multilabel" (any number of labels an image), "regression" (a
            vector an image), "dense" (a field on a grid) or "segmentation" (a class a pixel).
        input_shape: (C, H, W) of one input; (C, 1, L) is a series.
        output_shape: (classes,), (labels,), (numbers,), (c, H, W) for a field, (classes, H, W) for a segmentation.
        normaliser: for fields and vectors, maps the network's output back to physical units. Targets arrive in physical
            units; NaN in a target marks a value that is missing and is not counted.
        typical_norm: for fields, the root mean square norm of the training fields, in physical units: what the error of
            an all-zero field is relative to.
        classes: for classification and segmentation, what the file calls the classes 0, 1, …; None where it calls them
            so.

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
        if self.kind not in KINDS:
            raise ValueError(f"task kind must be one of {', '.join(KINDS)}, received {self.kind!r}")
        axes = KINDS[self.kind].output
        if len(self.output_shape) != len(axes):
            raise ValueError(
                f"a {self.kind} task needs output_shape ({', '.join(axes)}{',' if len(axes) == 1 else ''}), received "
                f"{self.output_shape}"
            )

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
        return KINDS[self.kind].metric

    @property
    def metric_unit(self) -> str:
        """All metrics are fractions and lower is better."""
        return KINDS[self.kind].unit

    @property
    def series(self) -> bool:
        """Whether inputs are series (C, 1, L)."""
        return self.input_shape[1] == 1 and self.input_shape[2] > 1

    def decode(self, prediction: Tensor) -> Tensor:
        """The network's output in the user's unit: fields and vectors in physical units (float64 where float32 cannot
        hold them), the probability of every label; class scores stay as they are."""
        if self.kind == "multilabel":
            return prediction.sigmoid()
        return self.normaliser.decode(prediction) if self.normaliser is not None else prediction

    def chosen(self, decoded: Tensor) -> Tensor | None:
        """What decoded predictions decide: the number of the best class (b,) or (b, H, W), or which labels (b, labels)
        are given; None for fields and vectors, which speak for themselves."""
        if self.kind in ("classification", "segmentation"):
            return decoded.argmax(1)
        return decoded > 0.5 if self.kind == "multilabel" else None

    def check_targets(self, y: Tensor) -> None:
        """Refuse targets of a batch that are of another task.

        Raises:
            ValueError: another kind of target, another shape, or a class beyond those known.
        """
        floats = self.kind in ("dense", "regression")
        classes = self.kind in ("classification", "segmentation")
        shape = self.output_shape[1:] if classes else self.output_shape
        if y.is_floating_point() != floats or (y.dtype == torch.bool) != (self.kind == "multilabel"):
            raise ValueError(
                f"the targets have dtype {y.dtype}, the model was fine-tuned for {self.kind}, with "
                f"{KINDS[self.kind].targets}"
            )
        if tuple(y.shape[1:]) != shape:
            raise ValueError(f"the targets have shape {tuple(y.shape[1:])}, the model gives {self.output_shape}")
        if classes and int(y.max()) >= self.output_shape[0]:
            raise ValueError(f"the targets have class {int(y.max())}, the model knows 0 to {self.output_shape[0] - 1}")

    def losses(self, prediction: Tensor, target: Tensor) -> Float[Tensor, " b"]:
        """What is trained on, per sample, in float32: cross-entropy, of every label or over the pixels of an image; the
        squared error in standard deviations; the relative L2 error after decoding."""
        if self.kind == "classification":
            return F.cross_entropy(prediction.float(), target, reduction="none")
        if self.kind == "multilabel":
            every = F.binary_cross_entropy_with_logits(prediction.float(), target.float(), reduction="none")
            return every.mean(1)
        if self.kind == "segmentation":
            return scoring.pixel_cross_entropy(prediction, target)
        return self.metric(prediction, target)

    def loss(self, prediction: Tensor, target: Tensor) -> Float[Tensor, ""]:
        """The mean of `losses` over the batch."""
        return self.losses(prediction, target).mean()

    def metric(self, prediction: Tensor, target: Tensor) -> Float[Tensor, " b"]:
        """Per sample what is monitored, see `KINDS` and `orca_rank.scoring`.

        A field's û − u is taken before an offset is added back and both norms in the normaliser's own unit, so that
        neither a large offset nor a small unit costs digits.
        """
        if self.kind == "classification":
            return scoring.class_error(prediction, target)
        if self.kind == "multilabel":
            return scoring.label_error(prediction, target)
        if self.kind == "segmentation":
            return scoring.pixel_error(prediction, target)
        if self.kind == "regression":
            scale = self._scale()
            known = ~target.isnan() & (scale.std > 0).to(target.device)
            return scoring.standard_error(prediction.float(), scale.encode(target), known)
        if self.normaliser is None:
            return relative_l2(prediction.float(), target, self.typical_norm)
        unit, normaliser = self.normaliser.unit, self.normaliser
        mean, std, target = normaliser.like(target)
        difference = (std / unit).float() * prediction.float() - ((target - mean) / unit).float()
        norm = None if self.typical_norm is None else self.typical_norm / unit
        offset = (mean / unit).float()
        reached = prediction.float() * (std / unit).float() + offset
        return scoring.relative(difference, (target / unit).float(), norm, reached)

    def further(self, prediction: Tensor, target: Tensor) -> dict[str, Float[Tensor, " b"]]:
        """Further metrics of every sample by name, lower is better: cross-entropies, 1 − F₁ of an image's labels, 1 −
        mean IoU of an image, the absolute error of a vector's numbers in their own units (NaN where one is missing)."""
        if self.kind == "classification":
            return {"cross_entropy": self.losses(prediction, target)}
        if self.kind == "multilabel":
            return {
                "f1_error": scoring.f1_error(prediction, target),
                "binary_cross_entropy": self.losses(prediction, target),
            }
        if self.kind == "segmentation":
            return {
                "iou_error": scoring.iou_error(prediction, target),
                "cross_entropy": self.losses(prediction, target),
            }
        if self.kind == "regression" and self.output_shape[0] <= COMPONENTS:
            scale = self._scale()
            off = (prediction.float() - scale.encode(target)).abs() * scale.std.to(target.device)
            off = torch.where(target.isnan(), torch.nan, off).float()
            return {"mae" if off.shape[1] == 1 else f"mae_{i}": off[:, i] for i in range(off.shape[1])}
        return {}

    def _scale(self) -> Normaliser:
        if self.normaliser is None:
            raise ValueError("a regression task needs a normaliser: the mean and deviation of the training targets")
        return self.normaliser
