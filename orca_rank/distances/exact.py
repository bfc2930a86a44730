"""Optimal transport by linear programming (POT's network simplex), for measuring up to about 5,000 points."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from orca_rank.distances._inputs import Envelope, squared_distances


def exact_plan(cost: Tensor) -> Tensor:
    """The optimal plan (n, m), float64, between uniform measures.

    Raises:
        RuntimeError: if the solver stops early, with its message.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # its docstrings, when compiled for the first time
        import ot  # here, because it takes seconds

    n, m = cost.shape
    matrix = np.ascontiguousarray(cost.detach().cpu().numpy(), dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan, log = ot.emd(np.full(n, 1 / n), np.full(m, 1 / m), matrix, numItermax=100_000_000, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"the linear programme of a {n} x {m} transport problem was not solved: {log['warning']}")
    return torch.from_numpy(plan).to(cost.device)


def exact_squared_wasserstein(x: Tensor, y: Tensor) -> Tensor:
    """W₂² of two samples, differentiable by the envelope theorem: ∂/∂x = 2 (P1 ⊙ x − P y)."""
    with torch.no_grad():
        a, b = x.double(), y.double()
        cost = squared_distances(a, b)
        plan = exact_plan(cost)
        value = (plan * cost).sum()
        gradients = (
            2 * (plan.sum(1, keepdim=True) * a - plan @ b),
            2 * (plan.sum(0)[:, None] * b - plan.T @ a),
        )
    return Envelope.apply(value.to(x.dtype), tuple(g.to(x.dtype) for g in gradients), x, y)


def exact_class_distances(x_groups: tuple[Tensor, ...], y_groups: tuple[Tensor, ...] | None) -> Tensor:
    """W₂² between every class of x and every class of y, (K, L); of x with itself where y_groups is None."""
    if y_groups is not None:
        rows = [torch.stack([exact_squared_wasserstein(a, b) for b in y_groups]) for a in x_groups]
        return torch.stack(rows)
    size = len(x_groups)
    upper = x_groups[0].new_zeros(size, size)
    left, right = torch.triu_indices(size, size, 1, device=upper.device)
    if len(left):
        values = [exact_squared_wasserstein(x_groups[i], x_groups[j]) for i, j in zip(left, right, strict=True)]
        upper = upper.index_put((left, right), torch.stack(values))
    return upper + upper.T
