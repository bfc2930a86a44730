"""A bottleneck adapter: the non-linear baseline outside the LoRA family."""

from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from orca_rank.adapters.lora import B_ALONE, LoRA, NotExpressible


class Bottleneck(LoRA):
    """y = W₀x + s B GELU(A x): a parallel adapter (He et al. 2022), r (d_in + d_out) parameters as LoRA of rank r.

    B = 0 makes it the identity at the start. It is not linear in x, so it cannot be merged.

    Raises:
        ValueError: for an initialisation that moves W₀, since its offset belongs to a linear map.
    """

    low_rank: ClassVar[bool] = False
    inits: ClassVar[tuple[str, ...]] = B_ALONE

    def forward(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_out"]:
        hidden = F.gelu(F.linear(x, self.lora_A.to(x.dtype)))  # (..., r)
        return F.linear(hidden, (self.scale * self.lora_B).to(x.dtype))

    def delta_weight(self) -> Tensor:
        raise ValueError(f"{self.name}: a bottleneck is not linear in x, so it has no ΔW to merge")

    def plain(self) -> tuple[Tensor, Tensor, float]:
        raise NotExpressible(f"{self.name}: a bottleneck is not linear in x, so no LoRA equals it")
