"""LoRA and the form every low-rank adapter of this package shares: two small matrices for one large one."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SCALINGS = ("lora", "rslora", "constant")
B_ALONE = ("kaiming", "gaussian", "directions")  # W₀ stays as it is; B = 0, unless the directions say otherwise
MOVING = ("symmetric", "pissa")  # W₀ − s B₀A₀ stands in its place
INITS = (*B_ALONE, *MOVING, "gora")
Directions = Mapping[str, Tensor | Sequence[Tensor]]
T = TypeVar("T")


class NotExpressible(ValueError):
    """The adapter has no plain LoRA with the same ΔW, so PEFT's layout cannot hold it."""


def scale_of(alpha: float, rank: int, scaling: str) -> float:
    """s = α/r (``lora``, Hu et al. 2021), α/√r (``rslora``, Kalajdzievski 2023) or α itself (``constant``).

    α/r makes a sweep over ranks a sweep over learning rates, and gives every layer of an uneven plan a rate of its own;
    ``constant`` compares ranks alone.

    Raises:
        ValueError: for another scaling.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling is {scaling!r}; expected one of {SCALINGS}")
    return {"lora": alpha / rank, "rslora": alpha / math.sqrt(rank), "constant": alpha}[scaling]


def gora(gradient: Float[Tensor, "d_out d_in"], a: Float[Tensor, "r d_in"], gamma: float) -> Float[Tensor, "d_out r"]:
    """sB with sBA = −γ √(d_in/r) G A⁺A: −G as far as the rows of A span it, at about γ times its length.

    GoRA (He et al. 2025, arXiv 2502.12171): B = −ξ G Aᵀ(AAᵀ)⁻¹ is the best approximation of −ξ G through A. A random A
    keeps √(r/d_in) of ‖G‖ on average; the paper's ξ = γ √d_in / α undoes that under the scale α/√r, and here it is
    undone under every scale.
    """
    r, d_in = a.shape
    inverse = torch.linalg.pinv(a.double())  # (d_in, r)
    return -gamma * math.sqrt(d_in / r) * (gradient.double() @ inverse).to(a)


class LoRA(nn.Module):
    """ΔW = s B A for one matrix W₀ (d_out × d_in): Hu et al. 2021, eq. 3.

    ``frozen="A"`` is LoRA-FA (only B learns, so x need not be kept: a third less memory in a Swin's ``plain`` and
    ``fast`` steps, none less in a ``lean`` one, which keeps no x for LoRA either), ``frozen="B"`` is LoRA-FB (B random,
    A starts at zero). ``init``:

    * ``kaiming`` A uniform as in the reference code, B = 0; ``gaussian`` A ~ N(0, 1/r), B = 0;
    * ``directions`` A (and B, if given) from ``directions[name]``: with B the adapter starts at ΔW = B A;
    * ``gora`` A as kaiming, and from ``gradients[name]`` a B that makes ΔW one step against them, see `gora`;
    * ``symmetric`` W₀ − s B₀A₀ + s B A, both factors random (kexue.fm/9590);
    * ``pissa`` the same with B₀A₀ = the r leading singular triplets of W₀ (Meng et al. 2024).

    Args:
        weight: the matrix to adapt, (d_out, d_in); only its shape, device and dtype are used, and its values by pissa.
        rank: r ≥ 1.
        name: the layer, for messages and for ``directions``.
        alpha: α of the scale s, see `scale_of`.
        scaling: ``lora`` (s = α/r), ``rslora`` (α/√r) or ``constant`` (s = α at every rank).
        dropout: probability of dropping an entry of x on its way into A.
        init: see above.
        directions: layer -> A (≥ r, d_in), or a pair of A and B (d_out, ≥ r); the first r are used.
        gradients: layer -> G (d_out, d_in), the mean gradient of the loss by W₀. gamma: the length of gora's step.
        frozen: None, "A" or "B".
        generator: source of randomness; None is torch's global one.

    Raises:
        ValueError: for an option or a shape that does not fit; KeyError: when ``directions`` or ``gradients`` lack the
            layer.
    """

    low_rank: ClassVar[bool] = True  # whether ΔW is a product, so that `factors` says it all
    host: ClassVar[Callable[..., nn.Linear] | None] = None  # another class than AdaptedLinear to carry this adapter
    inits: ClassVar[tuple[str, ...]] = INITS  # what this kind of adapter can start from
    learned_buffers: ClassVar[tuple[str, ...]] = ()  # those that every step moves as it does parameters

    start_A: Tensor | None  # (r, d_in) and (d_out, r): A₀ and B₀ where the initialisation moves W₀
    start_B: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, "d_out d_in"],
        rank: int,
        *,
        name: str = "",
        alpha: float = 16.0,
        scaling: str = "lora",
        dropout: float = 0.0,
        init: str = "kaiming",
        directions: Directions | None = None,
        gradients: Mapping[str, Tensor] | None = None,
        gamma: float = 0.05,
        frozen: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"{name}: rank is {rank}; an adapter needs at least 1 (rank 0 means no adapter)")
        if init not in self.inits:
            raise ValueError(f"{name}: {type(self).__name__} cannot start from init={init!r}; expected {self.inits}")
        if frozen not in (None, "A", "B"):
            raise ValueError(f"{name}: frozen is {frozen!r}; expected None, 'A' or 'B'")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"{name}: dropout is {dropout}; expected a probability in [0, 1)")
        self.name, self.rank = name, rank
        self.active = rank  # how many of the r rows and columns are in use
        self.alpha, self.scaling, self.dropout = float(alpha), scaling, float(dropout)
        self.d_out, self.d_in = weight.shape
        self.moves_base = init in MOVING
        # Small matrices in half precision lose the optimiser's small updates, so they are kept in float32.
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.lora_A = nn.Parameter(weight.new_zeros(rank, self.d_in, dtype=dtype), requires_grad=frozen != "A")
        self.lora_B = nn.Parameter(weight.new_zeros(self.d_out, rank, dtype=dtype), requires_grad=frozen != "B")
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self._initialise(weight.detach(), init, frozen, directions or {}, generator)
        if init == "gora":
            self._step_against(gradients or {}, gamma, frozen)

    @torch.no_grad()
    def _initialise(
        self,
        weight: Tensor,
        init: str,
        frozen: str | None,
        directions: Directions,
        generator: torch.Generator | None,
    ) -> None:
        if init == "directions":
            self._given(directions)
        elif init == "pissa":
            u, s, v = torch.linalg.svd(weight.to(self.lora_A.dtype), full_matrices=False)
            if self.rank > len(s):
                raise ValueError(f"{self.name}: pissa has {len(s)} singular vectors, rank {self.rank} asks for more")
            root = s[: self.rank].sqrt()
            self.lora_A.copy_(root[:, None] * v[: self.rank])
            self.lora_B.copy_(u[:, : self.rank] * root / self.scale)
        else:
            small = self.lora_B if frozen == "B" else self.lora_A
            if init == "gaussian" or frozen == "B":
                small.normal_(0.0, self.rank**-0.5, generator=generator)
            else:
                nn.init.kaiming_uniform_(small, a=math.sqrt(5), generator=generator)
            if init == "symmetric":
                self.lora_A.normal_(0.0, self.rank**-0.5, generator=generator)
                self.lora_B.normal_(0.0, self.d_out**-0.5, generator=generator)
        if self.moves_base:
            self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def _of(self, given: Mapping[str, T], what: str) -> T:
        if self.name not in given:
            raise KeyError(f"{what} has nothing for {self.name!r}; it knows {sorted(given)[:5]}")
        return given[self.name]

    def _given(self, directions: Directions) -> None:
        given = self._of(directions, "init='directions'")
        a, b = (given, None) if isinstance(given, Tensor) else given
        if a.ndim != 2 or a.shape[0] < self.rank or a.shape[1] != self.d_in:
            raise ValueError(f"{self.name}: A is {tuple(a.shape)}; expected (at least {self.rank}, {self.d_in})")
        self.lora_A.copy_(a[: self.rank])
        if b is not None:
            if b.ndim != 2 or b.shape[0] != self.d_out or b.shape[1] < self.rank:
                raise ValueError(f"{self.name}: B is {tuple(b.shape)}; expected ({self.d_out}, at least {self.rank})")
            self.lora_B.copy_(b[:, : self.rank] / self.scale)

    @torch.no_grad()
    def _step_against(self, gradients: Mapping[str, Tensor], gamma: float, frozen: str | None) -> None:
        if frozen == "B" or not gamma > 0:
            raise ValueError(f"{self.name}: init='gora' sets B by gamma > 0; received frozen={frozen!r}, gamma={gamma}")
        gradient = self._of(gradients, "init='gora'")
        if gradient.shape != (self.d_out, self.d_in):
            raise ValueError(f"{self.name}: G is {tuple(gradient.shape)}; expected {(self.d_out, self.d_in)}")
        if not self.lora_A.is_meta:
            self.lora_B.copy_(gora(gradient.to(self.lora_A.device), self.lora_A, gamma) / self.scale)

    @property
    def scale(self) -> float:
        """s as it is now: of the rank in use."""
        return self.scale_at(self.active)

    def scale_at(self, rank: int) -> float:
        """s of another rank."""
        return scale_of(self.alpha, rank, self.scaling)

    def factors(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
        """(A, sB) of this step: the trained part of ΔW is their product, and gradients flow through it."""
        return self.lora_A, self.scale * self.lora_B

    def offset(self) -> Float[Tensor, "d_out d_in"] | None:
        """The part of ΔW that does not learn, −s B₀A₀; None where there is none."""
        if self.start_A is None or self.start_B is None:
            return None
        return -self.scale * (self.start_B @ self.start_A)

    def delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        """ΔW as the model uses it now."""
        a, b = self.factors()
        offset = self.offset()
        return b @ a if offset is None else b @ a + offset

    def plain(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"], float]:
        """(A, B, s) of the plain LoRA with the same ΔW = s B A, for checkpoints.

        Raises:
            NotExpressible: in variants whose ΔW has no low-rank form.
        """
        if self.start_A is None or self.start_B is None:
            return self.lora_A.detach(), self.lora_B.detach(), self.scale
        a = torch.cat([self.lora_A, self.start_A])  # (2r, d_in)
        b = torch.cat([self.lora_B, -self.start_B], dim=1)  # (d_out, 2r)
        return a.detach(), b.detach(), self.scale

    def forward(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_out"]:
        """ΔW x without its offset, never forming ΔW: O(r(d_in + d_out)) per token."""
        a, b = self.factors()
        return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

    def run_of(self, steps: int) -> None:
        """Told how many optimiser steps the run has; plain LoRA needs nothing."""

    def begin_step(self, generator: torch.Generator | None = None) -> None:
        """Called before an optimiser step's first forward pass; plain LoRA needs nothing."""

    def end_step(self) -> None:
        """Called after the optimiser's step; plain LoRA needs nothing."""

    @property
    def settled(self) -> bool:
        """Whether a schedule that changes what is trained has come to its end; plain LoRA has none."""
        return True

    def renewed(self) -> dict[str, Tensor]:
        """Own parameter -> a mask of its entries (or one that broadcasts) that the last step set anew rather than
        moved: an average over steps begins there again. Plain LoRA has none."""
        return {}

    def extra_loss(self) -> Tensor | None:
        """A term to add to the loss, or None."""
        return None

    def parameters_like_b(self) -> list[nn.Parameter]:
        """The parameters that LoRA+ gives the larger learning rate."""
        return [self.lora_B]

    def extra_repr(self) -> str:
        return f"{self.d_in} -> {self.d_out}, rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling}"
