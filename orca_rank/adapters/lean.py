"""The lean training step: an adapted Linear, and what comes before it, as one node of the autograd graph.

Autograd keeps every input of a trained matrix. Here the input is rebuilt in the backward pass from what has to be kept
anyway: LayerNorm's output from its input, GELU's from its input, attention's from q, k, v. x is kept once for all
adapters of a matrix, the frozen W₀ keeps nothing, and with A frozen (LoRA-FA) only Ax remains where nothing is rebuilt
before the matrix. Where a LayerNorm, GELU or attention is, its inputs are kept for its own gradients: in a whole block
LoRA-FA keeps exactly what LoRA does. On a CPU both passes
walk through the rows in chunks that stay in cache, so that what is rebuilt is never written to memory as a whole.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CPU_ROWS = 2048


def cheapest(tokens: int, rank: int, d_in: int, d_out: int, folds: bool = True) -> str:
    """How a training step of so many tokens multiplies by W₀ + BA at the least cost.

    * ``factored``: W₀x + B(Ax), and gradients through the factors: 3 r (d_in + d_out) per token beside W₀'s products;
    * ``folded``: (W₀ + BA)x and (W₀ + BA)ᵀdy, but gradients through the factors: 2 r (d_in + d_out) per token, and BA
      formed twice. It also spares both passes over y and dx that add the parts up;
    * ``dense``: the same, with gradients through that of the matrix: d_in d_out per token, and four products of BA's
      size. At small ranks the factors win (kexue.fm/9590), at large ones this does.

    Args:
        folds: whether BA survives being added to W₀: in less than float32 it is rounded away.
    """
    formed = rank * d_in * d_out
    costs = {"factored": 3 * tokens * rank * (d_in + d_out), "dense": tokens * d_in * d_out + 4 * formed}
    if folds:
        costs["folded"] = 2 * tokens * rank * (d_in + d_out) + 2 * formed
    return min(costs, key=lambda form: costs[form])


class Plan(NamedTuple):
    """How a `LeanLinear` works: everything about it that is no tensor.

    Args:
        before: a deterministic function of the inputs with frozen parameters, or None for u = inputs[0]. If it has a
            method ``vjp(*inputs) -> (u, pull)``, ``pull(du)`` gives the inputs' gradients in place of autograd.
        rows: for each B, the rows of W₀ that it adapts; the rows of A belong to the Bs in their order.
        form: see `cheapest`.
        group: how many entries of dimension 0 ``before`` must see together.
        dtype: in which to multiply.
        reuse: nobody else reads the inputs, so their gradients may take their memory. The graph then serves one
            backward pass; a second one stops with autograd's error about a changed tensor.
        unpack: gives W₀ where ``weight`` is a packed form of it.
    """

    before: Callable[..., Tensor] | None
    rows: Sequence[slice]
    form: str
    group: int
    dtype: torch.dtype
    reuse: bool = False
    unpack: Callable[[Tensor], Tensor] | None = None

    def matrix(self, weight: Tensor, a: Tensor, bs: Sequence[Tensor]) -> Tensor:
        """W₀, plus BA unless the form is factored, ready to multiply."""
        w = weight if self.unpack is None else self.unpack(weight)
        if self.form == "factored":
            return w.detach().to(self.dtype)
        w = w.detach().to(self.dtype, copy=True)
        for part, b, own in zip(self.rows, bs, _split(a, bs, 0), strict=True):
            w[part].addmm_(b, own)
        return w

    def chunks(self, x: Tensor) -> Iterator[tuple[slice, slice]]:
        """Slices of dimension 0 of the inputs, and the slices of the rows of y that belong to them."""
        entries, per_entry = len(x), math.prod(x.shape[1:-1])
        step = entries
        if x.device.type == "cpu":
            step = max(1, round(CPU_ROWS / per_entry / self.group)) * self.group
        for start in range(0, entries, max(step, 1)):
            stop = min(start + step, entries)
            yield slice(start, stop), slice(start * per_entry, stop * per_entry)


class LeanLinear(torch.autograd.Function):
    """y = W₀u + bias + BAu with u = before(inputs), one row of y for each row of u.

    Args of ``apply``: plan; frozen weight W₀ (d_out, d_in) and its bias or None; a, all A stacked, (R, d_in); then each
    B (rows, r) with its scale; then the inputs, (n, ..., d) with the same n.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, weight: Tensor, bias: Tensor | None, a: Tensor, *b_and_inputs: Tensor) -> Tensor:
        count = len(plan.rows)
        bs, inputs = b_and_inputs[:count], b_and_inputs[count:]
        learns_a, learns_b = ctx.needs_input_grad[3], any(ctx.needs_input_grad[4 : 4 + count])
        passes_on = any(ctx.needs_input_grad[4 + count :])
        factored, dense = plan.form == "factored", plan.form == "dense"
        keeps_inputs = learns_a or (dense and learns_b) or (plan.before is not None and passes_on)
        device = weight.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        w = plan.matrix(weight, a, bs)
        own_bias = None if bias is None else bias.to(plan.dtype)
        # Where the Bs cover every output, the bias rides on their product and costs no pass over y of its own.
        rides, wide = False, bs
        if own_bias is not None and factored and sum(len(b) for b in bs) == len(w):
            rides = True
            wide = tuple(torch.cat([b, own_bias[part, None]], 1) for part, b in zip(plan.rows, bs, strict=True))
        y = weight.new_empty(math.prod(inputs[0].shape[:-1]), len(w), dtype=plan.dtype)
        z = None if keeps_inputs or dense or not learns_b else y.new_empty(len(y), len(a))
        for entries, rows in plan.chunks(inputs[0]):
            given = [x[entries] for x in inputs]
            u = (given[0] if plan.before is None else plan.before(*given)).reshape(-1, a.shape[1]).to(plan.dtype)
            y_own = y[rows]
            if own_bias is None or rides:
                torch.mm(u, w.T, out=y_own)
            else:
                torch.addmm(own_bias, u, w.T, out=y_own)
            if factored or z is not None:
                z_own = u @ a.T  # (n, R)
                if factored:
                    ones = [z_own.new_ones(len(z_own), 1)] if rides else []
                    for part, b, z_part in zip(plan.rows, wide, _split(z_own, bs, 1), strict=True):
                        y_own[:, part].addmm_(torch.cat([z_part, *ones], dim=1), b.T)
                if z is not None:
                    z[rows] = z_own
        ctx.plan = plan
        ctx.save_for_backward(weight, a, z, *bs, *(inputs if keeps_inputs else [x.new_empty(0) for x in inputs]))
        ctx.shapes, ctx.keeps_inputs = [x.shape for x in inputs], keeps_inputs
        ctx.inputs_dtype = inputs[0].dtype
        return y.reshape(*inputs[0].shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        plan: Plan = ctx.plan
        count = len(plan.rows)
        weight, a, z, *rest = ctx.saved_tensors
        bs, inputs = rest[:count], rest[count:]
        learns_a, learns_b = ctx.needs_input_grad[3], any(ctx.needs_input_grad[4 : 4 + count])
        wanted = ctx.needs_input_grad[4 + count :]
        factored, dense = plan.form == "factored", plan.form == "dense"
        w = plan.matrix(weight, a, bs)
        dy = dy.reshape(-1, len(w))  # (N, d_out)
        dw = torch.zeros_like(w if dense else w[:0])
        da, dbs = torch.zeros_like(a), [torch.zeros_like(b.T) for b in bs]
        dx: list[Any] = [None] * len(inputs)
        like = inputs[0] if ctx.keeps_inputs else weight.new_empty(1).expand(ctx.shapes[0])
        for entries, rows in plan.chunks(like):
            given = [x[entries] for x in inputs] if ctx.keeps_inputs else []
            u, pull = _rebuild(plan, given, wanted, ctx.autocast)
            # Whatever needs u below has kept the inputs that it is rebuilt from.
            flat = dy.new_empty(0) if u is None else u.detach().reshape(-1, a.shape[1]).to(plan.dtype)
            dy_own = dy[rows]
            if dense:
                if learns_a or learns_b:
                    dw.addmm_(dy_own.T, flat)
                du = dy_own @ w if any(wanted) else None
            else:
                # (R, n): this orientation of the thin products is the fast one.
                dz = torch.cat([b.T @ dy_own[:, part].T for part, b in zip(plan.rows, bs, strict=True)])
                if learns_b:
                    z_own = flat @ a.T if z is None else z[rows]
                    for part, db, z_part in zip(plan.rows, dbs, _split(z_own, bs, 1), strict=True):
                        db.addmm_(z_part.T, dy_own[:, part])
                if learns_a:
                    da.addmm_(dz, flat)
                du = dy_own @ w if any(wanted) else None
                if du is not None and factored:
                    du.addmm_(dz.T, a)
            if du is not None:
                _write(dx, pull(du), entries, ctx.shapes, inputs if plan.reuse else None)
        if dense:
            da = torch.cat([b.T @ dw[part] for part, b in zip(plan.rows, bs, strict=True)])
            dbs = [own @ dw[part].T for part, own in zip(plan.rows, _split(a, bs, 0), strict=True)]
        dx = [d if d is None else d.to(ctx.inputs_dtype) for d in dx]
        return None, None, None, da, *(db.T for db in dbs), *dx


def _split(stacked: Tensor, bs: Sequence[Tensor], dim: int) -> Sequence[Tensor]:
    """The part of A, or of Ax, that belongs to each B."""
    return stacked.split([b.shape[1] for b in bs], dim)


def _rebuild(
    plan: Plan, given: Sequence[Tensor], wanted: Sequence[bool], autocast: tuple[str, torch.dtype, bool]
) -> tuple[Tensor | None, Callable[[Tensor], Sequence[Tensor | None]]]:
    """u again, under the autocast state of the forward pass, and what takes its gradient to the inputs."""
    if plan.before is None or not given:
        return (given[0] if given else None), lambda du: [du]
    device, dtype, enabled = autocast
    if not enabled and hasattr(plan.before, "vjp"):
        return plan.before.vjp(*given)
    leaves = [x.detach().requires_grad_(want) for x, want in zip(given, wanted, strict=True)]
    with torch.set_grad_enabled(any(wanted)), torch.autocast(device, dtype, enabled, cache_enabled=False):
        u = plan.before(*leaves)

    def pull(du: Tensor) -> list[Tensor | None]:
        learning = [leaf for leaf in leaves if leaf.requires_grad]
        grads = iter(torch.autograd.grad(u, learning, du.reshape(u.shape).to(u.dtype)))
        return [next(grads) if leaf.requires_grad else None for leaf in leaves]

    return u, pull


def _write(
    dx: list[Any],
    grads: Sequence[Tensor | None],
    entries: slice,
    shapes: Sequence[torch.Size],
    into: Sequence[Tensor] | None,
) -> None:
    """Put a chunk's gradients in their place; a chunk that is everything needs no copy."""
    for i, (grad, shape) in enumerate(zip(grads, shapes, strict=True)):
        if grad is None:
            continue
        if entries.stop - entries.start == shape[0]:
            dx[i] = grad.reshape(shape)
            continue
        if dx[i] is None:
            dx[i] = grad.new_empty(shape) if into is None else into[i].detach()
        dx[i][entries].copy_(grad.reshape(dx[i][entries].shape))
