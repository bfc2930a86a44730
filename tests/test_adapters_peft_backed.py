"""Methods through PEFT at the plan's ranks: identity at the start, strictness, AdaLoRA's schedule and penalty."""

import pytest
import torch
from shared import apart, move_trained
from torch import nn

from orca_rank.adapters import (
    NotExpressible,
    PeftAdapter,
    Steps,
    adapter_state_dict,
    begin_step,
    end_step,
    extra_loss,
    inject,
    merge,
    parameter_groups,
    save_peft,
    scales,
    trainable_adapter_parameters,
    unmerge,
)
from orca_rank.adapters.lora import scale_of

pytest.importorskip("peft", reason="needs the extra orca_rank[peft]")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
X = torch.linspace(-1, 1, 10 * 12).reshape(10, 12).mul(3).sin()
SCHEDULE = {"total_step": 20, "tinit": 2, "tfinal": 4, "target_r": 1, "deltaT": 1}


def make(method, plan=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8))
    before = model(X)
    options = {**SCHEDULE, **options} if method == "adalora" else options
    return model, inject(model, plan or {"0": 4, "2": 4}, PeftAdapter(method, **options)), before


def train(model, steps):
    optimiser = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    for _ in range(steps):
        optimiser.zero_grad()
        begin_step(model)
        (model(X).square().mean() + extra_loss(model)).backward()
        optimiser.step()
        end_step(model)


@pytest.mark.parametrize("method", ["dora", "adalora", "loha", "lokr", "vera"])
def test_starts_as_the_identity_trains_merges_and_unmerges(method, tmp_path):
    model, found, before = make(method)
    assert list(found) == ["0", "2"]
    assert torch.allclose(model(X), before, atol=1e-5)
    base = found["2"].get_base_layer().weight.clone()
    train(model, 5)
    model.eval()
    expected = model(X)
    assert not torch.allclose(expected, before, atol=1e-4)
    assert torch.equal(found["2"].get_base_layer().weight, base)
    assert set(adapter_state_dict(model)) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trainable_adapter_parameters(model)) == len(adapter_state_dict(model))
    merge(model)
    merge(model)
    assert torch.allclose(model(X), expected, atol=1e-5)
    unmerge(model)
    assert torch.equal(found["2"].get_base_layer().weight, base)
    with pytest.raises(NotExpressible, match=method):
        save_peft(model, tmp_path)


def test_ranks_follow_the_plan():
    _, found, _ = make("dora", {"0": 2, "2": 5})
    assert [layer.r["default"] for layer in found.values()] == [2, 5]


def test_adalora_really_moves_its_budget():
    model, found, _ = make("adalora")
    assert bool(extra_loss(model) > 0)
    train(model, 19)
    alive = sum(int((layer.lora_E["default"] != 0).sum()) for layer in found.values())
    assert alive == 2  # target_r 1 on each of two layers, from 8


def test_adalora_needs_the_gradients():
    model, _, _ = make("adalora")
    with pytest.raises(RuntimeError, match="zero_grad"):
        end_step(model)


def test_refusals():
    with pytest.raises(ValueError, match="one rank"):
        make("vera", {"0": 2, "2": 3})
    with pytest.raises(ValueError, match="expected one of"):
        PeftAdapter("other")
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="whole matrices"):
        inject(nn.Sequential(nn.Linear(12, 36)), {"0.q": 2}, PeftAdapter("dora"))
    model, _, _ = make("dora")
    with pytest.raises(ValueError, match="already"):
        inject(model, {"0": 2})
    assert inject(nn.Sequential(nn.Linear(4, 4)), {"0": 0}, PeftAdapter("dora")) == {}


@pytest.mark.parametrize("scaling", ["constant", "lora", "rslora"])
@pytest.mark.parametrize("method", ["dora", "loha", "lokr", "adalora"])
def test_a_layer_s_scale_is_what_scaling_says(method, scaling):
    """Read back from PEFT's layers, and the ratio of two updates of the same factors."""
    ranks = {"0": 4, "2": 4} if method == "adalora" else {"0": 1, "2": 4}
    model, found, _ = make(method, ranks, alpha=3, scaling=scaling)
    expected = {name: scale_of(3, rank, scaling) for name, rank in ranks.items()}
    assert scales(model) == pytest.approx(expected, rel=1e-12)
    other, plain, _ = make(method, ranks, alpha=1, scaling="constant")
    move_trained(model)
    other.load_state_dict(model.state_dict())
    for name, layer in found.items():
        update = layer.get_delta_weight("default").detach()
        assert apart(update, expected[name] * plain[name].get_delta_weight("default")) < 1e-5
        assert float(update.norm()) > 0


@pytest.mark.parametrize("method", ["dora", "loha", "lokr", "adalora"])
def test_without_alpha_and_scaling_peft_s_own_scale_stays(method):
    """As in fine-tunes from before these options, which are loaded so."""
    ranks = {"0": 2, "2": 2} if method == "adalora" else {"0": 1, "2": 4}
    model, _, _ = make(method, ranks)
    assert scales(model) == pytest.approx({name: 8 / rank for name, rank in ranks.items()}, rel=1e-4)
    field = "alpha" if method in ("loha", "lokr") else "lora_alpha"
    assert scales(make(method, ranks, **{field: 4})[0]) == pytest.approx({n: 4 / r for n, r in ranks.items()}, rel=1e-4)
    assert scales(make("vera")[0]) == {}


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("vera", {"alpha": 4}, "vera learns its scale: leave alpha=4"),
        ("dora", {"alpha": 0}, "alpha is 0; expected a finite number above 0"),
        ("loha", {"scaling": "none"}, "scaling is 'none'; expected one of"),
        ("adalora", {"scaling": "lora", "lora_alpha": 16}, "lora_alpha=16 beside alpha=None and scaling=lora"),
    ],
)
def test_a_scale_is_said_once_and_means_something(method, options, match):
    with pytest.raises(ValueError, match=match):
        PeftAdapter(method, **options)


@pytest.mark.parametrize("steps", [3, 12, 300])
def test_adalora_s_schedule_follows_the_run(steps):
    model, found, _ = make("adalora", total_step=None, tinit=0.1, tfinal=0.3)
    Steps(model).run_of(steps)
    train(model, steps)
    assert sum(int((layer.lora_E["default"] != 0).sum()) for layer in found.values()) <= 2
    with pytest.raises(ValueError, match="train longer"):
        Steps(model).run_of(2)


def test_adalora_goes_on_as_if_nothing_had_happened():
    """Its parameters, the optimiser and the state of the steps are all that a checkpoint needs."""
    whole, _, _ = make("adalora")
    train(whole, 12)
    halves = [make("adalora")[0] for _ in range(2)]
    states = [{}, {}, {}]
    for model, first, last in ((halves[0], 0, 5), (halves[1], 5, 12)):
        optimiser = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
        steps = Steps(model)
        if first:
            model.load_state_dict(states[0])
            optimiser.load_state_dict(states[1])
            steps.load_state_dict(states[2])
        for _ in range(first, last):
            optimiser.zero_grad()
            steps.begin()
            (model(X).square().mean() + steps.extra_loss()).backward()
            optimiser.step()
            steps.end()
        states = [model.state_dict(), optimiser.state_dict(), steps.state_dict()]
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in halves[1].state_dict().items())


@pytest.mark.parametrize(("rank", "target", "end"), [(6, None, 4), (2, None, 1), (3, 2, 2)])
def test_adalora_s_target_is_below_the_plan(rank, target, end):
    adapter = PeftAdapter("adalora", total_step=40, tinit=4, tfinal=12, target_r=target)
    assert adapter._config({"0": rank})[0].target_r == end


@pytest.mark.parametrize(("rank", "target"), [(2, 4), (2, 2), (1, None)])
def test_adalora_cannot_grow(rank, target):
    with pytest.raises(ValueError, match=r"target_r=.*below the plan's rank"):
        PeftAdapter("adalora", total_step=40, tinit=4, tfinal=12, target_r=target)._config({"0": rank})
