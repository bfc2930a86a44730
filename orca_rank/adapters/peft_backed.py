"""Methods that PEFT implements, at the ranks of a plan: DoRA, AdaLoRA, LoHa, LoKr, VeRA. Needs ``orca_rank[peft]``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orca_rank.ranks.peft import exactly, patterns

METHODS = ("dora", "adalora", "loha", "lokr", "vera")
UNEVEN = ("dora", "loha", "lokr")
IMPORTANCES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of AdaLoRA's parameters, in PEFT's names


class PeftAdapter:
    """Give it to `inject` in place of an adapter class: the method's layers are PEFT's own.

    Args:
        method: ``dora`` | ``adalora`` | ``loha`` | ``lokr`` | ``vera``. AdaLoRA and VeRA know one rank for all layers.
        options: further fields of the method's PEFT config, e.g. total_step, target_r, tinit, tfinal for AdaLoRA; its
            total_step may be None, the steps of the run (see `Steps.run_of`), and tinit and tfinal below 1 are shares.

    Raises:
        ValueError: for an unknown method. ImportError: without PEFT.
    """

    def __init__(self, method: str, **options: Any) -> None:
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; expected one of {METHODS}")
        try:
            import peft
        except ImportError as error:
            raise ImportError(f"{method} comes from PEFT: pip install 'orca_rank[peft]'") from error
        self.peft, self.method, self.options = peft, method, options

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
        common = {"target_modules": exactly(ranks), **self.options}
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
