"""The lean training step: an adapted Linear, and what comes before it, as one node of the autograd graph.

Autograd keeps every input of a trained matrix. Here the input is rebuilt in the backward pass from what has to be kept
anyway: LayerNorm's output from its input, GELU's from its input, attention's from q, k, v. x is kept once for all
adapters of a matrix, the frozen W₀ keeps nothing, and with A frozen (LoRA-FA) only Ax remains. Gradients accumulate into
the outputs in place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def prefers_dense(rank: int, d_in: int, d_out: int) -> bool:
    """Whether (W₀ + BA)x costs less than W₀x + B(Ax): a weight gradient, d_in d_out, against 3 r (d_in + d_out) per
    token. At small ranks the second form wins (kexue.fm/9590), at large ones the first.
    """
    return 3 * rank * (d_in + d_out) > d_in * d_out


class LeanLinear(torch.autograd.Function):
    """y = W₀u + bias + BAu with u = before(inputs), which is recomputed in the backward pass.

    Args of ``apply``:
        before: a deterministic function of ``inputs`` whose parameters are frozen, or None for u = inputs[0].
        rows: for each B, the rows of W₀ that it adapts; the rows of A belong to the Bs in their order.
        dense: form W₀ + BA (see `prefers_dense`).
        weight, bias: frozen W₀ (d_out, d_in) and its bias or None.
        a: all A stacked, (R, d_in). b_and_inputs: each B (rows, r) with its scale, then the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        before: Callable[..., Tensor] | None,
        rows: Sequence[slice],
        dense: bool,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        *b_and_inputs: Tensor,
    ) -> Tensor:
        bs, inputs = b_and_inputs[: len(rows)], b_and_inputs[len(rows) :]
        u = inputs[0] if before is None else before(*inputs)
        device = u.device.type
        autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        flat = u.reshape(-1, a.shape[1]).to(a.dtype)  # (N, d_in)
        w, own_bias = weight.to(a.dtype), None if bias is None else bias.to(a.dtype)
        z = None
        if dense:
            y = F.linear(flat, _with_product(w, a, bs, rows), own_bias)
        else:
            y = F.linear(flat, w, own_bias)  # (N, d_out)
            z = a @ flat.T  # (R, N): this orientation makes the product for dB fast
            for part, b, z_part in zip(rows, bs, _split(z, bs), strict=True):
                y[:, part].addmm_(z_part.T, b.T)
        needs = ctx.needs_input_grad
        learns_a, learns_b = needs[5], any(needs[6 : 6 + len(rows)])
        passes_on = any(needs[6 + len(rows) :])
        keep_inputs = learns_a or (dense and learns_b) or (before is not None and passes_on)
        ctx.save_for_backward(
            weight, a, z if learns_b else None, *bs, *(inputs if keep_inputs else [None] * len(inputs))
        )
        ctx.before, ctx.rows, ctx.dense, ctx.autocast, ctx.dtype = before, rows, dense, autocast, u.dtype
        ctx.shape = u.shape
        return y.reshape(*u.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, a, z, *rest = ctx.saved_tensors
        count, rows = len(ctx.rows), ctx.rows
        bs, inputs = rest[:count], rest[count:]
        learns_a, learns_b = ctx.needs_input_grad[5], ctx.needs_input_grad[6 : 6 + count]
        wanted = ctx.needs_input_grad[6 + count :]
        u, leaves = _rebuild(ctx.before, inputs, wanted, ctx.autocast)
        dy = dy.reshape(-1, dy.shape[-1])  # (N, d_out)
        flat = None if u is None else u.detach().reshape(-1, a.shape[1]).to(a.dtype)
        w = weight.to(a.dtype)
        da, dbs, du = None, [None] * count, None
        if ctx.dense:
            if learns_a or any(learns_b):
                dw = dy.T @ flat  # (d_out, d_in)
                a_parts = _split(a, bs)
                dbs = [dw[part] @ own.T for part, own in zip(rows, a_parts, strict=True)]
                da = torch.cat([b.T @ dw[part] for part, b in zip(rows, bs, strict=True)])
            if any(wanted):
                du = dy @ _with_product(w, a, bs, rows)
        else:
            if any(learns_b):
                dbs = [(own @ dy[:, part]).T for part, own in zip(rows, _split(z, bs), strict=True)]
            if learns_a or any(wanted):
                dz = torch.cat([b.T @ dy[:, part].T for part, b in zip(rows, bs, strict=True)])  # (R, N)
            if learns_a:
                da = dz @ flat
            if any(wanted):
                du = (dy @ w).addmm_(dz.T, a)
        d_inputs = _pass_on(ctx, u, du, leaves, wanted)
        return None, None, None, None, None, da, *dbs, *d_inputs


def _split(stacked: Tensor, bs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows of A, or of Ax, that belong to each B."""
    return stacked.split([b.shape[1] for b in bs])


def _with_product(w: Tensor, a: Tensor, bs: Sequence[Tensor], rows: Sequence[slice]) -> Tensor:
    """W₀ + BA."""
    w = w.clone()
    for part, b, own in zip(rows, bs, _split(a, bs), strict=True):
        w[part].addmm_(b, own)
    return w


def _rebuild(
    before: Callable[..., Tensor] | None,
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    autocast: tuple[str, torch.dtype, bool],
) -> tuple[Tensor | None, list[Tensor]]:
    """u again, under the autocast state of the forward pass, on leaves that collect gradients where wanted."""
    if before is None or inputs[0] is None:
        return inputs[0], []
    device, dtype, enabled = autocast
    leaves = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
        return before(*leaves), leaves


def _pass_on(
    ctx: Any, u: Tensor | None, du: Tensor | None, leaves: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the inputs from that of u."""
    if du is None:
        return [None] * len(wanted)
    if ctx.before is None:
        return [du.reshape(ctx.shape).to(ctx.dtype)]
    du = du.reshape(u.shape).to(u.dtype)
    grads = iter(torch.autograd.grad(u, [leaf for leaf, want in zip(leaves, wanted, strict=True) if want], du))
    return [next(grads) if want else None for want in wanted]
