"""ElaLoRA: ranks that are pruned and grown in training (Chang et al. 2025, arXiv 2504.00254)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.adapters.lora import LoRA


class ElaLoRA(LoRA):
    """ΔW = s P diag(λ) Q, as AdaLoRA's, whose directions die where they matter least and are born where all matter.

    A direction's importance is |λ ∂λ| + mean |P ∂P| + mean |Q ∂Q| over its own column and row, ∂ the gradient of the
    loss, as a moving average over steps. Between the run's first and last shares, `reallocate` moves directions every
    few steps; the sum of ranks over the layers stays that of the plan, and so does the scale s, of the plan's rank.
    Nothing is drawn, so that every process and a resumed run move the same.

    P is ``lora_B`` (d_out, R), Q ``lora_A`` (R, d_in), with R = room · r slots of which ``alive`` are used: parameter
    counts are of the slots. A plain LoRA of the living has the same ΔW.

    Args:
        weight, rank and the rest: as in LoRA; ``rank`` is where a layer starts.
        room: slots over rank, at least 1; never more than min(d_in, d_out).
        every: optimiser steps between two moves. moved: directions moved at once over all layers. most: of them, from
            one layer.
        tinit, tfinal: shares of the run before the first and after the last move.
        decay: of the moving average. orthogonal: weight of ‖PᵀP − I‖² + ‖QQᵀ − I‖² in the loss, a layer.

    Raises:
        ValueError: for an option outside its range, a frozen factor or another initialisation than kaiming (P and Q
            start orthonormal, λ at 0).
    """

    inits: ClassVar[tuple[str, ...]] = ("kaiming",)
    alive: Tensor
    importance: Tensor
    steps: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "d_out d_in"],
        rank: int,
        *,
        room: float = 2.0,
        every: int = 10,
        moved: int = 4,
        most: int = 2,
        tinit: float = 0.1,
        tfinal: float = 0.3,
        decay: float = 0.85,
        orthogonal: float = 0.01,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(weight, rank, generator=generator, **options)
        fits = room >= 1 and min(every, moved, most) >= 1 and 0 <= decay < 1 and orthogonal >= 0
        if not fits or not (tinit >= 0 and tfinal >= 0 and tinit + tfinal < 1):
            raise ValueError(
                f"{self.name}: ElaLoRA needs room >= 1, every, moved and most >= 1, 0 <= decay < 1, orthogonal >= 0 "
                f"and tinit + tfinal < 1; received room={room}, every={every}, moved={moved}, most={most}, "
                f"decay={decay}, orthogonal={orthogonal}, tinit={tinit}, tfinal={tfinal}"
            )
        if options.get("frozen"):
            raise ValueError(f"{self.name}: ElaLoRA trains P, λ and Q; leave frozen out")
        self.every, self.moved, self.most, self.tinit, self.tfinal = every, moved, most, tinit, tfinal
        self.decay, self.orthogonal = decay, orthogonal
        self.run: tuple[int, int] | None = None  # steps between which directions move
        slots = max(rank, min(int(room * rank), self.d_in, self.d_out))
        like = self.lora_A
        self.lora_A = nn.Parameter(nn.init.orthogonal_(like.new_empty(slots, self.d_in), generator=generator))
        self.lora_B = nn.Parameter(nn.init.orthogonal_(like.new_empty(self.d_out, slots), generator=generator))
        self.lambdas = nn.Parameter(like.new_zeros(slots))
        self.register_buffer("alive", torch.arange(slots, device=like.device) < rank)
        self.register_buffer("importance", like.new_zeros(slots))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=like.device))

    def _living(self) -> tuple[Float[Tensor, "k d_in"], Float[Tensor, "d_out k"]]:
        if torch.compiler.is_compiling():  # every slot, the dead at 0: no shape changes as directions move
            return self.lora_A, self.lora_B * (self.lambdas * self.alive)
        living = self.alive.nonzero().flatten()
        return self.lora_A[living], self.lora_B[:, living] * self.lambdas[living]

    def factors(self) -> tuple[Float[Tensor, "k d_in"], Float[Tensor, "d_out k"]]:
        a, b = self._living()
        return a, self.scale * b

    def plain(self) -> tuple[Float[Tensor, "k d_in"], Float[Tensor, "d_out k"], float]:
        a, b = self._living()
        return a.detach(), b.detach(), self.scale

    def extra_loss(self) -> Tensor:
        living = self.alive.nonzero().flatten()
        return self.orthogonal * (_off(self.lora_B[:, living].T) + _off(self.lora_A[living]))

    def run_of(self, steps: int) -> None:
        """Move between these shares of a run of so many optimiser steps.

        Raises:
            ValueError: if no move would be due in it.
        """
        begin, end = self.run = round(self.tinit * steps), steps - round(self.tfinal * steps)
        if -(-max(begin, 1) // self.every) * self.every >= end:  # the first multiple that is not before the begin
            raise ValueError(
                f"adapter.module.every={self.every}: the run has {steps} optimiser steps, of which tinit={self.tinit} "
                f"and tfinal={self.tfinal} leave {begin} to {end} for moves, so no rank would ever move; set it lower, "
                f"or train longer"
            )

    @torch.no_grad()
    def end_step(self) -> None:
        """Take the importances of the step that was just taken into the average, while its gradients are there."""
        self.steps += 1
        if self.lambdas.grad is None or self.lora_A.grad is None or self.lora_B.grad is None:
            return
        now = (self.lambdas * self.lambdas.grad).abs() + (self.lora_A * self.lora_A.grad).abs().mean(1)
        now += (self.lora_B * self.lora_B.grad).abs().mean(0)
        self.importance.mul_(self.decay).add_(now, alpha=1 - self.decay)

    def renewed(self) -> dict[str, Tensor]:
        """Slots in which a direction has just died or been born: there λ is 0 to the bit."""
        anew = self.lambdas.detach() == 0
        return {"lora_A": anew[:, None], "lora_B": anew, "lambdas": anew}

    @property
    def due(self) -> bool:
        """Whether directions move after this step."""
        return (
            self.run is not None and self.run[0] <= int(self.steps) < self.run[1] and not int(self.steps) % self.every
        )

    @property
    def settled(self) -> bool:
        """Whether no move is due any more."""
        return self.run is None or (int(self.steps) // self.every + 1) * self.every >= self.run[1]

    @torch.no_grad()
    def prune(self, slot: int) -> None:
        """Let a direction die."""
        self.alive[slot] = False
        self.lambdas[slot] = 0
        self.importance[slot] = 0

    @torch.no_grad()
    def grow(self) -> None:
        """Use a free slot: unit vectors at right angles to the living, λ = 0, as important as the least of them."""
        slot = int((~self.alive).nonzero()[0])
        living = self.alive.nonzero().flatten()
        self.lora_A[slot] = _away(self.lora_A[slot], self.lora_A[living])
        self.lora_B[:, slot] = _away(self.lora_B[:, slot], self.lora_B[:, living].T)
        self.lambdas[slot] = 0
        self.importance[slot] = self.importance[living].min()
        self.alive[slot] = True


def _off(rows: Float[Tensor, "k d"]) -> Tensor:
    """‖VVᵀ − I‖², of which what is within rounding counts as 0: Adam would make steps of the full rate of its gradient,
    in directions that nothing but the order of additions chose. In the rows' own precision under autocast too."""
    with torch.autocast(rows.device.type, enabled=False):
        off = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        return torch.where(off.abs() > rows.shape[1] * torch.finfo(rows.dtype).eps, off, 0.0).square().sum()


def _away(vector: Float[Tensor, " d"], rows: Float[Tensor, "k d"]) -> Float[Tensor, " d"]:
    """The part of a vector at right angles to the rows, at length 1; where there is none, of the axis farthest off."""
    basis = torch.linalg.qr(rows.double().T)[0]  # (d, k)
    unit = vector.double() / vector.double().norm().clamp_min(1e-30)
    rest = unit - basis @ (basis.T @ unit)
    if float(rest.norm()) < 1e-6:
        axis = torch.zeros_like(unit)
        axis[int(basis.square().sum(1).argmin())] = 1
        rest = axis - basis @ (basis.T @ axis)
    rest = rest - basis @ (basis.T @ rest)
    return (rest / rest.norm()).to(vector)


def reallocate(layers: Sequence[ElaLoRA]) -> None:
    """Move directions between layers where a step is due: of every layer's ``most`` least important ones (one stays),
    the ``moved`` least important of all die, and as many are born in the layers of the most important of these: a layer
    whose least direction matters more than others' wants for more.

    Raises:
        RuntimeError: if no gradient was seen since the start.
    """
    if not layers or not layers[0].due:
        return
    if not any(bool(layer.importance.any()) for layer in layers):
        raise RuntimeError("ElaLoRA moves ranks by gradients: call end_step(model) before optimizer.zero_grad()")
    pool: list[tuple[float, int, int]] = []  # importance, layer, slot
    for index, layer in enumerate(layers):
        living = layer.alive.nonzero().flatten()
        values, order = layer.importance[living].sort(stable=True)
        some = min(layer.most, len(living) - 1)
        pool += [(float(v), index, int(living[o])) for v, o in zip(values[:some], order[:some], strict=True)]
    pool.sort()
    count = min(layers[0].moved, len(pool) // 2)
    room = [int((~layer.alive).sum()) for layer in layers]
    births: list[int] = []
    for _, index, _ in reversed(pool[count:]):
        if len(births) < count and births.count(index) < room[index]:
            births.append(index)
    for _, index, slot in pool[: len(births)]:
        layers[index].prune(slot)
    for index in births:
        layers[index].grow()
