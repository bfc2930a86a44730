"""Variants that move more than a product of two matrices: Delta-LoRA, additive, re-randomised."""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.adapters.lora import B_ALONE, LoRA, NotExpressible


class DeltaLoRA(LoRA):
    """LoRA whose W follows the product: W ← W + λ s (B⁺A⁺ − BA) after every step from number ``start`` on.

    Zi et al. 2023, algorithm 1 (its t > K counts from one step later). The sum over steps telescopes, so W₀ itself
    stays untouched and what the algorithm has added to it is the offset λ s (BA − B_K A_K), which passes gradients to
    x and not to A and B. That makes merging exact and checkpoints small.

    Args:
        weight, rank and the rest: as in LoRA; no dropout, as in the paper.
        ratio: λ.
        start: K, the number of steps before W begins to follow; below 1, their share of the run (see `Steps.run_of`).

    Raises:
        ValueError: for dropout, a negative start, an initialisation that moves W₀ itself, or a run that ends before W
            would follow.
    """

    inits: ClassVar[tuple[str, ...]] = B_ALONE
    start_A: Tensor
    start_B: Tensor
    steps: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "d_out d_in"],
        rank: int,
        *,
        ratio: float = 2.0,
        start: float = 0.1,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(weight, rank, dropout=dropout, **options)
        if dropout:
            raise ValueError(f"{self.name}: Delta-LoRA takes no dropout (received {dropout}): W must see what BA saw")
        if start < 0 or start != start or (start >= 1 and start != int(start)):
            raise ValueError(
                f"{self.name}: start is {start}; expected a number of steps, 0 or more, or a share of the run below 1"
            )
        if not (ratio > 0 and math.isfinite(ratio)):
            raise ValueError(f"{self.name}: ratio is {ratio}; expected a number above 0, at 0 W would never follow")
        self.ratio, self.start = float(ratio), start
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=self.lora_A.device))
        self.start_A, self.start_B = torch.zeros_like(self.lora_A), torch.zeros_like(self.lora_B)
        if start == 0:
            self._follow()

    @property
    def follows(self) -> bool:
        """Whether W follows the product by now."""
        return bool(self.start_A.any())  # A_K; an A is never zero

    @property
    def settled(self) -> bool:
        """Before W follows this is plain LoRA."""
        return self.follows

    def run_of(self, steps: int) -> None:
        """Begin after a share of a run of so many optimiser steps, if `start` is one."""
        self.start = round(self.start * steps) if self.start < 1 else int(self.start)
        if self.start >= steps:
            raise ValueError(
                f"adapter.module.start={self.start}: the run has {steps} optimiser steps, so W would never follow and "
                f"this were plain LoRA; set it below {steps}, or to a share of the run below 1"
            )
        if self.start == 0 and not self.follows:
            self._follow()

    def begin_step(self, generator: torch.Generator | None = None) -> None:
        if 0 < self.start < 1:
            raise ValueError(
                f"{self.name}: start={self.start} is a share of the run: call Steps(model).run_of(<optimiser steps>) "
                f"before the first, or give a number of steps"
            )

    def _follow(self) -> None:
        self.start_A.copy_(self.lora_A.detach())
        self.start_B.copy_(self.lora_B.detach())

    def end_step(self) -> None:
        self.steps += 1
        if int(self.steps) == self.start:
            self._follow()

    def renewed(self) -> dict[str, Tensor]:
        """All of A and B at step K: an average that lags behind A_K and B_K would follow its lag."""
        if int(self.steps) != self.start:
            return {}
        return {name: torch.ones_like(self.steps, dtype=torch.bool) for name in ("lora_A", "lora_B")}

    @torch.no_grad()
    def offset(self) -> Float[Tensor, "d_out d_in"] | None:
        """λ s (BA − B_K A_K), what the algorithm has added to W; None before it starts."""
        if not self.follows:
            return None
        return self.ratio * self.scale * (self.lora_B @ self.lora_A - self.start_B @ self.start_A)

    def plain(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"], float]:
        if not self.follows:
            return self.lora_A.detach(), self.lora_B.detach(), self.scale
        a = torch.cat([self.lora_A, self.start_A])
        b = torch.cat([(1 + self.ratio) * self.lora_B, -self.ratio * self.start_B], dim=1)
        return a.detach(), b.detach(), self.scale


class Additive(LoRA):
    """ΔW = s (B̃ J + Jᵀ Ã), J = (I_r I_r … I_r): row and column terms added, not multiplied (kexue.fm/9590).

    At r = 1 it is ΔW_ij = u_i + v_j, of rank 2. Here J is (r × d_in) beside B (d_out × r), and (d_out × r) beside
    A (r × d_in). A = B = 0 at the start; both have gradients there.

    Raises:
        ValueError: unless r divides d_in and d_out, for an initialisation other than kaiming (all are zero here), or a
            frozen factor.
    """

    inits: ClassVar[tuple[str, ...]] = ("kaiming",)
    ones_in: Tensor
    ones_out: Tensor

    def __init__(self, weight: Float[Tensor, "d_out d_in"], rank: int, **options: Any) -> None:
        super().__init__(weight, rank, **options)
        if self.d_in % rank or self.d_out % rank:
            raise ValueError(f"{self.name}: rank {rank} must divide {self.d_in} and {self.d_out} in the additive form")
        if options.get("frozen"):
            raise ValueError(f"{self.name}: the additive form trains both factors; leave frozen out")
        nn.init.zeros_(self.lora_A)
        eye = torch.eye(rank, dtype=self.lora_A.dtype, device=self.lora_A.device)
        self.register_buffer("ones_in", eye.repeat(1, self.d_in // rank), persistent=False)  # J, (r, d_in)
        self.register_buffer("ones_out", eye.repeat(self.d_out // rank, 1), persistent=False)  # Jᵀ, (d_out, r)

    def factors(self) -> tuple[Float[Tensor, "two_r d_in"], Float[Tensor, "d_out two_r"]]:
        a, b, scale = self._both()
        return a, scale * b

    def _both(self) -> tuple[Tensor, Tensor, float]:
        return torch.cat([self.ones_in, self.lora_A]), torch.cat([self.lora_B, self.ones_out], dim=1), self.scale

    def plain(self) -> tuple[Float[Tensor, "two_r d_in"], Float[Tensor, "d_out two_r"], float]:
        a, b, scale = self._both()
        return a.detach(), b.detach(), scale


class ReRandomised(LoRA):
    """New random projections in every step (kexue.fm/9590, "Random Projection").

    With P (r × d_in) and Q (d_out × r) of independent N(0, 1/r) entries, ΔW = W_acc + (B P + Q A)/√2 and B = A = 0. A
    step of SGD moves it by −η (G PᵀP + Q Qᵀ G)/2, whose mean over P and Q is −η G, the full gradient's step.
    ``end_step`` folds the product into W_acc and ``begin_step`` draws anew, so optimisers with momentum do not fit.

    W_acc has full rank: the checkpoint is as large as the matrix, and PEFT's layout cannot hold it.

    Raises:
        ValueError: for alpha or scaling, since the scale is 1/√2; for an initialisation other than kaiming (A = B = 0).
    """

    inits: ClassVar[tuple[str, ...]] = ("kaiming",)
    learned_buffers: ClassVar[tuple[str, ...]] = ("accumulated",)
    project_in: Tensor
    project_out: Tensor
    accumulated: Tensor

    def __init__(self, weight: Float[Tensor, "d_out d_in"], rank: int, **options: Any) -> None:
        super().__init__(weight, rank, **options)
        if given := sorted({"alpha", "scaling"} & options.keys()):
            raise ValueError(f"{self.name}: re-randomised projections have the scale 1/√2; leave {given[0]} out")
        nn.init.zeros_(self.lora_A)
        nn.init.zeros_(self.lora_B)
        self.register_buffer("project_in", torch.zeros_like(self.lora_A))  # P
        self.register_buffer("project_out", torch.zeros_like(self.lora_B))  # Q
        self.register_buffer("accumulated", torch.zeros_like(weight, dtype=self.lora_A.dtype))
        self.begin_step(options.get("generator"))

    def begin_step(self, generator: torch.Generator | None = None) -> None:
        for projection in (self.project_in, self.project_out):
            projection.copy_(torch.randn(projection.shape, generator=generator).to(projection) * self.rank**-0.5)

    @property
    def scale(self) -> float:
        return 2**-0.5

    def factors(self) -> tuple[Float[Tensor, "two_r d_in"], Float[Tensor, "d_out two_r"]]:
        a = torch.cat([self.project_in, self.lora_A])
        b = torch.cat([self.lora_B, self.project_out], dim=1)
        return a, self.scale * b

    def offset(self) -> Float[Tensor, "d_out d_in"]:
        return self.accumulated

    @torch.no_grad()
    def end_step(self) -> None:
        a, b = self.factors()
        self.accumulated.addmm_(b, a)
        self.lora_A.zero_()
        self.lora_B.zero_()

    def plain(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"], float]:
        raise NotExpressible(f"{self.name}: re-randomised updates have full rank, so no LoRA equals them")
