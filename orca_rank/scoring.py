"""Errors and losses of single samples, for every kind of target; lower is better in all of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

# Below this share of a typical field's norm a field counts as all zero: its own norm is no scale for an error.
ZERO = 1e-6
UNLABELLED = -1  # of a pixel: no class is known there, and it counts in no loss and no metric


def class_error(scores: Float[Tensor, "b classes"], y: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """1 where the top class is wrong, 0 where it is right, NaN where a score is."""
    return torch.where(scores.isnan().any(1), torch.nan, (scores.argmax(1) != y).float())


def label_error(scores: Float[Tensor, "b labels"], y: Bool[Tensor, "b labels"]) -> Float[Tensor, " b"]:
    """The share of a sample's labels that are wrong (Hamming loss); a label is given where its score is positive."""
    return torch.where(scores.isnan().any(1), torch.nan, ((scores > 0) != y.bool()).float().mean(1))


def f1_error(scores: Float[Tensor, "b labels"], y: Bool[Tensor, "b labels"]) -> Float[Tensor, " b"]:
    """1 − F₁ of a sample's labels, F₁ = 2 |P ∩ Y| / (|P| + |Y|); 0 where neither has any."""
    given, y = scores > 0, y.bool()
    both, all_of = (given & y).sum(1).float(), given.sum(1) + y.sum(1)
    return torch.where(all_of > 0, 1 - 2 * both / all_of.clamp_min(1), 0.0)


def pixel_error(scores: Float[Tensor, "b classes h w"], y: Int[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """The share of an image's labelled pixels whose top class is wrong; NaN where a score is."""
    known = y != UNLABELLED
    wrong = (scores.argmax(1) != y) & known
    share = wrong.flatten(1).sum(1) / known.flatten(1).sum(1).clamp_min(1)
    return torch.where(scores.isnan().flatten(1).any(1), torch.nan, share)


def iou_error(scores: Float[Tensor, "b classes h w"], y: Int[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """1 − the mean of |P ∩ Y| / |P ∪ Y| over the classes that an image's labels or its prediction have."""
    known, guess = (y != UNLABELLED).flatten(1), scores.argmax(1).flatten(1)
    errors, present = [], []
    for label in range(scores.shape[1]):
        predicted, true = (guess == label) & known, y.flatten(1) == label
        union = (predicted | true).sum(1)
        errors.append(1 - (predicted & true).sum(1) / union.clamp_min(1))
        present.append(union > 0)
    there = torch.stack(present).float()
    return (torch.stack(errors) * there).sum(0) / there.sum(0).clamp_min(1)


def pixel_cross_entropy(scores: Float[Tensor, "b classes h w"], y: Int[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """The mean cross-entropy over an image's labelled pixels."""
    losses = F.cross_entropy(scores.float(), y.long(), ignore_index=UNLABELLED, reduction="none").flatten(1)
    return losses.sum(1) / (y != UNLABELLED).flatten(1).sum(1).clamp_min(1)


def standard_error(z: Float[Tensor, "b k"], y: Float[Tensor, "b k"], known: Bool[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """The mean square of z − y over the known numbers of a sample; z and y in standard deviations.

    Averaged over samples it is the share of the targets' variance that is not explained, 1 − R²: 1 for their mean.
    """
    squares = torch.where(known, (z - torch.where(known, y, 0.0)).square(), 0.0)
    return squares.sum(1) / known.sum(1).clamp_min(1)


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
    return relative(prediction - target, target, typical_norm, prediction)


def relative(difference: Tensor, target: Tensor, typical_norm: float | None, prediction: Tensor) -> Tensor:
    """`relative_l2` where û − u is known already; all of them in one unit."""
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


def norms_of(y: Shaped[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """‖u‖₂ of every field, missing values (NaN) aside, in float64; those that a pass over a file has left, if any."""
    if (known := getattr(y, "norms", None)) is not None:
        return known
    return torch.cat([_norm(part.double().nan_to_num(0.0)) for part in y.split(256)])


def typical_norm(y: Float[Tensor, "n c h w"]) -> float:
    """Root mean square of ‖u‖₂ over fields, missing values (NaN) aside.

    Raises:
        ValueError: for fields whose norms overflow.
    """
    norms = norms_of(y)
    if not norms.isfinite().all():
        raise ValueError("fields are so large that not even float64 holds their norms: divide them by a constant")
    return float(_norm(norms[None])) / math.sqrt(len(norms))


def zero_fields(y: Float[Tensor, "n c h w"], norm: float) -> Int[Tensor, " k"]:
    """Numbers of the fields that are all zero, see `relative_l2`."""
    return torch.nonzero(norms_of(y) <= ZERO * norm).flatten()
