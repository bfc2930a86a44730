"""LoRA, injection and merging: strictness, identities, exact bits."""

import copy
import math
from functools import partial
from types import MappingProxyType

import pytest
import torch
from torch import nn

from orca_rank.adapters import (
    LoRA,
    adapter_state_dict,
    adapters,
    begin_step,
    describe,
    inject,
    load_adapter_state_dict,
    merge,
    parameter_groups,
    trainable_adapter_parameters,
    unload,
    unmerge,
)
from orca_rank.ranks import RankPlan


class Attention(nn.Module):
    """A fused qkv matrix and a projection, as in a timm block."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(torch.softmax(q @ k.mT, dim=-1) @ v)


def toy(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(Attention(), nn.LayerNorm(8), nn.Linear(8, 5)).double()


def scramble(model: nn.Module, seed: int = 1) -> None:
    """Give every adapter a ΔW that is not zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.normal_()


PLAN = {"0.qkv.q": 2, "0.qkv.v": 3, "0.proj": 4, "2": 1}
X = torch.linspace(-1, 1, 2 * 6 * 8, dtype=torch.float64).reshape(2, 6, 8)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", "symmetric"])
@pytest.mark.parametrize("plan", [PLAN, {"0.qkv": 8, "2": 5}])
def test_starts_as_the_identity(init, plan):
    model = toy()
    before = model(X)
    inject(model, plan, partial(LoRA, init=init))
    assert torch.allclose(model(X), before, atol=1e-12)


def test_only_the_adapters_train_and_the_base_keeps_its_bits():
    model = toy()
    base = copy.deepcopy(model.state_dict())
    found = inject(model, PLAN)
    assert list(found) == ["0.qkv.q", "0.qkv.v", "0.proj", "2"]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in trainable_adapter_parameters(model)}
    assert sum(p.numel() for p in trainable_adapter_parameters(model)) == 2 * 16 + 3 * 16 + 4 * 16 + 13
    optimiser = torch.optim.AdamW(parameter_groups(model, lr=0.1), weight_decay=0.1)
    for _ in range(3):
        begin_step(model)
        model(X).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.items())
    assert not torch.equal(found["2"].lora_B, torch.zeros_like(found["2"].lora_B))


def test_a_checkpoint_of_the_bare_model_still_loads():
    model = toy()
    state = {name: value + 1 for name, value in model.state_dict().items()}
    inject(model, PLAN)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(".branches." in name for name in missing)


@pytest.mark.parametrize("scaling, expected", [("lora", 16 / 4), ("rslora", 16 / math.sqrt(4)), ("constant", 16)])
def test_delta_is_scale_times_b_a(scaling, expected):
    model = toy()
    weight = model[0].proj.weight.clone()
    adapter = inject(model, {"0.proj": 4}, partial(LoRA, scaling=scaling))["0.proj"]
    scramble(model)
    assert adapter.scale == expected
    delta = expected * adapter.lora_B @ adapter.lora_A
    assert torch.allclose(model[0].proj(X), X @ (weight + delta).T + model[0].proj.bias, atol=1e-12)


@pytest.mark.parametrize("plan", [PLAN, {"0.qkv": 3, "0.proj": 2}])
@pytest.mark.parametrize("init", ["kaiming", "symmetric"])
def test_merge_is_exact_idempotent_and_reversible_to_the_bit(plan, init):
    model = toy()
    base = copy.deepcopy(model.state_dict())
    inject(model, plan, partial(LoRA, init=init))
    scramble(model)
    expected = model(X)
    merge(model)
    once = model[0].proj.weight.clone()
    merge(model)
    assert torch.equal(model[0].proj.weight, once)
    assert torch.allclose(model(X), expected, atol=1e-12)
    unmerge(model)
    unmerge(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.items())
    assert torch.equal(model(X), expected)


def test_unload_leaves_a_bare_model():
    model, bare = toy(), toy()
    inject(model, PLAN)
    scramble(model)
    expected = model(X)
    merge(model)
    unload(model)
    assert model.state_dict().keys() == bare.state_dict().keys()
    assert type(model[2]) is nn.Linear
    assert torch.allclose(model(X), expected, atol=1e-12)


def test_training_a_merged_model_is_refused():
    model = toy()
    inject(model, PLAN)
    merge(model)
    with pytest.raises(ValueError, match="merged"):
        begin_step(model)


def test_thirds_leave_the_others_alone():
    model = toy()
    before = model[0].qkv(X)
    inject(model, {"0.qkv.k": 2, "0.qkv.q": 0})
    scramble(model)
    after = model[0].qkv(X)
    assert torch.equal(after[..., :8], before[..., :8]) and torch.equal(after[..., 16:], before[..., 16:])
    assert not torch.allclose(after[..., 8:16], before[..., 8:16])


@pytest.mark.parametrize("plan", [{"0.proj": 0, "2": 0}, {}, RankPlan({"2": 0})])
def test_rank_zero_leaves_the_layer_alone_and_says_so(plan, caplog):
    model = toy()
    assert inject(model, plan) == {}
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "nothing is adapted" in caplog.text
    assert type(model[0].proj) is nn.Linear and adapter_state_dict(model) == {}
    assert not any(p.requires_grad for p in model.parameters())
    load_adapter_state_dict(model, {})
    merge(model)
    unmerge(model)


@pytest.mark.parametrize(
    "plan, error, message",
    [
        ({"0.nothing": 1}, KeyError, "no module"),
        ({"1": 1}, TypeError, "LayerNorm"),
        ({"0": 1}, TypeError, "Attention"),
        ({"0.proj": -1}, ValueError, "0 or more"),
        ({"0.proj": 1.0}, TypeError, "integer"),
        ({"0.proj": True}, TypeError, "integer"),
        ({"0.proj": 9}, ValueError, "full rank 8"),
        ({"0.qkv.q": 9}, ValueError, "full rank 8"),
        ({"0.qkv": 1, "0.qkv.v": 1}, ValueError, "both"),
        ({"0.qkv.q": 0, "0.qkv": 1}, ValueError, "both"),
        ({"2.q": 1}, ValueError, "split"),
        ({"0.proj.w": 1}, KeyError, "no module"),
        ({"": 1}, TypeError, "module path"),
        (7, TypeError, "mapping"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(plan, error, message):
    model = toy()
    with pytest.raises(error, match=message):
        inject(model, {"2": 1, **plan} if isinstance(plan, dict) else plan)
    assert type(model[2]) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_above_full_rank_when_the_plan_says_so():
    model = toy()
    plan = RankPlan({"0.proj": 20}, allow_above_full=True)
    assert inject(model, plan)["0.proj"].lora_A.shape == (20, 8)


def test_a_plan_is_a_rank_plan_or_a_mapping_and_an_adapter_a_lora():
    found = [list(inject(toy(), plan)) for plan in (RankPlan(PLAN), PLAN, MappingProxyType(PLAN))]
    assert found == [list(PLAN)] * 3
    fake = type("Fake", (), {"ranks": PLAN, "allow_above_full": True})()
    for plan in (fake, list(PLAN.items()), None, "0.proj"):
        with pytest.raises(TypeError, match=f"plan is a {type(plan).__name__}; expected a RankPlan or a mapping"):
            inject(toy(), plan)
    model = toy()
    with pytest.raises(TypeError, match="made a Identity; expected LoRA"):
        inject(model, PLAN, lambda *args, **options: nn.Identity())
    assert type(model[2]) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_injecting_twice_is_refused():
    model = toy()
    inject(model, {"2": 1})
    with pytest.raises(ValueError, match="unload"):
        inject(model, {"0.proj": 1})


def test_state_round_trip_is_strict():
    model, other = toy(), toy()
    inject(model, PLAN)
    inject(other, PLAN)
    scramble(model)
    state = adapter_state_dict(model)
    assert not torch.allclose(model(X), other(X))
    load_adapter_state_dict(other, state)
    assert torch.equal(model(X), other(X))
    name = next(iter(state))
    with pytest.raises(KeyError, match="missing"):
        load_adapter_state_dict(other, {k: v for k, v in state.items() if k != name})
    with pytest.raises(KeyError, match="unexpected"):
        load_adapter_state_dict(other, {**state, "more": state[name]})
    with pytest.raises(ValueError, match="shape"):
        load_adapter_state_dict(other, {**state, name: state[name][:1]})
    with pytest.raises(TypeError, match="float32"):
        load_adapter_state_dict(other, {**state, name: state[name].float()})


def test_dropout_acts_in_training_alone():
    model = toy()
    inject(model, {"2": 2}, partial(LoRA, dropout=0.5))
    scramble(model)
    torch.manual_seed(0)
    many = torch.stack([model(X) for _ in range(3)])
    assert not torch.equal(many[0], many[1])
    model.eval()
    assert torch.equal(model(X), model(X))


def test_dropout_is_unbiased():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5)).double()
    inject(model, {"0": 2}, partial(LoRA, dropout=0.5))
    scramble(model)
    x = torch.randn(1, 8, dtype=torch.float64)
    outputs = model(x.expand(20000, 8))
    error = (outputs.mean(0) - model.eval()(x)[0]).abs()
    assert bool((error < 5 * outputs.std(0) / 20000**0.5).all())


def test_lora_plus_groups():
    model = toy()
    found = inject(model, PLAN)
    groups = {group["name"]: group for group in parameter_groups(model, lr=0.1, ratio=16)}
    assert groups["lora_B"]["lr"] == pytest.approx(1.6) and groups["base"]["lr"] == pytest.approx(0.1)
    assert {id(p) for p in groups["lora_B"]["params"]} == {id(a.lora_B) for a in found.values()}
    with pytest.raises(ValueError, match="positive"):
        parameter_groups(model, lr=0.1, ratio=0.0)


def test_lora_plus_first_step_moves_b_by_the_ratio():
    steps = []
    for ratio in (1.0, 4.0):
        model = toy()
        found = inject(model, {"2": 2}, generator=torch.Generator().manual_seed(3))
        model(X).sum().backward()
        torch.optim.SGD(parameter_groups(model, lr=0.1, ratio=ratio)).step()
        steps.append(found["2"].lora_B.detach())
    assert torch.allclose(steps[1], 4 * steps[0])


@pytest.mark.parametrize("frozen, moving", [("A", "lora_B"), ("B", "lora_A")])
def test_one_factor_frozen(frozen, moving):
    model = toy()
    before = model(X)
    adapter = inject(model, {"2": 2}, partial(LoRA, frozen=frozen))["2"]
    assert torch.allclose(model(X), before)
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == [moving]
    model(X).square().sum().backward()
    assert getattr(adapter, moving).grad.abs().sum() > 0


def test_directions_give_a_and_the_starting_delta():
    model = toy()
    weight = model[2].weight.clone()
    a, b = torch.randn(3, 8).double(), torch.randn(5, 3).double()
    adapter = inject(model, {"2": 2}, partial(LoRA, init="directions", directions={"2": (a, b)}))["2"]
    assert torch.allclose(adapter.delta_weight(), b[:, :2] @ a[:2])
    assert torch.allclose(model[2](X), X @ (weight + b[:, :2] @ a[:2]).T + model[2].bias)
    with pytest.raises(KeyError, match="nothing for"):
        inject(toy(), {"0.proj": 2}, partial(LoRA, init="directions", directions={"2": a}))
    with pytest.raises(ValueError, match="expected"):
        inject(toy(), {"2": 2}, partial(LoRA, init="directions", directions={"2": a[:, :7]}))


@pytest.mark.parametrize("scaling", ["lora", "rslora", "constant"])
def test_gora_starts_against_the_gradient_on_the_rows_of_a(scaling):
    """ΔW = −γ √(d_in/r) G A⁺A whatever the scale: what is left of G stands at right angles to every row of A."""
    gradient = torch.randn(5, 8, generator=torch.Generator().manual_seed(3)).double()
    start = partial(LoRA, init="gora", gradients={"2": gradient}, gamma=0.1, scaling=scaling)
    adapter = inject(toy(), {"2": 3}, start)["2"]
    a, delta = adapter.lora_A.detach(), adapter.delta_weight().detach()
    projection = a.T @ torch.linalg.inv(a @ a.T) @ a
    assert torch.allclose(delta, -0.1 * math.sqrt(8 / 3) * gradient @ projection)
    assert torch.allclose((gradient + delta / (0.1 * math.sqrt(8 / 3))) @ a.T, torch.zeros(5, 3).double(), atol=1e-12)
    assert [p.requires_grad for p in adapter.parameters()] == [True, True]
    whole = inject(toy(), RankPlan({"2": 8}, allow_above_full=True), start)["2"]
    assert torch.allclose(whole.delta_weight(), -0.1 * gradient)  # A spans everything
    again = inject(toy(), {"2": 3}, partial(LoRA, scaling=scaling))["2"]  # drawn with the same seed of torch
    assert torch.allclose(again.lora_A, adapter.lora_A)


def test_gora_keeps_its_length_over_random_rows():
    """√(d_in/r) undoes what a random A keeps of ‖G‖: E‖G A⁺A‖² = r/d_in ‖G‖²."""
    gradient = torch.randn(20, 60, generator=torch.Generator().manual_seed(3))
    start = partial(LoRA, init="gora", gradients={"": gradient}, gamma=1.0, generator=torch.Generator().manual_seed(4))
    lengths = [float(start(torch.zeros(20, 60), r).delta_weight().detach().norm()) for r in (5, 20, 45)]
    assert lengths == pytest.approx([float(gradient.norm())] * 3, rel=0.15)


def test_gora_wants_a_gradient_that_fits():
    gradient = torch.ones(5, 8)
    for options, error, match in (
        ({"gradients": {"0": gradient}}, KeyError, "init='gora' has nothing for '2'"),
        ({"gradients": {"2": gradient.T}}, ValueError, r"G is \(8, 5\); expected \(5, 8\)"),
        ({"gradients": {"2": gradient}, "frozen": "B"}, ValueError, "sets B"),
        ({"gradients": {"2": gradient}, "gamma": 0.0}, ValueError, "gamma > 0"),
    ):
        with pytest.raises(error, match=match):
            inject(toy(), {"2": 2}, partial(LoRA, init="gora", **options))


def test_pissa_takes_the_leading_triplets():
    model = toy()
    u, s, v = torch.linalg.svd(model[2].weight.detach())
    adapter = inject(model, {"2": 2}, partial(LoRA, init="pissa"))["2"]
    a, b = adapter.factors()
    assert torch.allclose(b @ a, (u[:, :2] * s[:2]) @ v[:2])


def test_the_same_generator_gives_the_same_adapter():
    first, second = (inject(toy(), {"2": 2}, generator=torch.Generator().manual_seed(5))["2"].lora_A for _ in range(2))
    assert torch.equal(first, second)


def test_half_precision_base_keeps_float32_adapters():
    model = toy().bfloat16()
    adapter = inject(model, {"2": 2})["2"]
    assert adapter.lora_A.dtype == torch.float32
    assert model(X.bfloat16()).dtype == torch.bfloat16


def test_meta_models_can_be_counted():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 24))
    inject(model, {"0.q": 2, "0.k": 2})
    assert sum(p.numel() for p in trainable_adapter_parameters(model)) == 2 * 2 * 16


def test_describe_names_every_layer_and_the_total():
    model = toy()
    inject(model, PLAN)
    text = describe(model)
    assert all(name in text for name in PLAN) and "157 trainable" in text


@pytest.mark.parametrize("options", [{"rank": 0}, {"scaling": "x"}, {"init": "x"}, {"frozen": "x"}, {"dropout": 1.0}])
def test_options_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match=r"expected|needs"):
        LoRA(torch.zeros(3, 4), **{"rank": 1, **options}).factors()
