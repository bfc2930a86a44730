"""DyLoRA: nested ranks, laws, frozen bits, and cutting without training."""

from functools import partial

import pytest
import torch
from torch import nn

from orca_rank.adapters import (
    DyLoRA,
    LoRA,
    adapters,
    begin_step,
    cut,
    end_step,
    evaluate_ranks,
    inject,
    load_peft,
    merge,
    save_peft,
    set_rank,
)
from orca_rank.adapters.dylora import survival_law

X = torch.linspace(-1, 1, 6 * 12, dtype=torch.float64).reshape(6, 12).cos()


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 9)).double()


def make(plan=None, fill=True, **options):
    model = toy()
    found = inject(model, plan or {"0": 8, "2": 4}, partial(DyLoRA, **options))
    if fill:
        torch.manual_seed(1)
        for adapter in found.values():
            nn.init.normal_(adapter.lora_B)
    return model, found


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scaling", ["lora", "rslora", "constant"])
def test_rank_b_uses_the_first_b_scaled_by_b(scaling):
    model, found = make({"2": 4}, scaling=scaling)
    layer = found["2"]
    for b in range(1, 5):
        set_rank(model, b)
        scale = {"lora": 16 / b, "rslora": 16 / b**0.5, "constant": 16}[scaling]
        assert layer.scale == scale
        assert torch.allclose(layer.delta_weight(), scale * layer.lora_B[:, :b] @ layer.lora_A[:b])


@pytest.mark.parametrize("scaling", ["lora", "constant"])
@pytest.mark.parametrize("b", [1, 3, 4])
def test_cutting_is_having_trained_the_first_b(b, scaling):
    """One SGD step at rank b on the nested adapter equals the step of a LoRA that has only those rows."""
    model, found = make({"2": 4}, scaling=scaling, alpha=3)
    other = toy()
    lora = inject(other, {"2": b}, partial(LoRA, scaling=scaling, alpha=3))["2"]
    with torch.no_grad():
        lora.lora_A.copy_(found["2"].lora_A[:b])
        lora.lora_B.copy_(found["2"].lora_B[:, :b])
    found["2"].start(b)
    for each in (model, other):
        each(X).square().sum().backward()
        torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=1e-3).step()
    end_step(model)
    cut(model, {"2": b})
    assert type(adapters(model)["2"]) is LoRA
    assert torch.allclose(adapters(model)["2"].lora_A, lora.lora_A)
    assert torch.allclose(model(X), other(X), atol=1e-12)


@pytest.mark.parametrize("update", ["all", "frozen"])
def test_other_rows_keep_their_bits_under_momentum_and_decay(update):
    model, found = make({"2": 4}, update=update)
    layer = found["2"]
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    for b in (4, 2, 3, 1):
        before = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
        begin_step(model)
        layer.start(b)
        model(X).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        end_step(model)
        moved = [b - 1] if update == "frozen" else list(range(b))
        for row in range(4):
            assert torch.equal(layer.lora_A[row], before[0][row]) == (row not in moved)
            assert torch.equal(layer.lora_B[:, row], before[1][:, row]) == (row not in moved)


def test_frozen_gradients_are_those_of_row_b():
    model, found = make({"2": 4}, update="frozen")
    found["2"].start(3)
    model(X).square().sum().backward()
    assert found["2"].lora_A.grad.abs().sum(1).gt(0).tolist() == [False, False, True, False]
    assert found["2"].lora_B.grad.abs().sum(0).gt(0).tolist() == [False, False, True, False]


def test_shared_rank_is_cut_at_each_layer():
    model, found = make(share="step")
    seen = set()
    for seed in range(60):
        begin_step(model, generator(seed))
        assert found["2"].active == min(4, found["0"].active)
        seen.add(found["0"].active)
        end_step(model)
    assert seen == set(range(1, 9))
    assert found["0"].active == 8


def test_own_rank_per_layer():
    model, found = make(share="layer")
    pairs = set()
    for seed in range(200):
        begin_step(model, generator(seed))
        pairs.add((found["0"].active, found["2"].active))
    assert len(pairs) == 32


def test_coupled_quantiles_follow_each_law():
    law = {"0": [0.5, 0.5, 0, 0, 0, 0, 0, 0], "2": [0.0, 0.5, 0.0, 0.5]}
    model, found = make(share="quantile", law=law)
    pairs = set()
    for seed in range(60):
        begin_step(model, generator(seed))
        pairs.add((found["0"].active, found["2"].active))
    assert pairs == {(1, 2), (2, 4)}


def test_the_same_generator_gives_the_same_ranks():
    model, found = make(share="layer")
    draws = []
    for _ in range(2):
        begin_step(model, generator(3))
        draws.append([a.active for a in found.values()])
    assert draws[0] == draws[1]


def test_stick_breaking_law():
    """Untruncated mean is 1 + α, and truncation only renormalises."""
    alpha = 3.0
    law = survival_law(alpha, 1, 400)
    assert float((law * torch.arange(1, 401)).sum()) == pytest.approx(1 + alpha)
    short = survival_law(alpha, 2, 5)
    assert torch.allclose(short, law[1:5] / law[1:5].sum())
    _, found = make(law="stick-breaking", concentration={"0": 2.0, "2": 1.0}, r_min=2)
    assert torch.allclose(found["2"].law, survival_law(1.0, 2, 4))
    draws = [found["0"].draw(u) for u in torch.rand(4000, generator=generator()).tolist()]
    share = torch.tensor([draws.count(b) / 4000 for b in range(2, 9)], dtype=torch.float64)
    assert float((share - found["0"].law).abs().max()) < 0.04


def test_every_rank_in_one_call():
    model, _ = make()
    outputs = evaluate_ranks(model, lambda: model(X).detach())
    assert list(outputs) == list(range(1, 9))
    set_rank(model, 3)
    assert torch.equal(outputs[3], model(X))
    set_rank(model, None)
    assert torch.equal(outputs[8], model(X))
    assert list(evaluate_ranks(model, lambda: 0, ranks=[2, 4])) == [2, 4]


def test_cut_to_a_plan_then_save_as_plain_lora(tmp_path):
    model, _ = make()
    set_rank(model, {"0": 3, "2": 2})
    expected = model(X)
    cut(model, {"0": 3, "2": 2})
    assert torch.equal(model(X), expected)
    save_peft(model, tmp_path)
    other = toy()
    assert {name: a.rank for name, a in load_peft(other, tmp_path).items()} == {"0": 3, "2": 2}
    assert torch.allclose(other(X), expected, atol=1e-5)


def test_cut_to_zero_removes_the_adapter():
    model, _ = make()
    cut(model, {"0": 0, "2": 4})
    assert type(model[0]) is nn.Linear and list(adapters(model)) == ["2"]


def test_merged_layers_refuse_another_rank():
    model, _ = make()
    merge(model)
    with pytest.raises(ValueError, match="merged"):
        set_rank(model, 2)


def test_what_does_not_fit_is_refused():
    model, _ = make()
    for call, error in (
        (lambda: set_rank(model, {"0": 9}), ValueError),
        (lambda: set_rank(model, {"1": 1}), KeyError),
        (lambda: cut(model, {"0": 3}), KeyError),
        (lambda: make(law=[0.5, 0.5]), ValueError),
        (lambda: make({"2": 2}, law=[-1, 2]), ValueError),
        (lambda: make(law="stick-breaking"), ValueError),
        (lambda: make(law="stick-breaking", concentration={"0": 1.0}), KeyError),
        (lambda: survival_law(0.0, 1, 2), ValueError),
        (lambda: make(r_min=5), ValueError),
        (lambda: make(share="x"), ValueError),
        (lambda: make(init="pissa"), ValueError),
        (lambda: evaluate_ranks(toy(), lambda: 0), ValueError),
    ):
        with pytest.raises(error):
            call()
