"""The moving average of weights beside adapters that jump: it is one model, of the live one's structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from shared import apart
from torch import Tensor, nn

from orca_rank.adapters import (
    DeltaLoRA,
    ElaLoRA,
    LoRA,
    PeftAdapter,
    ReRandomised,
    Steps,
    adapter_state_dict,
    adapters,
    inject,
    parameter_groups,
)
from orca_rank.training.average import Average, decay_at

X = torch.linspace(-1, 1, 10 * 12, dtype=torch.float64).reshape(10, 12).mul(3).sin()
BETA = 0.9


class Fitting(L.Trainer):
    global_step = 0
    state = type("State", (), {"fn": TrainerFn.FITTING})

    def __init__(self) -> None: ...


def steps_of(kind: Any, steps: int, ranks: int = 4) -> Iterator[tuple[nn.Module, Average, Callable[[], None]]]:
    """After every step of a run: the model, its average, and a function that makes the model the average."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8)).double()
    inject(model, {"0": ranks, "2": ranks}, kind, generator=torch.Generator().manual_seed(0))
    model.double()
    around, trainer = Steps(model), Fitting()
    learned = {name for name, p in model.named_parameters() if p.requires_grad} | around.learned_buffers()
    average = Average(BETA, lambda: adapter_state_dict(model), learned, around.renewed)
    around.run_of(steps)
    average.on_train_start(trainer, L.LightningModule())
    optimiser = torch.optim.AdamW(parameter_groups(model, lr=0.02))
    draws = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        around.begin(draws)
        (model(X).square().mean() + around.extra_loss()).backward()
        optimiser.step()
        around.end()
        optimiser.zero_grad()
        trainer.global_step = step
        average.on_train_batch_end(trainer, L.LightningModule(), None, None, 0)
        yield model, average, lambda: average.on_validation_start(trainer, L.LightningModule())
        average.on_validation_end(trainer, L.LightningModule())


def change(adapter: LoRA) -> Tensor:
    return adapter.delta_weight().detach().clone()


def test_delta_lora_follows_from_where_the_model_does() -> None:
    """At step K the average is the model; later its A_K and B_K are the model's, and its ΔW lies where that moves."""
    start, kept = 6, []
    for step, (model, average, become) in enumerate(steps_of(partial(DeltaLoRA, start=start), 30), 1):
        found = adapters(model)
        live = {name: change(adapter) for name, adapter in found.items()}
        points = {name: adapter.start_A.clone() for name, adapter in found.items()}
        become()
        for name, adapter in found.items():
            assert torch.equal(adapter.start_A, points[name]) and adapter.follows == (step >= start)
            if step == start:
                assert torch.equal(change(adapter), live[name])
            if step > start:  # between what the model was at step K and what it is now
                assert change(adapter).norm() < 1.1 * max(float(live[name].norm()), max(kept))
        kept.append(max(float(change.norm()) for change in live.values()))
        assert average.values["0.branches.all.steps"] == step


def test_elalora_keeps_no_direction_of_another() -> None:
    """Where a direction dies or is born the average is the model's, so that a new one has nothing of its forerunner."""
    kind = partial(ElaLoRA, every=2, moved=2, tinit=0.2, tfinal=0.3)
    before, moves = None, 0
    for model, _, become in steps_of(kind, 20, 3):
        found = adapters(model)
        alive = {name: one.alive.clone() for name, one in found.items()}
        live = {name: (one.lora_A.detach().clone(), one.lora_B.detach().clone()) for name, one in found.items()}
        become()
        for name, adapter in found.items():
            assert torch.equal(adapter.alive, alive[name])
            changed = torch.zeros_like(alive[name]) if before is None else alive[name] != before[name]
            moves += int(changed.sum())
            assert torch.equal(adapter.lora_A[changed], live[name][0][changed])
            assert torch.equal(adapter.lora_B[:, changed], live[name][1][:, changed])
            assert not adapter.lambdas[changed].any()
            a, _, _ = adapter.plain()
            assert len(a) == int(alive[name].sum()) and apart(a @ a.T, torch.eye(len(a)).double()) < 0.5
        before = alive
    assert moves >= 4


@pytest.mark.filterwarnings("ignore")
def test_adalora_s_mask_holds_in_the_average_too() -> None:
    pytest.importorskip("peft", reason="needs the extra orca_rank[peft]")
    kind = PeftAdapter("adalora", tinit=0.1, tfinal=0.3, target_r=2, deltaT=2)
    counts = []
    for model, _, become in steps_of(kind, 30):
        names = [name for name in adapter_state_dict(model) if "lora_E" in name]
        live = {name: adapter_state_dict(model)[name].clone() for name in names}
        become()
        for name in names:
            now = adapter_state_dict(model)[name]
            assert torch.equal(now == 0, live[name] == 0)
        counts.append(sum(int((adapter_state_dict(model)[name] != 0).sum()) for name in names))
    assert counts[0] == 8 and set(counts[-9:]) == {4}


def test_what_is_folded_away_step_by_step_is_averaged() -> None:
    """Re-randomised projections keep what they learned in a buffer, and A = B = 0 between steps."""
    expected, moved = {"0": 0.0, "2": 0.0}, False
    for step, (model, _, become) in enumerate(steps_of(ReRandomised, 12), 1):
        beta, found = decay_at(step, BETA), adapters(model)
        expected = {name: beta * expected[name] + (1 - beta) * change(one) for name, one in found.items()}
        live = {name: change(one) for name, one in found.items()}
        become()
        assert all(apart(change(one), expected[name]) < 1e-10 for name, one in found.items())
        moved = moved or any(apart(live[name], expected[name]) > 0.01 for name in found)
    assert moved
