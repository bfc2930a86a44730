"""LoRA with a mixer between its factors (Wu et al. 2024, Mixture-of-Subspaces in Low-Rank Adaptation)."""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.adapters.lora import B_ALONE, LoRA

MIXERS = ("kaiming", "orthogonal", "normal", "identity")


class MoSLoRA(LoRA):
    """ΔW = s B M A with a mixer M (r × r) that learns (eq. 5 of the paper, in this package's order of factors).

    B = 0 makes it the identity at the start. An orthogonal M that stays fixed trains exactly as LoRA with A ← MA does
    under SGD (the paper's appendix A.4): the gradient of A is Mᵀ times that of MA, and M Mᵀ = I. AdamW divides entry by
    entry, which a rotation does not commute with, so there the two part.

    Args:
        weight, rank and the rest: as in LoRA.
        mixer: initial M: ``kaiming`` uniform (as the reference code, gain 1/√3), ``orthogonal``, ``normal`` N(0, 1/r)
            or ``identity``. ``zero`` is refused: with B = 0 as well, every gradient is zero and nothing ever trains.
        fixed: keep M as it starts; only ``orthogonal`` and ``identity`` mixers may be fixed.

    Raises:
        ValueError: for the zero mixer, an unknown one, or one that may not be fixed; for an initialisation that moves
            W₀, since its B₀A₀ has no mixer.
    """

    inits: ClassVar[tuple[str, ...]] = B_ALONE

    def __init__(
        self,
        weight: Float[Tensor, "d_out d_in"],
        rank: int,
        *,
        mixer: str = "kaiming",
        fixed: bool = False,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(weight, rank, generator=generator, **options)
        if mixer == "zero":
            raise ValueError(f"{self.name}: a zero mixer never trains: at B = 0 all of A, B and M get zero gradients")
        if mixer not in MIXERS:
            raise ValueError(f"{self.name}: mixer is {mixer!r}; expected one of {MIXERS}")
        if fixed and mixer not in ("orthogonal", "identity"):
            raise ValueError(f"{self.name}: a {mixer} mixer cannot be fixed; use 'orthogonal' or 'identity'")
        m = torch.eye(rank, dtype=self.lora_A.dtype, device=self.lora_A.device)
        if mixer == "kaiming":
            nn.init.kaiming_uniform_(m, a=math.sqrt(5), generator=generator)
        elif mixer == "orthogonal":
            nn.init.orthogonal_(m, generator=generator)
        elif mixer == "normal":
            m.normal_(0.0, rank**-0.5, generator=generator)
        self.mixer = nn.Parameter(m, requires_grad=not fixed)

    def factors(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
        return self.mixer @ self.lora_A, self.scale * self.lora_B

    def plain(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"], float]:
        return (self.mixer @ self.lora_A).detach(), self.lora_B.detach(), self.scale


class FLoRA(LoRA):
    """ΔW = s B G A with a Tucker core G (r × r) that starts at zero, A and B random (Si et al. 2024).

    It has MoSLoRA's form, but the zero stands in the core, so A and B get no gradient in the first step and G does.

    Raises:
        ValueError: for another initialisation than kaiming (of A and B), or a frozen factor.
    """

    inits: ClassVar[tuple[str, ...]] = ("kaiming",)

    def __init__(
        self,
        weight: Float[Tensor, "d_out d_in"],
        rank: int,
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(weight, rank, generator=generator, **options)
        if options.get("frozen"):
            raise ValueError(f"{self.name}: FLoRA trains A, B and G; leave frozen out")
        nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5), generator=generator)
        self.core = nn.Parameter(torch.zeros(rank, rank, dtype=self.lora_A.dtype, device=self.lora_A.device))

    def factors(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
        return self.core @ self.lora_A, self.scale * self.lora_B

    def plain(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"], float]:
        return (self.core @ self.lora_A).detach(), self.lora_B.detach(), self.scale


class TwoSubspaces(LoRA):
    """ΔW = s (B₁ + B₂)(A₁ + A₂): halves of LoRA mixed by the fixed butterfly [[I, I], [I, I]] (the paper's eq. 3).

    The mixer has rank r/2, and so has ΔW.

    Raises:
        ValueError: if the rank is odd; for an initialisation that moves W₀, since its B₀A₀ has no mixer.
    """

    inits: ClassVar[tuple[str, ...]] = B_ALONE

    def __init__(self, weight: Float[Tensor, "d_out d_in"], rank: int, **options: Any) -> None:
        super().__init__(weight, rank, **options)
        if rank % 2:
            raise ValueError(f"{self.name}: rank is {rank}; two subspaces need an even rank")

    def factors(self) -> tuple[Float[Tensor, "half d_in"], Float[Tensor, "d_out half"]]:
        a, b = self._halves()
        return a, self.scale * b

    def _halves(self) -> tuple[Tensor, Tensor]:
        first, second = self.lora_A.chunk(2)
        left, right = self.lora_B.chunk(2, dim=1)
        return first + second, left + right

    def plain(self) -> tuple[Float[Tensor, "half d_in"], Float[Tensor, "d_out half"], float]:
        a, b = self._halves()
        return a.detach(), b.detach(), self.scale
