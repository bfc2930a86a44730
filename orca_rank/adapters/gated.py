"""LoRA whose rank is inferred: stick-breaking gates with an Indian-buffet prior per layer."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.adapters.linear import adapters, reduce_to_lora
from orca_rank.adapters.lora import B_ALONE, LoRA

EULER = 0.5772156649015329


def kumaraswamy_to_beta(a: Float[Tensor, " r"], b: Float[Tensor, " r"], alpha: float) -> Float[Tensor, " r"]:
    """KL(Kumaraswamy(a, b) ‖ Beta(α, 1)) = (a − α)/a (−γ − ψ(b) − 1/b) + log(ab) − log α − (b − 1)/b.

    Nalisnick & Smyth 2017, eq. 10, whose infinite sum has the factor β − 1 = 0.
    """
    return (a - alpha) / a * (-EULER - torch.digamma(b) - 1 / b) + (a * b).log() - math.log(alpha) - (b - 1) / b


class GatedLoRA(LoRA):
    """ΔW = s B diag(z) A, z_k ~ Bernoulli(π_k), π_k = Π_{j≤k} ν_j, ν_j ~ Beta(α, 1): Teh et al. 2007's stick-breaking.

    The posterior over the sticks is Kumaraswamy(a_k, b_k), drawn by inverse transform; z is a concrete relaxation
    (Maddison et al. 2017) at a temperature. ``begin_step`` fixes the noise of a step; without it, and in evaluation, z
    is the posterior mean of π. ``extra_loss`` is the weighted KL of the sticks; `prune` keeps the gates above a
    threshold.

    Args:
        weight, rank and the rest: as in LoRA; ``rank`` is the truncation K.
        concentration: α, one for all layers or a mapping layer -> α; α is also the prior's mean rank.
        temperature: of the relaxed Bernoulli.
        kl_weight: of the KL in the loss; 1/(number of training examples) is the evidence bound per example.

    Raises:
        ValueError: unless α and the temperature are positive, and for an initialisation that moves W₀, since the gates
            would not hold back B₀A₀; KeyError: when the mapping lacks the layer.
    """

    inits: ClassVar[tuple[str, ...]] = B_ALONE

    def __init__(
        self,
        weight: Float[Tensor, "d_out d_in"],
        rank: int,
        *,
        concentration: float | Mapping[str, float] = 4.0,
        temperature: float = 0.5,
        kl_weight: float = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__(weight, rank, **options)
        if isinstance(concentration, Mapping):
            if self.name not in concentration:
                raise KeyError(f"concentration has no entry for {self.name!r}; it knows {sorted(concentration)[:5]}")
            concentration = concentration[self.name]
        if not (concentration > 0 and temperature > 0):
            raise ValueError(
                f"{self.name}: concentration={concentration}, temperature={temperature}; expected positive numbers"
            )
        self.concentration, self.temperature = float(concentration), float(temperature)
        if not (kl_weight >= 0 and math.isfinite(kl_weight)):
            raise ValueError(f"{self.name}: kl_weight={kl_weight}; expected a number of at least 0")
        self.kl_weight = float(kl_weight)
        # Kumaraswamy(α, 1) is Beta(α, 1): the posterior starts at the prior.
        self.log_a = nn.Parameter(self.lora_A.new_full((rank,), math.log(self.concentration)))
        self.log_b = nn.Parameter(self.lora_A.new_zeros(rank))
        self._noise: Tensor | None = None

    def survival(self) -> Float[Tensor, " r"]:
        """Posterior means E[π_k] = Π_{j≤k} b_j B(1 + 1/a_j, b_j)."""
        a, b = self.log_a.exp(), self.log_b.exp()
        log_mean = b.log() + torch.lgamma(1 + 1 / a) + torch.lgamma(b) - torch.lgamma(1 + 1 / a + b)
        return log_mean.cumsum(0).exp()

    def gates(self) -> Float[Tensor, " r"]:
        """z: relaxed samples under a step's noise, posterior means otherwise."""
        if self._noise is None or not self.training:
            return self.survival()
        u, v = self._noise
        log_nu = torch.log1p(-(u ** (-self.log_b).exp())) * (-self.log_a).exp()  # (1 − u^{1/b})^{1/a}
        log_pi = log_nu.cumsum(0).clamp(max=-1e-6)
        logit = log_pi - torch.log(-torch.expm1(log_pi))
        return torch.sigmoid((logit + v.log() - torch.log1p(-v)) / self.temperature)

    def begin_step(self, generator: torch.Generator | None = None) -> None:
        noise = torch.rand(2, self.rank, generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        self._noise = noise.to(self.lora_A)

    def end_step(self) -> None:
        self._noise = None

    def factors(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
        return self.gates()[:, None] * self.lora_A, self.scale * self.lora_B

    def extra_loss(self) -> Tensor:
        return self.kl_weight * kumaraswamy_to_beta(self.log_a.exp(), self.log_b.exp(), self.concentration).sum()

    def plain(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"], float]:
        return (self.survival()[:, None] * self.lora_A).detach(), self.lora_B.detach(), self.scale

    def inferred_rank(self, threshold: float = 0.5) -> int:
        """The number of gates whose posterior mean is at least the threshold: a prefix, since π falls."""
        return int((self.survival() >= threshold).sum())


def prune(model: nn.Module, threshold: float = 0.5) -> dict[str, int]:
    """Turn every gated layer into plain LoRA of its inferred rank, with the gates' means in A; rank 0 removes it.

    Returns:
        layer -> rank.
    """
    ranks = {n: a.inferred_rank(threshold) for n, a in adapters(model).items() if isinstance(a, GatedLoRA)}
    reduce_to_lora(model, GatedLoRA, ranks)
    return ranks
