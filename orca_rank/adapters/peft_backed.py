"""Methods that PEFT implements, at the ranks of a plan: DoRA, AdaLoRA, LoHa, LoKr, VeRA. Needs ``orca_rank[peft]``."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orca_rank.adapters.lora import scale_of
from orca_rank.ranks.peft import exactly, patterns

METHODS = ("dora", "adalora", "loha", "lokr", "vera")
UNEVEN = ("dora", "loha", "lokr")
SCALED = {"dora": "lora_alpha", "adalora": "lora_alpha", "loha": "alpha", "lokr": "alpha"}  # PEFT's names of α
ALPHA = 8.0  # PEFT's own, of all four
NUDGE = 1e-5  # AdaLoRA's layers divide by r + 1e-5
IMPORTANCES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of AdaLoRA's parameters, in PEFT's names


class PeftAdapter:
    """Give it to `inject` in place of an adapter class: the method's layers are PEFT's own.

    Args:
        method: ``dora`` | ``adalora`` | ``loha`` | ``lokr`` | ``vera``. AdaLoRA and VeRA know one rank for all layers.
        alpha, scaling: α of the scale s of ΔW and how s depends on the rank, see `lora.scale_of`; by default PEFT's
            α/r with α = 8, whose s is another at every rank. VeRA learns its scale and has neither.
        options: further fields of the method's PEFT config, e.g. total_step, target_r, tinit, tfinal for AdaLoRA; its
            total_step may be None, the steps of the run (see `Steps.run_of`), and tinit and tfinal below 1 are shares.

    Raises:
        ValueError: for an unknown method, an α or a scaling that means nothing, that the method has not, or that a
            field of PEFT's says too. ImportError: without PEFT.
    """

    def __init__(self, method: str, alpha: float | None = None, scaling: str | None = None, **options: Any) -> None:
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; expected one of {METHODS}")
        self.alpha, self.scaling = ALPHA if alpha is None else alpha, "lora" if scaling is None else scaling
        _check_scale(method, alpha, scaling, options)
        scale_of(self.alpha, 1, self.scaling)
        try:
            import peft
        except ImportError as error:
            raise ImportError(f"{method} comes from PEFT: pip install 'orca_rank[peft]'") from error
        self.peft, self.method, self.options = peft, method, options
        self.scaled = method in SCALED and not (alpha is None and scaling is None)  # else PEFT's fields say it

    def into(self, model: nn.Module, ranks: Mapping[str, int]) -> dict[str, nn.Module]:
        """Adapt the layers in place and return them by name; ranks are above 0 and name whole Linears."""
        values = set(ranks.values())
        if self.method not in UNEVEN and len(values) > 1:
            raise ValueError(f"{self.method} has one rank for all layers; the plan has {sorted(values)}")
        config, tuner = self._config(ranks)
        # The tuner replaces layers inside the model; the model must not own it in turn as a submodule.
        follows = self.options.get("total_step") is None
        vars(model)["peft_tuner"] = PeftTuner(tuner(model, config, "default"), self.method, self.options, follows)
        return {name: model.get_submodule(name) for name in ranks}

    def _config(self, ranks: Mapping[str, int]) -> tuple[Any, Any]:
        from peft.tuners import adalora, loha, lokr, lora, vera

        first = next(iter(ranks.values()))
        common = {"target_modules": exactly(ranks), **self.options, **self._alphas(ranks)}
        pattern = patterns(ranks)
        peft = self.peft
        if self.method == "dora":
            return peft.LoraConfig(r=first, rank_pattern=pattern, use_dora=True, **common), lora.LoraModel
        if self.method == "loha":
            return peft.LoHaConfig(r=first, rank_pattern=pattern, **common), loha.LoHaModel
        if self.method == "lokr":
            return peft.LoKrConfig(r=first, rank_pattern=pattern, **common), lokr.LoKrModel
        if self.method == "vera":
            return peft.VeraConfig(r=first, **common), vera.VeraModel
        common |= schedule(self.options, self.options.get("total_step") or 1000)
        common["target_r"] = self._target(first)
        return peft.AdaLoraConfig(init_r=first, **common), adalora.AdaLoraModel

    def _alphas(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """PEFT's fields with which every layer has its s: PEFT divides each α by the layer's rank."""
        if not self.scaled:
            return {}
        nudge = NUDGE if self.method == "adalora" else 0.0
        own = {name: scale_of(self.alpha, rank, self.scaling) * (rank + nudge) for name, rank in ranks.items()}
        fields: dict[str, Any] = {SCALED[self.method]: next(iter(own.values()))}
        return fields if self.method == "adalora" else {**fields, "alpha_pattern": patterns(own)}

    def _target(self, rank: int) -> int:
        """AdaLoRA's mean rank at the end: target_r, or two thirds of the plan's (its paper starts at 1.5 times)."""
        target = self.options.get("target_r")
        if target is None:
            target = max(1, round(2 * rank / 3))
        if not 1 <= target < rank:
            raise ValueError(
                f"AdaLoRA shrinks ranks to adapter.module.target_r={target}, which must be at least 1 and below the "
                f"plan's rank {rank}: lower target_r or raise rank.r"
            )
        return target


def _check_scale(method: str, alpha: float | None, scaling: str | None, options: Mapping[str, Any]) -> None:
    if alpha is None and scaling is None:
        return
    if method not in SCALED:
        raise ValueError(f"{method} learns its scale: leave alpha={alpha} and scaling={scaling} out")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"{method}: alpha is {alpha}; expected a finite number above 0")
    if said := sorted(options.keys() & {"lora_alpha", "alpha_pattern", "use_rslora"}):
        raise ValueError(
            f"{method}: {said[0]}={options[said[0]]} beside alpha={alpha} and scaling={scaling}, which say it already: "
            f"leave {said[0]} out"
        )


def schedule(options: Mapping[str, Any], steps: int) -> dict[str, int]:
    """AdaLoRA's total_step, tinit and tfinal for a run of so many steps."""
    lengths = {name: options.get(name) or 0 for name in ("tinit", "tfinal")}
    return {"total_step": steps} | {n: round(t * steps) if 0 < t < 1 else int(t) for n, t in lengths.items()}


class PeftTuner:
    """What the training loop needs of a PEFT tuner: AdaLoRA's orthogonality term and its budget schedule.

    Args:
        tuner: PEFT's, which has no types. method, options: those of the `PeftAdapter`. follows: the schedule takes its
            length from the run.
    """

    def __init__(self, tuner: Any, method: str, options: Mapping[str, Any], follows: bool) -> None:
        self.tuner, self.method, self.options, self.follows, self.steps = tuner, method, options, follows, 0
        self.kept: dict[str, Tensor] = {}

    def run_of(self, steps: int) -> None:
        """Fit AdaLoRA's schedule to a run of so many optimiser steps, unless total_step says another number.

        Raises:
            ValueError: if no step is left in which the budget could shrink.
        """
        if self.method != "adalora" or not self.follows:
            return
        lengths = schedule(self.options, steps)
        if not max(1, lengths["tinit"]) < steps - lengths["tfinal"]:
            raise ValueError(
                f"AdaLoRA cannot move ranks in a run of {steps} optimiser steps with {lengths}: train longer"
            )
        for name, value in lengths.items():
            setattr(self.tuner.peft_config["default"], name, value)

    @property
    def settled(self) -> bool:
        """Whether AdaLoRA's ranks have come down to their budget."""
        config = self.tuner.peft_config["default"]
        return self.method != "adalora" or self.steps >= config.total_step - config.tfinal

    def scales(self) -> dict[str, float]:
        """Layer -> the number that multiplies its update; empty for VeRA, which learns one a row."""
        if self.method not in SCALED:
            return {}
        found = {name: float(layer.scaling["default"]) for name, layer in self.layers().items()}
        if self.method != "adalora":
            return found
        return {name: scale / (float(self.layers()[name].ranknum["default"]) + NUDGE) for name, scale in found.items()}

    def ranks(self) -> dict[str, int]:
        """Layer -> the singular values that AdaLoRA's mask leaves; empty for methods that keep the plan's ranks."""
        layers = self.layers().items() if self.method == "adalora" else ()
        return {name: int((layer.lora_E["default"] != 0).sum()) for name, layer in layers}

    def state_dict(self) -> dict[str, Any]:
        """What AdaLoRA's next allocations depend on beside its parameters: the step, importances, the ranks chosen."""
        if self.method != "adalora":
            return {}
        allocator, config = self.tuner.rankallocator, self.tuner.peft_config["default"]
        state = {name: dict(getattr(allocator, name)) for name in IMPORTANCES}
        return {"steps": self.steps, "rank_pattern": config.rank_pattern, **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        if not state:
            return
        self.steps, self.tuner.peft_config["default"].rank_pattern = state["steps"], state["rank_pattern"]
        like = dict(self.tuner.model.named_parameters())
        for name in IMPORTANCES:
            values = {n: value.to(like[n].device) for n, value in state[name].items()}
            setattr(self.tuner.rankallocator, name, values)

    def renewed(self) -> dict[str, Tensor]:
        """Parameter -> which entries AdaLoRA's mask holds at 0."""
        if self.method != "adalora":
            return {}
        values = {f"{name}.lora_E.default": layer.lora_E["default"].detach() for name, layer in self.layers().items()}
        return {name: value == 0 for name, value in values.items()}

    def layers(self) -> dict[str, Any]:
        """PEFT's layers by name."""
        return {name: m for name, m in self.tuner.model.named_modules() if hasattr(m, "get_base_layer")}

    def extra_loss(self) -> Tensor | None:
        """Weight × mean ‖PPᵀ − I‖_F over AdaLoRA's factors; PEFT itself adds it only to models that return a loss."""
        if self.method != "adalora":
            return None
        terms = []
        for layer in self.layers().values():
            for p in (layer.lora_A["default"], layer.lora_B["default"].T):
                terms.append(torch.linalg.norm(p @ p.T - torch.eye(len(p), dtype=p.dtype, device=p.device)))
        return self.tuner.peft_config["default"].orth_reg_weight * torch.stack(terms).mean()

    def end_step(self) -> None:
        """AdaLoRA's reallocation, from the gradients of the step that was just taken.

        Raises:
            RuntimeError: if the gradients are gone already.
        """
        if self.method != "adalora":
            return
        if all(p.grad is None for p in self.tuner.model.parameters()):
            raise RuntimeError("AdaLoRA allocates by gradients: call end_step(model) before optimizer.zero_grad()")
        self.steps += 1
        self.tuner.update_and_allocate(self.steps)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold every layer into its base weight once; the old bits are kept for `unmerge`."""
        for name, layer in self.layers().items():
            if name not in self.kept:
                self.kept[name] = layer.get_base_layer().weight.detach().clone()
                layer.merge()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give every base weight its old bits back."""
        for name, layer in self.layers().items():
            if name in self.kept:
                layer.unmerge()
                layer.get_base_layer().weight.copy_(self.kept.pop(name))


def tuner_of(model: nn.Module) -> PeftTuner | None:
    """The PEFT tuner that `inject` left with the model, if any."""
    return vars(model).get("peft_tuner")
