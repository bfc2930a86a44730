"""Adapters with a schedule: the epoch that is kept is one after it, and ranks.json has the ranks of that model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from shared import TINY_FINETUNE
from torch import nn

from orca_rank import load
from orca_rank.adapters import DeltaLoRA, ElaLoRA, LoRA, PeftAdapter, Steps, inject, moved_ranks, parameter_groups
from orca_rank.stages import finetune

X = torch.linspace(-1, 1, 10 * 12).reshape(10, 12).mul(3).sin()
# Nothing is learned, so that the first epoch that is judged is the best one.
STILL = (*TINY_FINETUNE, "layers.qkv=fused", "rank=uniform", "rank.r=2", "finetune.tag=mine", "finetune.epochs=5",
         "finetune.optimizer.lr=1e-9", "finetune.schedule=constant", "finetune.patience=1")  # fmt: skip


def history(kind: object, steps: int = 20) -> list[tuple[bool, dict[str, int]]]:
    """After every step of a run, whether the adapters are settled, and the ranks that have moved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 36), nn.GELU(), nn.Linear(36, 8))
    inject(model, {"0": 3, "2": 3}, kind)
    around = Steps(model)
    around.run_of(steps)
    optimiser = torch.optim.AdamW(parameter_groups(model, lr=0.02))
    found = []
    for _ in range(steps):
        around.begin()
        (model(X).square().mean() + around.extra_loss()).backward()
        optimiser.step()
        around.end()
        optimiser.zero_grad()
        found.append((around.settled, moved_ranks(model)))
    return found


@pytest.mark.parametrize("every", [1, 3, 4])
def test_elalora_is_settled_after_its_last_move(every: int) -> None:
    found = history(partial(ElaLoRA, every=every, moved=2, tinit=0.1, tfinal=0.3))  # moves in steps 2 … 13
    first = next(i for i, (settled, _) in enumerate(found, 1) if settled)
    assert first == {1: 13, 3: 12, 4: 12}[every]
    ranks = [ranks for _, ranks in found]
    assert all(settled == (i >= first) for i, (settled, _) in enumerate(found, 1))
    assert ranks[0] == {"0": 3, "2": 3} and all(now == ranks[first - 1] for now in ranks[first - 1 :])


def test_delta_lora_is_settled_once_w_follows() -> None:
    assert [settled for settled, _ in history(partial(DeltaLoRA, start=7))] == 6 * [False] + 14 * [True]
    assert history(LoRA, 2) == 2 * [(True, {})]


@pytest.mark.filterwarnings("ignore")
def test_adalora_is_settled_at_its_budget() -> None:
    pytest.importorskip("peft", reason="needs the extra orca_rank[peft]")
    found = history(PeftAdapter("adalora", tinit=0.1, tfinal=0.3, target_r=1, deltaT=2))
    assert [settled for settled, _ in found] == 13 * [False] + 7 * [True]
    assert sum(found[0][1].values()) == 6 and all(sum(ranks.values()) == 2 for _, ranks in found[13:])


def kept(config: DictConfig) -> tuple[dict[str, int], dict[str, int], int, dict[str, int]]:
    """The plan, the kept model's ranks as written and as loaded, and the epochs."""
    finetune.run(config)
    folder = Path(config.paths.runs) / config.run / "finetune/mine"
    written = json.loads((folder / "ranks.json").read_text())
    assert "ranks_at_the_end" not in written
    epochs = json.loads((folder / "metrics.json").read_text())["epochs"]
    return written["ranks"], written["ranks_of_the_kept_model"], epochs, moved_ranks(load(folder).model.body)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_adalora_is_kept_at_its_budget(composed: Callable[..., DictConfig]) -> None:
    """The third of five epochs is the first that ends at the budget, whatever came before; patience counts from it."""
    pytest.importorskip("peft", reason="needs the extra orca_rank[peft]")
    options = (*STILL, "adapter=adalora", "adapter.module.deltaT=1", "adapter.module.tfinal=0.45")
    for ema in ("null", "0.9"):
        plan, written, epochs, loaded = kept(composed(*options, f"finetune.ema={ema}", f"run=r{ema}"))
        assert set(plan.values()) == {2} and sum(written.values()) == len(plan) and epochs == 4
        assert loaded == written
    plan, written, epochs, loaded = kept(composed(*options, "adapter.module.total_step=1000", "run=long"))
    assert loaded == written and epochs == 5  # never at its budget: the last epoch stands for what was trained
    assert sum(written.values()) > len(plan)


def test_elalora_is_kept_as_it_ends(composed: Callable[..., DictConfig]) -> None:
    options = (*STILL, "adapter=elalora", "adapter.module.every=1", "adapter.module.tfinal=0.45")
    plan, written, epochs, loaded = kept(composed(*options))
    assert sum(plan.values()) == sum(written.values()) and loaded == written != plan and epochs == 4
