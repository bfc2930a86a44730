"""A Linear that carries adapters: the frozen matrix keeps its name, so checkpoints of the bare model still load."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.adapters.lean import LeanLinear, Plan, cheapest
from orca_rank.adapters.lora import LoRA, scale_of
from orca_rank.adapters.products import FastLinear

WHOLE = "all"
THIRDS = ("q", "k", "v")
MEMORY = ("auto", "plain", "fast", "lean")


class AdaptedModule(nn.Module):
    """What every layer with adapters has beside its own forward pass; mixed into the class of the layer it replaces.

    It holds the very Parameters of that layer under the same names, and its adapters in ``branches``.

    Attributes: weight, W₀ in the shape of the layer; in_features and out_features, of the matrix; branches, part ->
        LoRA; unmerged_weight, W₀ while ``weight`` is merged.
    """

    weight: Tensor
    in_features: int
    out_features: int
    branches: nn.ModuleDict
    unmerged_weight: Tensor | None

    def _carry(self, base: nn.Module, branches: Mapping[str, LoRA]) -> None:
        self.branches = nn.ModuleDict(dict(branches))
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.train(base.training)

    @property
    def parts(self) -> dict[str, LoRA]:
        """The adapters by the part of the matrix that they adapt."""
        return {part: branch for part, branch in self.branches.items() if isinstance(branch, LoRA)}

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    def rows(self, part: str) -> slice:
        """The rows of W, and columns of y, that a part adapts."""
        if part == WHOLE:
            return slice(0, self.out_features)
        third = self.out_features // 3
        start = THIRDS.index(part) * third
        return slice(start, start + third)

    def assemble(self, parts: Mapping[str, Tensor | None]) -> Tensor | None:
        """Rows of the parts put in their place, zeros elsewhere; None when every part is None."""
        present = {part: value for part, value in parts.items() if value is not None}
        if not present:
            return None
        some = next(iter(present.values()))
        if WHOLE in present:
            return some
        zero = torch.zeros_like(some)
        return torch.cat([present.get(part, zero) for part in THIRDS])

    def own_weight(self) -> Tensor:
        """The matrix that is stored: W₀, or W₀ + ΔW while it is merged."""
        return self.weight

    def base_weight(self) -> Tensor:
        """W₀, or W₀ plus what the adapters add without learning it."""
        own, offset = self.own_weight(), self.assemble({part: branch.offset() for part, branch in self.parts.items()})
        return own if offset is None else own + offset.to(own.dtype).view_as(own)

    @property
    def dropout(self) -> float:
        return next(iter(self.parts.values())).dropout

    def delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        """ΔW of the whole matrix, detached.

        Raises:
            ValueError: when an adapter is not linear in x and so has no ΔW.
        """
        with torch.no_grad():
            delta = self.assemble({part: branch.delta_weight() for part, branch in self.parts.items()})
        return self.own_weight().new_zeros(self.out_features, self.in_features) if delta is None else delta

    @torch.no_grad()
    def merge(self) -> None:
        """W ← W₀ + ΔW, once. W₀ is kept aside, so that ``unmerge`` gives its very bits back."""
        if not self.merged:
            delta, own = self.delta_weight(), self.own_weight()
            self.unmerged_weight = own.detach().clone()
            own.add_(delta.to(own.dtype).view_as(own))

    @torch.no_grad()
    def unmerge(self) -> None:
        """W ← W₀; nothing happens when nothing is merged."""
        if self.unmerged_weight is not None:
            self.own_weight().copy_(self.unmerged_weight)
            self.unmerged_weight = None

    def bare(self) -> nn.Module:
        """A plain layer over the same Parameters, as they stand (merged or not)."""
        raise NotImplementedError


class AdaptedLinear(AdaptedModule, nn.Linear):
    """y = (W₀ + ΔW) x + bias with ΔW the adapters' (Hu et al. 2021).

    It holds the very Parameters of the Linear that it replaces, under the same names, and its adapters in
    ``branches``: one called ``all``, or some of ``q``, ``k``, ``v`` that each adapt a third of a fused matrix.

    Some models never call a layer but read its ``weight`` (see `reads.read_layers`). Where ``is_read`` is set they
    find W₀ + ΔW there, through which gradients flow; the Parameter W₀ stands in state dicts as ever.

    Args:
        base: the Linear to replace.
        branches: part -> adapter.
    """

    is_read: bool = False

    def __init__(self, base: nn.Linear, branches: Mapping[str, LoRA]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.memory = "plain"
        self._carry(base, branches)

    def own_weight(self) -> Tensor:
        own = self._parameters.get("weight")
        if own is None:
            raise AttributeError("the weight has not been set yet")  # as torch asks while it registers one
        return own

    @property
    def weight(self) -> Tensor:
        own = self.own_weight()
        if not self.is_read or self.merged:
            return own
        delta = self.assemble({part: branch.delta_weight() for part, branch in self.parts.items()})
        return own if delta is None else own + delta.to(own.dtype)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.register_parameter("weight", value if isinstance(value, nn.Parameter) else nn.Parameter(value))

    def forward(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_out"]:
        if self.merged:
            return F.linear(x, self.own_weight(), self.bias)
        if self.folds(x):
            return F.linear(x, self.own_weight() + self.delta_weight().to(x.dtype), self.bias)
        if self.is_lean:
            return self.fast(x)
        y = F.linear(x, self.base_weight(), self.bias)
        dropped = F.dropout(x, self.dropout, self.training)
        pieces = {part: branch(dropped) for part, branch in self.parts.items()}
        if WHOLE in pieces:
            return y + pieces[WHOLE]
        zero = y.new_zeros(*y.shape[:-1], self.out_features // 3)
        return y + torch.cat([pieces.get(part, zero) for part in THIRDS], dim=-1)

    def folds(self, x: Tensor) -> bool:
        """Whether (W₀ + ΔW)x is the cheaper way now: one product instead of three, and no pass over y to add to it.

        Without gradients alone, and with enough tokens to pay for ΔW; in less than float32, W₀ would round ΔW away.
        """
        d_out, d_in = self.out_features, self.in_features
        return not (
            torch.is_grad_enabled()
            or x.numel() * (d_in + d_out) < d_in * d_in * d_out
            or x.dtype not in (torch.float32, torch.float64)
            or torch.is_autocast_enabled(x.device.type)
            or (self.training and self.dropout > 0)
            or not all(branch.low_rank for branch in self.parts.values())
        )

    @property
    def is_lean(self) -> bool:
        """Whether the fast path applies now: it wants frozen W₀ and bias, adapters with two factors, and no dropout.

        A compiler sees the plain operations and plans its own recomputation.
        """
        return not (
            self.memory == "plain"
            or self.merged
            or torch.compiler.is_compiling()
            or self.weight_learns
            or (self.bias is not None and self.bias.requires_grad)
            or (self.training and self.dropout > 0)
            or not all(branch.low_rank for branch in self.parts.values())
        )

    @property
    def weight_learns(self) -> bool:
        return self.own_weight().requires_grad

    def kept_weight(self) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """What the backward pass keeps of W₀, and how to get W₀ from it."""
        return self.base_weight(), None

    def fast(self, x: Tensor) -> Tensor:
        """The layer applied to x, which the backward pass keeps; see `products.FastLinear`."""
        whole = self.branches._modules.get(WHOLE)
        weight, unpack = self.kept_weight()
        mixed = x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type)
        if not isinstance(whole, LoRA) or unpack is not None or mixed:
            return self.after(None, x)
        a, b = whole.factors()
        form = cheapest(x.numel() // self.in_features, len(a), self.in_features, len(b), x.dtype.itemsize >= 4)
        if form == "dense":
            return self.after(None, x)
        return FastLinear.apply(form == "folded", x, weight, self.bias, a.to(x.dtype), b.to(x.dtype))

    def after(
        self, before: Callable[..., Tensor] | None, *inputs: Tensor, group: int | None = None, reuse: bool = False
    ) -> Tensor:
        """The layer applied to ``before(*inputs)``, which the backward pass computes again instead of keeping it.

        Args:
            before: see `lean.Plan`; None is the identity.
            inputs: each (n, ..., d).
            group: how many entries of dimension 0 ``before`` must see together; None when it works row by row.
            reuse: see `lean.Plan`.
        """
        device = inputs[0].device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else inputs[0].dtype
        factors = [branch.factors() for branch in self.parts.values()]
        a = torch.cat([a for a, _ in factors]) if len(factors) > 1 else factors[0][0]
        bs = [b.to(dtype) for _, b in factors]
        shape = inputs[0].shape[:-1]
        rows = [self.rows(part) for part in self.branches]
        forms = {cheapest(shape.numel(), b.shape[1], self.in_features, len(b), dtype.itemsize >= 4) for b in bs}
        form = forms.pop() if len(forms) == 1 else "factored"
        weight, unpack = self.kept_weight()
        plan = Plan(before, rows, form, group or 1, dtype, reuse, unpack)
        if group is None:
            inputs = tuple(x.reshape(-1, x.shape[-1]) for x in inputs)
        y = LeanLinear.apply(plan, weight, self.bias, a.to(dtype), *bs, *inputs)
        return y.reshape(*shape, -1)

    def bare(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.own_weight(), self.bias
        return linear.train(self.training)


def adapted(model: nn.Module) -> dict[str, AdaptedModule]:
    """Every adapted layer of the model by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedModule)}


def adapters(model: nn.Module) -> dict[str, LoRA]:
    """Every adapter by the name the rank plan uses: the module path, with ``.q``, ``.k`` or ``.v`` for a third."""
    return {
        name if part == WHOLE else f"{name}.{part}": branch
        for name, module in adapted(model).items()
        for part, branch in module.parts.items()
    }


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` stands in ``model``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def reduce_to_lora(model: nn.Module, kind: type[LoRA], ranks: Mapping[str, int]) -> None:
    """Make every adapter of a kind the plain LoRA of its first rows, of the same scale; rank 0 removes it.

    Args:
        kind: adapters whose `plain` form is nested: its first r rows and columns stand alone.
        ranks: adapter -> r, of at least 0, for each adapter of the kind.
    """
    for name, module in adapted(model).items():
        for part, branch in module.parts.items():
            if isinstance(branch, kind) and (rank := ranks[branch.name]):
                module.branches[part] = _first_rows(branch, rank)
            elif isinstance(branch, kind):
                del module.branches[part]
        if not module.branches:
            replace(model, name, module.bare())


def _first_rows(branch: LoRA, rank: int) -> LoRA:
    a, b, scale = branch.plain()  # (≥ r, d_in), (d_out, ≥ r)
    shape = a.new_empty(branch.d_out, branch.d_in, device="meta")
    alpha = scale / scale_of(1.0, rank, branch.scaling)
    lora = LoRA(shape, rank, name=branch.name, alpha=alpha, scaling=branch.scaling, dropout=branch.dropout)
    lora.lora_A, lora.lora_B = nn.Parameter(a[:rank].clone()), nn.Parameter(b[:, :rank].clone())
    return lora.train(branch.training)
