"""DyLoRA: one training that serves every rank (Valipour et al. 2022)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.adapters.linear import adapted, adapters
from orca_rank.adapters.lora import LoRA

SHARES = ("step", "layer", "quantile")


def survival_law(concentration: float, r_min: int, r_max: int) -> Float[Tensor, " r"]:
    """p(b) ∝ (α/(1+α))^{b−1} on b = r_min … r_max: the law of the depth of a stick-breaking IBP with concentration α.

    ν_k ~ Beta(α, 1) gives E[Π_{j≤k} ν_j] = (α/(1+α))^k; read as P(b > k) it makes b geometric.

    Raises:
        ValueError: if α is not positive.
    """
    if not concentration > 0:
        raise ValueError(f"the concentration of a stick-breaking law is {concentration}; expected more than 0")
    ratio = concentration / (1.0 + concentration)
    law = ratio ** torch.arange(r_max - r_min + 1, dtype=torch.float64)
    return law / law.sum()


class DyLoRA(LoRA):
    """ΔW = s_b B[:, :b] A[:b] with b drawn anew for every optimiser step; s_b = α/b (or α/√b).

    Every prefix learns to stand alone, so the adapter can be cut to any rank afterwards (`cut`). The rows and columns
    that a step does not train keep their exact bits, whatever momentum or weight decay the optimiser has: they are put
    back in ``end_step``.

    Args:
        weight, rank, name, alpha, scaling, dropout, init, directions, generator: as in LoRA; ``rank`` is r_max.
        r_min: the smallest b.
        law: p_B over r_min … r_max: ``uniform``, ``stick-breaking``, a sequence of probabilities (one for each b), or a
            mapping layer -> sequence.
        concentration: α of the stick-breaking law, one for all or a mapping layer -> α; its mean depth is 1 + α.
        share: ``step`` draws one b per step (cut at each layer's rank; the law is the first widest layer's), ``layer``
            one per layer, ``quantile`` one u ~ U(0, 1) per step and b = F⁻¹(u) of each layer's own law.
        update: ``all`` trains the first b rows and columns, ``frozen`` only number b.

    Raises:
        ValueError: for an option or a law that does not fit; KeyError: when a mapping lacks the layer.
    """

    def __init__(
        self,
        weight: Float[Tensor, "d_out d_in"],
        rank: int,
        *,
        r_min: int = 1,
        law: Any = "uniform",
        concentration: Any = None,
        share: str = "step",
        update: str = "all",
        init: str = "kaiming",
        **options: Any,
    ) -> None:
        super().__init__(weight, rank, init=init, **options)
        if init in ("pissa", "symmetric"):
            raise ValueError(f"{self.name}: DyLoRA cannot start from {init}: W₀ − B₀A₀ fits the full rank alone")
        if not 1 <= r_min <= rank:
            raise ValueError(f"{self.name}: r_min is {r_min}; expected 1 … {rank}")
        if share not in SHARES or update not in ("all", "frozen"):
            raise ValueError(
                f"{self.name}: share={share!r}, update={update!r}; expected {SHARES} and ('all', 'frozen')"
            )
        self.r_min, self.share, self.update = r_min, share, update
        self.law = self._law(law, concentration)
        self._kept: tuple[Tensor, Tensor] | None = None

    def _law(self, law: Any, concentration: Any) -> Float[Tensor, " r"]:
        count = self.rank - self.r_min + 1
        if law == "uniform":
            return torch.full((count,), 1.0 / count, dtype=torch.float64)
        if law == "stick-breaking":
            own = self._own(concentration, "concentration")
            if own is None:
                raise ValueError(f"{self.name}: law='stick-breaking' needs a concentration (the prior's α)")
            return survival_law(float(own), self.r_min, self.rank)
        own = self._own(law, "law")
        if isinstance(own, str) or not isinstance(own, Sequence | Tensor) or len(own) != count:
            raise ValueError(f"{self.name}: law is {own!r}; expected {count} probabilities, one for each b")
        given = torch.as_tensor(own, dtype=torch.float64)
        if bool((given < 0).any()) or not float(given.sum()) > 0:
            raise ValueError(f"{self.name}: law is {own!r}; expected probabilities with a positive sum")
        return given / given.sum()

    def _own(self, value: Any, what: str) -> Any:
        if not isinstance(value, Mapping):
            return value
        if self.name not in value:
            raise KeyError(f"{what} has no entry for {self.name!r}; it knows {sorted(value)[:5]}")
        return value[self.name]

    def set_rank(self, rank: int | None) -> None:
        """Use the first ``rank`` rows and columns; None is all of them.

        Raises:
            ValueError: outside 1 … r_max.
        """
        rank = self.rank if rank is None else rank
        if not 1 <= rank <= self.rank:
            raise ValueError(f"{self.name}: rank is {rank}; this DyLoRA serves 1 … {self.rank}")
        self.active = rank

    def factors(self) -> tuple[Float[Tensor, "b d_in"], Float[Tensor, "d_out b"]]:
        b = self.active
        a, up = self.lora_A[:b], self.lora_B[:, :b]
        if self.update == "frozen" and self._kept is not None:
            a = torch.cat([a[: b - 1].detach(), a[b - 1 :]])
            up = torch.cat([up[:, : b - 1].detach(), up[:, b - 1 :]], dim=1)
        return a, self.scale * up

    def plain(self) -> tuple[Float[Tensor, "b d_in"], Float[Tensor, "d_out b"], float]:
        b = self.active
        return self.lora_A.detach()[:b], self.lora_B.detach()[:, :b], self.scale

    def draw(self, u: float) -> int:
        """b = F⁻¹(u) of this layer's law."""
        return self.r_min + int((self.law.cumsum(0) <= u).sum().clamp(max=len(self.law) - 1))

    def start(self, rank: int) -> None:
        """Open a step at this rank: what it does not train is remembered."""
        self.set_rank(rank)
        self._kept = (self.lora_A.detach().clone(), self.lora_B.detach().clone())

    @torch.no_grad()
    def end_step(self) -> None:
        """Put back the rows and columns outside the step's own, then use the full rank again."""
        if self._kept is None:
            return
        a, b = self._kept
        first = self.active - 1 if self.update == "frozen" else 0
        for rows in (slice(0, first), slice(self.active, self.rank)):
            self.lora_A[rows] = a[rows]
            self.lora_B[:, rows] = b[:, rows]
        self._kept = None
        self.set_rank(None)


def begin_dylora(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw this step's ranks for all DyLoRA layers together, as their ``share`` says.

    Under data parallelism every process must pass a generator with the same seed.
    """
    layers = [adapter for adapter in adapters(model).values() if isinstance(adapter, DyLoRA)]
    if not layers:
        return
    u = torch.rand(len(layers) + 1, generator=generator, dtype=torch.float64).tolist()
    widest = max(layers, key=lambda layer: layer.rank)
    common = widest.draw(u[-1])
    for layer, own in zip(layers, u, strict=False):
        if layer.share == "step":
            layer.start(max(layer.r_min, min(common, layer.rank)))
        else:
            layer.start(layer.draw(own if layer.share == "layer" else u[-1]))


def set_rank(model: nn.Module, rank: int | Mapping[str, int] | None) -> None:
    """Let every DyLoRA layer use its first ``rank`` rows and columns (cut at its own r_max), or as the mapping says.

    Raises:
        KeyError: if the mapping names a layer that is no DyLoRA. ValueError: for a rank outside 1 … r_max of a named
            layer, or for merged layers, whose weights would not follow.
    """
    layers = {name: adapter for name, adapter in adapters(model).items() if isinstance(adapter, DyLoRA)}
    if merged := [name for name, module in adapted(model).items() if module.merged]:
        raise ValueError(f"{merged[0]} is merged, its weight would keep the old rank; call unmerge(model) first")
    if isinstance(rank, Mapping):
        if unknown := sorted(rank.keys() - layers.keys()):
            raise KeyError(f"no DyLoRA layer is called {unknown[0]!r}; there are {sorted(layers)[:5]}")
        for name, own in rank.items():
            layers[name].set_rank(own)
        return
    for layer in layers.values():
        layer.set_rank(None if rank is None else min(rank, layer.rank))


def evaluate_ranks(model: nn.Module, evaluate: Callable[[], Any], ranks: Sequence[int] | None = None) -> dict[int, Any]:
    """``evaluate()`` at every rank (default 1 … the largest r_max), then the full rank again.

    Raises:
        ValueError: if the model has no DyLoRA layer.
    """
    layers = [adapter for adapter in adapters(model).values() if isinstance(adapter, DyLoRA)]
    if not layers:
        raise ValueError("the model has no DyLoRA layer; inject with adapter=DyLoRA")
    result = {}
    try:
        for rank in range(1, max(layer.rank for layer in layers) + 1) if ranks is None else ranks:
            set_rank(model, rank)
            result[rank] = evaluate()
    finally:
        set_rank(model, None)
    return result


def cut(model: nn.Module, plan: Any) -> None:
    """Turn every DyLoRA layer into the plain LoRA of the rank that ``plan`` gives it, with no training.

    Rank 0 removes the adapter. The plan must name every DyLoRA layer.

    Raises:
        KeyError: for a layer that the plan lacks or that is no DyLoRA. ValueError: for a rank outside 0 … r_max.
    """
    ranks = getattr(plan, "ranks", plan)
    layers = {name: adapter for name, adapter in adapters(model).items() if isinstance(adapter, DyLoRA)}
    if missing := sorted(layers.keys() ^ ranks.keys()):
        raise KeyError(f"plan and DyLoRA layers differ, e.g. in {missing[0]!r}; give every DyLoRA layer a rank")
    set_rank(model, {name: rank for name, rank in ranks.items() if rank != 0})
    for module_name, module in adapted(model).items():
        for part, branch in list(module.branches.items()):
            if not isinstance(branch, DyLoRA):
                continue
            if ranks[branch.name] == 0:
                del module.branches[part]
            else:
                module.branches[part] = _plain(branch)
        if not module.branches:
            parent, _, child = module_name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.bare())


def _plain(branch: DyLoRA) -> LoRA:
    a, b, _ = branch.plain()
    shape = torch.empty(branch.d_out, branch.d_in, dtype=a.dtype, device="meta")
    options = {"name": branch.name, "alpha": branch.alpha, "scaling": branch.scaling, "dropout": branch.dropout}
    lora = LoRA(shape, branch.active, **options)
    lora.lora_A, lora.lora_B = nn.Parameter(a.clone()), nn.Parameter(b.clone())
    return lora.train(branch.training)
