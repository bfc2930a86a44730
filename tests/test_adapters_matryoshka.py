"""MatryoshkaLoRA: the mean step of DyLoRA, and its prefixes outside of steps."""

from functools import partial

import pytest
import torch
from shared import apart
from torch import nn

from orca_rank.adapters import (
    DyLoRA,
    LoRA,
    MatryoshkaLoRA,
    adapters,
    begin_step,
    cut,
    end_step,
    inject,
    merge,
    set_rank,
)

X = torch.linspace(-1, 1, 5 * 12, dtype=torch.float64).reshape(5, 12).cos()


def made(kind: type[DyLoRA] = MatryoshkaLoRA, rank: int = 4, memory: str = "auto", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9)).double()
    adapter = inject(model, {"0": rank}, partial(kind, **options), memory=memory)["0"]
    nn.init.normal_(adapter.lora_B)
    return model, adapter


@pytest.mark.parametrize("scaling", ["lora", "rslora", "constant"])
@pytest.mark.parametrize("memory", ["plain", "fast", "lean"])
@pytest.mark.parametrize("law", ["uniform", [0.1, 0.5, 0.4]])
def test_a_step_is_the_mean_of_dylora_s(scaling: str, memory: str, law: str | list[float]) -> None:
    """On a loss that is linear in ΔW, value and gradients are E_b of those at rank b."""
    options = {"scaling": scaling, "alpha": 3.0, "r_min": 2, "law": law}
    model, adapter = made(memory=memory, **options)
    nested, other = made(DyLoRA, **options)
    begin_step(model)
    out = model(X)
    out.sin().sum().backward()  # the outer derivative is taken from the mean output below
    weight = out.detach().cos()
    expected = torch.zeros_like(out)
    for b, p in zip((2, 3, 4), other.law, strict=True):
        other.set_rank(b)
        one = nested(X)
        expected += float(p) * one.detach()
        (float(p) * (weight * one).sum()).backward()
    assert apart(out, expected) < 1e-12
    for name in ("lora_A", "lora_B"):
        assert apart(getattr(adapter, name).grad, getattr(other, name).grad) < 1e-12


def test_the_diagonal_is_the_paper_s_on_its_training_ranks() -> None:
    _, adapter = made(scaling="lora", alpha=2.0, law=[1 / 3, 1 / 3, 0, 1 / 3])
    s = {b: 2.0 / b for b in (1, 2, 4)}
    paper = torch.tensor([s[1] + s[2] + s[4], s[2] + s[4], s[4], s[4]], dtype=torch.float64)
    assert torch.allclose(3 * adapter.diagonal, paper)


def test_outside_of_steps_it_is_a_prefix_that_can_be_cut_out() -> None:
    model, adapter = made(scaling="constant", alpha=2.0)
    begin_step(model)
    within = model(X)
    end_step(model)
    outputs = {}
    for b in (1, 3, 4):
        set_rank(model, b)
        outputs[b] = model(X)
        whole = X @ (model[0].weight + 2.0 * adapter.lora_B[:, :b] @ adapter.lora_A[:b]).T + model[0].bias
        assert apart(outputs[b], whole) < 1e-12
    assert apart(within, outputs[4]) > 0.01
    set_rank(model, None)
    merge(model)
    assert apart(model(X), outputs[4]) < 1e-12
    other, _ = made(scaling="constant", alpha=2.0)
    cut(other, {"0": 3})
    assert type(adapters(other)["0"]) is LoRA and apart(other(X), outputs[3]) < 1e-12


def test_every_row_learns_in_every_step() -> None:
    model, adapter = made()
    before = adapter.lora_A.detach().clone()
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    begin_step(model)
    model(X).square().sum().backward()
    optimiser.step()
    end_step(model)
    assert bool((adapter.lora_A != before).all())


@pytest.mark.parametrize("option", [{"share": "step"}, {"update": "frozen"}])
def test_what_only_draws_have_is_refused(option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="draws no ranks"):
        made(**option)
