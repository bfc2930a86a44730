"""The fast training step of one adapted matrix: autograd's own products, but fewer and better laid out.

Autograd multiplies W₀x and B(Ax) apart and adds them up in a pass over y, and one over dx on the way back; its gradient
of B is (d_out × n)(n × r), a shape that BLAS libraries multiply up to eight times slower than its transpose.
"""

from typing import Any

import torch
from torch import Tensor

CPU_ROWS = 1024  # of x and dy that stay in cache between the products of the backward pass


class FastLinear(torch.autograd.Function):
    """y = (W₀ + BA)x + bias, with the gradients of A and B through the factors and none for W₀ and bias.

    x is kept for A's gradient; where A is frozen (LoRA-FA) only Ax is.

    Args of ``apply``: folds, whether to form W₀ + BA (see `lean.cheapest`); x (*n, d_in), weight W₀ (d_out, d_in) and
    its bias or None, a (r, d_in), and b (d_out, r) with its scale; all of one dtype.
    """

    @staticmethod
    def forward(ctx: Any, folds: bool, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        _, _, _, _, learns_a, learns_b = ctx.needs_input_grad
        flat = x.reshape(-1, x.shape[-1])
        w = torch.addmm(weight, b, a) if folds else weight
        y = torch.mm(flat, w.T) if bias is None else torch.addmm(bias, flat, w.T)
        keeps_z = learns_b and not learns_a
        z = flat @ a.T if keeps_z or not folds else flat.new_empty(0)  # (n, r)
        if not folds:
            y.addmm_(z, b.T)
        ctx.save_for_backward(flat if learns_a else None, z if keeps_z else None, weight, a, b)
        ctx.folds, ctx.shape = folds, x.shape
        return y.view(*x.shape[:-1], len(w))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved: tuple[Any, ...] = ctx.saved_tensors
        x, z, weight, a, b = saved
        _, wants_x, _, _, learns_a, learns_b = ctx.needs_input_grad
        w = torch.addmm(weight, b, a) if ctx.folds and wants_x else weight
        dy = dy.reshape(-1, len(w))  # (n, d_out)
        dx = dy.new_empty(len(dy), a.shape[1]) if wants_x else dy.new_empty(0)
        da, db = torch.zeros_like(a), b.new_zeros(b.shape[::-1])  # db transposed, (r, d_out)
        rows = CPU_ROWS if dy.device.type == "cpu" else max(len(dy), 1)
        for start in range(0, len(dy), rows):
            inside = slice(start, start + rows)
            dy_own, dx_own = dy[inside], dx[inside]
            if wants_x:
                torch.mm(dy_own, w, out=dx_own)
            dz = b.T @ dy_own.T if learns_a or not ctx.folds else da  # (r, n)
            if learns_a:
                da.addmm_(dz, x[inside])
            if wants_x and not ctx.folds:
                dx_own.addmm_(dz.T, a)
            if learns_b:
                db.addmm_(z[inside].T if x is None else a @ x[inside].T, dy_own)
        return None, dx.view(ctx.shape) if wants_x else None, None, None, da, db.T
