"""DyLoRA: one training that serves every rank (Valipour et al. 2022)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.adapters.linear import adapted, adapters, reduce_to_lora
from orca_rank.adapters.lora import B_ALONE, LoRA
from orca_rank.ranks import RankPlan

T = TypeVar("T")
Law = str | Sequence[float] | Tensor
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
    """ΔW = s_b B[:, :b] A[:b] with b drawn anew for every optimiser step; s_b = α/b, α/√b or α.

    The scale is that of the rank in use, as `scale_of` says: α/b (``lora``) gives a short prefix the larger step,
    ``constant`` gives every prefix the same.

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
        ValueError: for an option or a law that does not fit, and for an initialisation that moves W₀, since W₀ − B₀A₀
            fits the full rank alone; KeyError: when a mapping lacks the layer.
    """

    inits: ClassVar[tuple[str, ...]] = B_ALONE

    def __init__(
        self,
        weight: Float[Tensor, "d_out d_in"],
        rank: int,
        *,
        r_min: int = 1,
        law: Law | Mapping[str, Law] = "uniform",
        concentration: float | Mapping[str, float] | None = None,
        share: str = "step",
        update: str = "all",
        **options: Any,
    ) -> None:
        super().__init__(weight, rank, **options)
        if not 1 <= r_min <= rank:
            raise ValueError(f"{self.name}: r_min is {r_min}; expected 1 … {rank}")
        if share not in SHARES or update not in ("all", "frozen"):
            raise ValueError(
                f"{self.name}: share={share!r}, update={update!r}; expected {SHARES} and ('all', 'frozen')"
            )
        self.r_min, self.share, self.update = r_min, share, update
        self.law = self._law(law, concentration)
        self._kept: tuple[Tensor, Tensor] | None = None

    def _law(
        self, law: Law | Mapping[str, Law], concentration: float | Mapping[str, float] | None
    ) -> Float[Tensor, " r"]:
        count = self.rank - self.r_min + 1
        if concentration is not None and law != "stick-breaking":
            raise ValueError(f"{self.name}: concentration is of law='stick-breaking' alone, received law={law!r}")
        if isinstance(law, str) and law == "uniform":
            return torch.full((count,), 1.0 / count, dtype=torch.float64)
        if isinstance(law, str) and law == "stick-breaking":
            alpha = self._own(concentration, "concentration")
            if alpha is None:
                raise ValueError(f"{self.name}: law='stick-breaking' needs a concentration (the prior's α)")
            return survival_law(float(alpha), self.r_min, self.rank)
        own = self._own(law, "law")
        if isinstance(own, str) or not isinstance(own, Sequence | Tensor) or len(own) != count:
            raise ValueError(f"{self.name}: law is {own!r}; expected {count} probabilities, one for each b")
        given = torch.as_tensor(own, dtype=torch.float64)
        if bool((given < 0).any()) or not float(given.sum()) > 0:
            raise ValueError(f"{self.name}: law is {own!r}; expected probabilities with a positive sum")
        return given / given.sum()

    def _own(self, value: T | Mapping[str, T], what: str) -> T:
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


def begin_dylora(layers: Sequence[DyLoRA], generator: torch.Generator | None = None) -> None:
    """Draw this step's ranks for all DyLoRA layers of a model together, as their ``share`` says.

    Under data parallelism every process must pass a generator with the same seed.
    """
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


def evaluate_ranks(model: nn.Module, evaluate: Callable[[], T], ranks: Sequence[int] | None = None) -> dict[int, T]:
    """``evaluate()`` at every rank (default 1 … the largest r_max), then the full rank again.

    Raises:
        ValueError: if the model has no DyLoRA layer.
    """
    layers = [adapter for adapter in adapters(model).values() if isinstance(adapter, DyLoRA)]
    if not layers:
        raise ValueError("the model has no DyLoRA layer; inject with adapter=DyLoRA")
    result: dict[int, T] = {}
    try:
        for rank in range(1, max(layer.rank for layer in layers) + 1) if ranks is None else ranks:
            set_rank(model, rank)
            result[rank] = evaluate()
    finally:
        set_rank(model, None)
    return result


def cut(model: nn.Module, plan: RankPlan | Mapping[str, int]) -> None:
    """Turn every DyLoRA layer into the plain LoRA of the rank that ``plan`` gives it, with no training.

    Rank 0 removes the adapter. The plan must name every DyLoRA layer.

    Raises:
        KeyError: for a layer that the plan lacks or that is no DyLoRA. ValueError: for a rank outside 0 … r_max.
    """
    ranks = plan.ranks if isinstance(plan, RankPlan) else plan
    layers = {name: adapter for name, adapter in adapters(model).items() if isinstance(adapter, DyLoRA)}
    if missing := sorted(layers.keys() ^ ranks.keys()):
        raise KeyError(f"plan and DyLoRA layers differ, e.g. in {missing[0]!r}; give every DyLoRA layer a rank")
    set_rank(model, {name: rank for name, rank in ranks.items() if rank != 0})
    reduce_to_lora(model, DyLoRA, ranks)
