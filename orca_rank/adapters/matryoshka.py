"""MatryoshkaLoRA: every prefix of the adapter trains in every step (Modoranu et al. 2026, arXiv 2605.07850)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from orca_rank.adapters.dylora import DyLoRA


class MatryoshkaLoRA(DyLoRA):
    """ΔW = B P A within a step, P_i = Σ_{b≥i} p(b) s_b; outside of steps s_b B[:, :b] A[:b] at the rank b in use.

    B P A = Σ_b p(b) s_b B[:, :b] A[:b] is the mean of what a DyLoRA with the law p computes, so that nothing is drawn
    and every row learns in every step. The paper's diagonal (its algorithm 1) is this one with p = 1 instead of 1/n on
    its n training ranks; here p is a law, so that ``scaling`` and ``alpha`` mean what they mean in DyLoRA. What a model
    computes within a step and at full rank thus differs: it is the prefixes that are used (`cut`, `set_rank`).

    Args:
        weight, rank, name, alpha, scaling, dropout, init, directions, generator: as in LoRA; ``rank`` is r_max.
        r_min, law, concentration: as in DyLoRA; ``law="stick-breaking"`` weighs ranks by the IBP prior.

    Raises:
        ValueError, KeyError: as in DyLoRA.
    """

    def __init__(self, weight: Float[Tensor, "d_out d_in"], rank: int, **options: Any) -> None:
        if drawn := sorted(options.keys() & {"share", "update"}):
            raise ValueError(f"MatryoshkaLoRA draws no ranks, so it has no {' and no '.join(drawn)}")
        super().__init__(weight, rank, **options)
        self.in_step = False

    @property
    def diagonal(self) -> Float[Tensor, " r"]:
        """P: what each of the r rows counts for within a step."""
        scales = [self.scale_at(b) for b in range(self.r_min, self.rank + 1)]
        weights = self.law * torch.tensor(scales, dtype=self.law.dtype)
        tails = weights.flip(0).cumsum(0).flip(0)  # Σ_{b≥i} for i = r_min … r_max
        return torch.cat([tails[:1].expand(self.r_min - 1), tails])

    def factors(self) -> tuple[Float[Tensor, "b d_in"], Float[Tensor, "d_out b"]]:
        if not self.in_step:
            return super().factors()
        return self.lora_A, self.lora_B * self.diagonal.to(self.lora_B)

    def start(self, rank: int) -> None:
        """Open a step, of all ranks at once."""
        self.in_step = True

    def end_step(self) -> None:
        self.in_step = False
