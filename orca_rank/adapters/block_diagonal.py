"""Block-diagonal LoRA: n small LoRAs side by side on the diagonal, with n times the rank at the same parameters."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from orca_rank.adapters.lora import LoRA


def gradient_blocks(effective_rank: float, rank: int, d_in: int, d_out: int, most: int = 16) -> int:
    """RaLoRA's n of a layer: the largest power of 2 with n r not above the effective rank of the gradient.

    n = 2^⌊log₂(erank(G)/r)⌋ within 1 … ``most``, erank(G) = exp(H(s/Σs)) of the singular values s (the authors' public
    code); halved, where their code stops with an error, until n divides both widths and a block has full rank r.

    Args:
        effective_rank: erank(G), at least 1. rank: r of one block, at least 1.

    Raises:
        ValueError: unless ``most`` is a power of 2.
    """
    if isinstance(most, bool) or not isinstance(most, int) or most < 1 or most & (most - 1):
        raise ValueError(f"the most blocks must be a power of 2, received {most!r}")
    # what rounding takes from an effective rank does not halve n
    n = min(most, 2 ** max(0, math.floor(math.log2(max(effective_rank, 1.0) / rank) + 1e-6)))
    while n > 1 and (d_in % n or d_out % n or rank > min(d_in, d_out) // n):
        n //= 2
    return n


class BlockDiagonalLoRA(LoRA):
    """ΔW = s blockdiag(B_1 A_1, …, B_n A_n), A_j (r × d_in/n) and B_j (d_out/n × r).

    MELoRA (Ren et al. 2024, arXiv 2402.17263) and RaLoRA: r (d_in + d_out) parameters as in LoRA of rank r, and a ΔW of
    rank up to n r, whose outputs of block j read the inputs of block j alone. The A_j stand side by side in ``lora_A``
    (r, d_in), the B_j below each other in ``lora_B`` (d_out, r). PEFT's layout holds the LoRA of rank n r with the same
    ΔW, zeros included; trained on there, it is no longer block-diagonal.

    Args:
        weight, rank and the rest: as in LoRA; ``rank`` is r, that of one block. kaiming starts every A_j by its own
            width.
        blocks: n, one for all layers or a mapping layer -> n (RaLoRA's are `gradient_blocks`); 1 is LoRA.

    Raises:
        ValueError: unless n divides d_in and d_out, and r is at most the full rank of one block, min(d_in, d_out)/n;
            for another initialisation than kaiming and gaussian. KeyError: when the mapping lacks the layer.
    """

    inits: ClassVar[tuple[str, ...]] = ("kaiming", "gaussian")
    mask_in: Tensor
    mask_out: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "d_out d_in"],
        rank: int,
        *,
        blocks: int | Mapping[str, int] = 4,
        init: str = "kaiming",
        frozen: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(weight, rank, init=init, frozen=frozen, **options)
        n = self._of(blocks, "blocks") if isinstance(blocks, Mapping) else blocks
        if isinstance(n, bool) or not isinstance(n, int) or n < 1 or self.d_in % n or self.d_out % n:
            raise ValueError(
                f"{self.name}: blocks is {n!r}; expected a whole number that divides d_in={self.d_in} and "
                f"d_out={self.d_out}"
            )
        if rank > (full := min(self.d_in, self.d_out) // n):
            raise ValueError(
                f"{self.name}: rank is {rank}, but one of {n} blocks of a {self.d_out} × {self.d_in} matrix has full "
                f"rank {full}: lower the rank (budget.r_max={full}) or blocks"
            )
        self.blocks = n
        if init == "kaiming" and frozen != "B":
            with torch.no_grad():
                self.lora_A.mul_(n**0.5)  # drawn for d_in inputs, where a row has d_in/n
        place = torch.arange(n, device=self.lora_A.device).repeat_interleave(rank)[:, None]  # (n r, 1)
        for name, width in (("mask_in", self.d_in), ("mask_out", self.d_out)):
            own = torch.arange(n, device=place.device).repeat_interleave(width // n)
            self.register_buffer(name, (place == own).to(self.lora_A.dtype), persistent=False)  # (n r, width)

    def _whole(self) -> tuple[Float[Tensor, "nr d_in"], Float[Tensor, "d_out nr"]]:
        return self.mask_in * self.lora_A.repeat(self.blocks, 1), self.mask_out.T * self.lora_B.repeat(1, self.blocks)

    def factors(self) -> tuple[Float[Tensor, "nr d_in"], Float[Tensor, "d_out nr"]]:
        a, b = self._whole()
        return a, self.scale * b

    def plain(self) -> tuple[Float[Tensor, "nr d_in"], Float[Tensor, "d_out nr"], float]:
        a, b = self._whole()
        return a.detach(), b.detach(), self.scale
