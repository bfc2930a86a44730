"""Muon for the weight matrices of a transformer, AdamW for everything else, as one optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def orthogonalised(gradient: Float[Tensor, "m n"], steps: int = 5) -> Float[Tensor, "m n"]:
    """Nearly U Vᵀ of the gradient's singular value decomposition, by Newton–Schulz iterations.

    X ← a X + (b X Xᵀ + c (X Xᵀ)²) X with (a, b, c) = (3.4445, −4.7750, 2.0315) sends every singular value that is not
    tiny into about [0.7, 1.2]. Source: K. Jordan, Muon (2024).
    """
    wide = gradient.shape[0] <= gradient.shape[1]
    x = gradient if wide else gradient.T
    x = x / x.norm().clamp_min(1e-12)
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide else x.T


class MuonAdamW(torch.optim.Optimizer):
    """Muon where a group says `muon`, AdamW elsewhere; decoupled weight decay in both.

    Muon: M ← μ M + (1 − μ) G; the step is −lr · 0.2 √max(m, n) · orthogonalised((1 − μ) G + μ M), whose mean square
    matches AdamW's, so one learning rate serves both (Liu et al., arXiv 2502.16982, equation 4).

    Args:
        params: parameter groups; those with muon=True hold matrices only.
        lr, weight_decay: as in AdamW. momentum: Muon's μ. betas, eps: AdamW's.

    Raises:
        ValueError: if a Muon group holds something other than matrices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.05,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, betas=betas, eps=eps, muon=False)
        super().__init__(params, defaults)
        for group in self.param_groups:
            wrong = [tuple(p.shape) for p in group["params"] if group["muon"] and p.ndim != 2]
            if wrong:
                raise ValueError(f"Muon takes matrices, received parameters of shape {wrong[:3]}: leave them to AdamW")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def _muon(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        mu = group["momentum"]
        average = state["momentum"].lerp_(gradient, 1 - mu)
        direction = orthogonalised(gradient.lerp(average, mu).float())
        parameter.add_(direction.to(parameter), alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))

    def _adamw(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, first=torch.zeros_like(parameter), second=torch.zeros_like(parameter))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        first = state["first"].lerp_(gradient, 1 - beta1)
        second = state["second"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(first, scale, value=-group["lr"] / (1 - beta1 ** state["step"]))


def parameter_groups(model: nn.Module, weight_decay: float, muon: bool) -> list[dict[str, Any]]:
    """Groups of a classifier's parameters: matrices of the body, other weights, and what is not decayed.

    Biases, norms and position tables are not decayed. The first layer (a convolution) and the head go to AdamW.
    """
    tables = ("relative_position_bias_table", "pos_embed", "cls_token")
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "weight": [], "plain": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or name.rpartition(".")[2] in tables:
            groups["plain"].append(parameter)
        elif muon and parameter.ndim == 2 and not name.startswith("head"):
            groups["matrix"].append(parameter)
        else:
            groups["weight"].append(parameter)
    extra: dict[str, dict[str, Any]] = {"matrix": {"muon": True}, "weight": {}, "plain": {"weight_decay": 0.0}}
    return [
        {"params": members, "weight_decay": weight_decay, **(extra[kind] if muon or kind == "plain" else {})}
        for kind, members in groups.items()
        if members
    ]
