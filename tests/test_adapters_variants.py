"""Each variant against its own algebra; what all of them share is tested on all of them."""

import copy
from functools import partial

import pytest
import torch
from shared import apart
from torch import nn

from orca_rank.adapters import (
    Additive,
    BlockDiagonalLoRA,
    Bottleneck,
    DeltaLoRA,
    DyLoRA,
    ElaLoRA,
    FLoRA,
    GatedLoRA,
    LoRA,
    MatryoshkaLoRA,
    MoSLoRA,
    NotExpressible,
    ReRandomised,
    Steps,
    TwoSubspaces,
    adapter_state_dict,
    adapters,
    begin_step,
    end_step,
    extra_loss,
    inject,
    load_adapter_state_dict,
    load_peft,
    merge,
    parameter_groups,
    prune,
    save_peft,
    set_memory,
    unmerge,
)
from orca_rank.adapters.block_diagonal import gradient_blocks
from orca_rank.adapters.elastic import reallocate
from orca_rank.adapters.gated import kumaraswamy_to_beta

VARIANTS = {
    "lora": LoRA,
    "symmetric": partial(LoRA, init="symmetric"),
    "fa": partial(LoRA, frozen="A"),
    "fb": partial(LoRA, frozen="B"),
    "dylora": DyLoRA,
    "matryoshka": MatryoshkaLoRA,
    "moslora": MoSLoRA,
    "moslora_orthogonal": partial(MoSLoRA, mixer="orthogonal"),
    "two_subspaces": TwoSubspaces,
    "flora": FLoRA,
    "delta": partial(DeltaLoRA, start=1),
    "additive": Additive,
    "rerandomised": ReRandomised,
    "gated": GatedLoRA,
    "bottleneck": Bottleneck,
    "elalora": ElaLoRA,
    "block_diagonal": partial(BlockDiagonalLoRA, blocks=2),
}
X = torch.linspace(-1, 1, 10 * 12, dtype=torch.float64).reshape(10, 12).mul(3).sin()
PLAN = {"0.q": 4, "0.v": 4, "2": 4}


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 36), nn.GELU(), nn.Linear(36, 8)).double()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(variant, plan=None, memory="lean"):
    model = toy()
    return model, inject(model, plan or PLAN, VARIANTS.get(variant, variant), generator=generator(5), memory=memory)


def train(model, steps=3, lr=1e-2, optimiser=torch.optim.SGD):
    opt = optimiser(parameter_groups(model, lr=lr))
    draws = generator(9)
    for _ in range(steps):
        begin_step(model, draws)
        (model(X).square().mean() + extra_loss(model)).backward()
        opt.step()
        opt.zero_grad()
        end_step(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_identity_at_the_start(variant):
    model, _ = make(variant)
    begin_step(model, generator())
    assert torch.allclose(model(X), toy()(X), atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_and_only_what_it_declares(variant):
    model, _ = make(variant)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = model(X).square().mean()
    train(model, steps=20)
    assert model(X).square().mean() < before
    assert all(torch.equal(model.get_parameter(n), value) for n, value in frozen.items())
    assert all(p.requires_grad == (n not in frozen) for n, p in model.named_parameters())
    assert any(n.endswith("lora_A") for n in frozen) == (variant == "fa")


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "rerandomised"])
def test_the_scale_at_two_ranks(variant):
    for scaling, expected in (("constant", (3, 3)), ("lora", (3 / 2, 3 / 4)), ("rslora", (3 / 2**0.5, 3 / 2))):
        kind = partial(VARIANTS[variant], scaling=scaling, alpha=3)
        assert [make(kind, {"2": rank})[1]["2"].scale for rank in (2, 4)] == pytest.approx(expected)


def test_rerandomised_projections_have_a_scale_of_their_own():
    assert make("rerandomised")[1]["2"].scale == pytest.approx(2**-0.5)
    with pytest.raises(ValueError, match="leave alpha out"):
        make(partial(ReRandomised, alpha=2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_lean_and_plain_agree(variant):
    grads = []
    for memory in ("plain", "lean"):
        model, _ = make(variant, memory=memory)
        train(model)
        begin_step(model, generator(1))
        model(X).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "bottleneck"])
def test_merged_equals_unmerged_and_files_come_back(variant, tmp_path):
    model, _ = make(variant)
    base = {n: p.clone() for n, p in model.named_parameters() if "branches" not in n}
    train(model, steps=4)
    model.eval()
    expected = model(X)
    assert not torch.allclose(expected, toy()(X), atol=1e-4)
    merge(model)
    assert torch.allclose(model(X), expected, atol=1e-10)
    unmerge(model)
    assert all(torch.equal(model.get_parameter(n), value) for n, value in base.items())
    other, _ = make(variant)
    load_adapter_state_dict(other, adapter_state_dict(model))
    assert torch.allclose(other.eval()(X), expected, atol=1e-12)
    if variant == "rerandomised":
        with pytest.raises(NotExpressible, match="full rank"):
            save_peft(model, tmp_path)
        return
    save_peft(model, tmp_path)
    bare = toy()
    load_peft(bare, tmp_path)
    assert torch.allclose(bare(X), expected, atol=1e-5)


def test_bottleneck_is_not_linear():
    model, found = make("bottleneck")
    assert sum(p.numel() for p in found["2"].parameters()) == 4 * (36 + 8)
    with pytest.raises(ValueError, match="not linear"):
        merge(model)
    with pytest.raises(NotExpressible, match="no LoRA"):
        found["2"].plain()


def test_a_fixed_orthogonal_mixer_trains_as_lora_with_mixed_a():
    """Seed: appendix A.4 of MoSLoRA, with several steps of SGD; a learning mixer departs, and so does AdamW."""

    def departure(fixed, lr, optimiser):
        model, found = make(partial(MoSLoRA, mixer="orthogonal", fixed=fixed))
        other, plain = make("lora")
        for name, adapter in found.items():
            plain[name].lora_A.data = (adapter.mixer @ adapter.lora_A).detach()
        train(model, steps=10, lr=lr, optimiser=optimiser)
        train(other, steps=10, lr=lr, optimiser=optimiser)
        return apart(model(X), other(X))

    assert departure(True, 0.1, torch.optim.SGD) < 1e-10 < departure(False, 0.1, torch.optim.SGD)
    assert departure(True, 0.01, torch.optim.AdamW) > 1e-4


def test_a_zero_mixer_has_no_gradient_and_is_refused():
    model, found = make("moslora")
    with torch.no_grad():
        found["2"].mixer.zero_()
    model(X).sum().backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in found["2"].parameters())
    with pytest.raises(ValueError, match="never trains"):
        make(partial(MoSLoRA, mixer="zero"))
    for options in ({"mixer": "x"}, {"mixer": "normal", "fixed": True}, {"init": "pissa"}):
        with pytest.raises(ValueError):
            make(partial(MoSLoRA, **options))


def test_mixer_initialisations():
    for mixer in ("kaiming", "orthogonal", "normal", "identity"):
        m = MoSLoRA(torch.zeros(40, 50), 32, mixer=mixer, generator=generator()).mixer.detach()
        if mixer == "identity":
            assert torch.equal(m, torch.eye(32))
        elif mixer == "orthogonal":
            assert torch.allclose(m @ m.T, torch.eye(32), atol=1e-5)
        else:
            spread = (1 / 32) ** 0.5 * (1 if mixer == "normal" else 3**-0.5)
            assert float(m.std()) == pytest.approx(spread, rel=0.1)


def test_two_subspaces_is_the_butterfly_mixer():
    _, found = make("two_subspaces")
    nn.init.normal_(found["2"].lora_B)
    adapter = found["2"]
    eye = torch.eye(2).double()
    butterfly = torch.cat([torch.cat([eye, eye], 1), torch.cat([eye, eye], 1)])
    assert torch.allclose(adapter.delta_weight(), adapter.scale * adapter.lora_B @ butterfly @ adapter.lora_A)
    assert int(torch.linalg.matrix_rank(adapter.delta_weight())) == 2
    with pytest.raises(ValueError, match="even"):
        make("two_subspaces", {"2": 3})


def test_block_diagonal_has_n_times_the_rank_at_the_same_parameters():
    _, found = make(partial(BlockDiagonalLoRA, blocks=4), {"2": 2})
    adapter = found["2"]
    assert sum(p.numel() for p in adapter.parameters()) == 2 * (36 + 8)
    assert 36**-0.5 < float(adapter.lora_A.detach().abs().max()) <= 9**-0.5  # a row of a block has 9 inputs
    nn.init.normal_(adapter.lora_B)
    products = [b @ a for b, a in zip(adapter.lora_B.chunk(4), adapter.lora_A.chunk(4, 1), strict=True)]
    assert torch.allclose(adapter.delta_weight(), adapter.scale * torch.block_diag(*products))
    assert int(torch.linalg.matrix_rank(adapter.delta_weight())) == 8
    _, found = make(partial(BlockDiagonalLoRA, blocks=1), {"2": 2})
    _, plain = make("lora", {"2": 2})
    assert torch.equal(found["2"].lora_A, plain["2"].lora_A)
    mapped = make(partial(BlockDiagonalLoRA, blocks={"0.q": 3, "2": 2}), {"0.q": 2, "2": 2})[1]
    assert [adapter.blocks for adapter in mapped.values()] == [3, 2]


def elastic(model, steps, after=lambda: None, start=0):
    opt = torch.optim.AdamW(parameter_groups(model, lr=0.02))
    around = Steps(model)
    around.run_of(20)
    for _ in range(start, steps):
        around.begin()
        (model(X).square().mean() + around.extra_loss()).backward()
        opt.step()
        around.end()
        opt.zero_grad()
        after()
    return opt


def test_elalora_moves_ranks_and_keeps_their_sum():
    model, found = make(partial(ElaLoRA, every=2, moved=2, tinit=0.2, tfinal=0.3), {"0.q": 3, "0.v": 3, "2": 3})
    history = []
    elastic(model, 20, lambda: history.append([int(one.alive.sum()) for one in found.values()]))
    assert all(sum(ranks) == 9 and min(ranks) >= 1 for ranks in history)
    assert history[2] == [3, 3, 3] != history[13] and all(ranks == history[13] for ranks in history[13:])
    for adapter, rank in zip(found.values(), history[-1], strict=True):
        a, b, _ = adapter.plain()
        assert len(a) == b.shape[1] == rank <= 6
        assert apart(a @ a.T, torch.eye(rank).double()) < 0.5


def test_elalora_prunes_the_least_and_grows_where_the_least_is_largest():
    """Importances set by hand: of a's and b's two least, a's .1 dies; b's .7 is the largest and gives b one more."""
    model, found = make(partial(ElaLoRA, every=1, moved=1, tinit=0, tfinal=0.1), {"0.q": 3, "2": 3})
    a, b = found["0.q"], found["2"]
    with torch.no_grad():
        a.lambdas[:3], b.lambdas[:3] = 1.0, 1.0
        a.importance[:3], b.importance[:3] = torch.tensor([0.2, 0.1, 9.0]), torch.tensor([0.7, 0.6, 0.9])
    before, born = model(X), b.delta_weight().clone()
    for layer in (a, b):
        layer.run_of(10)
    reallocate([a, b])
    assert a.alive.nonzero().flatten().tolist() == [0, 2] and b.alive.nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert torch.equal(b.delta_weight(), born) and not torch.allclose(model(X), before)  # λ = 0 changes nothing
    q, _, _ = b.plain()
    assert torch.allclose(q @ q.T, torch.eye(4).double(), atol=1e-10)
    with torch.no_grad():
        b.lora_A[4] = b.lora_A[:4].sum(0)  # nothing at right angles to the living is left in the slot
    b.grow()
    assert torch.allclose(b.plain()[0] @ b.plain()[0].T, torch.eye(5).double(), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elalora_pulls_at_no_direction_that_is_at_right_angles_within_rounding(dtype):
    """Adam would make full steps of a gradient of rounding errors, which the number of processes changes."""
    torch.manual_seed(0)
    layer = ElaLoRA(torch.zeros(40, 30, dtype=dtype), 6)
    layer.grow()
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer.extra_loss()
    loss.backward()
    assert loss == 0 and not layer.lora_A.grad.any() and not layer.lora_B.grad.any()
    with torch.no_grad():
        layer.lora_A[0] *= 1.01
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.extra_loss().item() == pytest.approx(0.01 * (1.01**2 - 1) ** 2, rel=1e-3)


def test_elalora_goes_on_as_if_nothing_had_happened():
    kind = partial(ElaLoRA, every=2, moved=2, tinit=0, tfinal=0)
    whole, first, second = (make(kind, {"0.q": 3, "0.v": 3, "2": 3})[0] for _ in range(3))
    elastic(whole, 8)
    state = elastic(first, 4).state_dict()
    load_adapter_state_dict(second, adapter_state_dict(first))
    opt = torch.optim.AdamW(parameter_groups(second, lr=0.02))
    opt.load_state_dict(state)
    around = Steps(second)
    around.run_of(20)
    for _ in range(4):
        (second(X).square().mean() + around.extra_loss()).backward()
        opt.step()
        around.end()
        opt.zero_grad()
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_elalora_refusals():
    for options, match in (({"room": 0.5}, "room >= 1"), ({"tinit": 0.8}, "tinit"), ({"frozen": "A"}, "leave frozen")):
        with pytest.raises(ValueError, match=match):
            make(partial(ElaLoRA, **options))
    model, _ = make(partial(ElaLoRA, every=1, tinit=0, tfinal=0))
    around = Steps(model)
    around.run_of(10)
    with pytest.raises(RuntimeError, match="zero_grad"):
        around.end()


def test_block_diagonal_refusals():
    for blocks, rank, match in ((3, 2, "divides"), (0, 2, "divides"), (4, 3, "full rank 2")):
        with pytest.raises(ValueError, match=match):
            make(partial(BlockDiagonalLoRA, blocks=blocks), {"2": rank})
    with pytest.raises(KeyError, match="blocks has nothing for '2'"):
        make(partial(BlockDiagonalLoRA, blocks={"0.q": 2}), {"2": 2})


def linear_problem():
    """Least squares from whitened-free inputs: x (200, 6), W* (4, 6), Σ = xᵀx/n."""
    torch.manual_seed(0)
    x = torch.randn(200, 6).double() @ torch.randn(6, 6).double()
    w = torch.randn(4, 6).double()
    return x, w, x.T @ x / len(x)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_optimum_with_one_factor_frozen(frozen):
    """Seed: B* = W* Σ A₀ᵀ (A₀ Σ A₀ᵀ)⁻¹ for LoRA-FA, and A* = (B₀ᵀB₀)⁻¹ B₀ᵀ W* for LoRA-FB (B₀ᵀW* if orthonormal).

    The loss is quadratic in the factor that learns, so that its gradient vanishes at the optimum and nowhere else.
    """
    x, w, sigma = linear_problem()
    model = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    adapter = inject(model, {"0": 2}, partial(LoRA, alpha=2, frozen=frozen))["0"]
    if frozen == "B":
        nn.init.orthogonal_(adapter.lora_B.data)
    a, b = adapter.lora_A.detach(), adapter.lora_B.detach()
    learns, optimum = (
        (adapter.lora_B, w @ sigma @ a.T @ torch.linalg.inv(a @ sigma @ a.T))
        if frozen == "A"
        else (adapter.lora_A, b.T @ w)
    )
    assert [p is learns for p in adapter.parameters() if p.requires_grad] == [True]

    def gradient():
        return torch.autograd.grad((model(x) - x @ w.T).square().mean(), learns)[0]

    start = gradient()
    with torch.no_grad():
        learns.copy_(optimum)
    assert float(gradient().norm()) < 1e-10 * float(start.norm())


def test_the_two_formulations_have_the_same_gradients():
    """Seed: through x(W₀ + AB), ∂A = (xᵀδ)Bᵀ and ∂B = Aᵀ(xᵀδ); through xW₀ + (xA)B the same at O(r) cost."""
    model, found = make("lora", {"2": 3})
    adapter = found["2"]
    nn.init.normal_(adapter.lora_B)
    h = model[1](model[0](X)).detach()
    y = model[2](h)
    y.square().sum().backward()
    full = (2 * y).detach().T @ h  # ∂L/∂W
    assert torch.allclose(adapter.lora_A.grad, adapter.scale * adapter.lora_B.T @ full)
    assert torch.allclose(adapter.lora_B.grad, adapter.scale * full @ adapter.lora_A.T)


def test_delta_lora_drift_is_the_products_change():
    """W ← W + λ s (B⁺A⁺ − BA) summed by hand, from step K on."""
    model, found = make(partial(DeltaLoRA, start=2, ratio=0.5), {"2": 3})
    adapter = found["2"]
    opt = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    drift = torch.zeros(8, 36).double()
    for step in range(6):
        before = (adapter.lora_B @ adapter.lora_A).detach()
        model(X).square().sum().backward()
        opt.step()
        opt.zero_grad()
        end_step(model)
        if step >= 2:
            drift += 0.5 * adapter.scale * ((adapter.lora_B @ adapter.lora_A).detach() - before)
        offset = adapter.offset()
        assert torch.allclose(drift, torch.zeros_like(drift) if offset is None else offset, atol=1e-12)
    assert drift.abs().max() > 1e-4


def test_delta_lora_from_the_first_step_is_lora_with_a_larger_alpha():
    """K = 0, B₀ = 0 and Adam, which a constant factor in the gradient does not change."""
    delta, _ = make(partial(DeltaLoRA, start=0, ratio=0.5, alpha=4))
    lora, _ = make(partial(LoRA, alpha=6))
    for model in (delta, lora):
        train(model, steps=5, optimiser=partial(torch.optim.Adam, eps=1e-30))
    assert torch.allclose(delta(X), lora(X), atol=1e-8)


def test_delta_lora_begins_after_its_share_of_the_run():
    """A share of 10 steps is the number of steps that it comes to; a run too short to begin in is no Delta-LoRA."""
    models = []
    for start in (0.3, 3):
        model, found = make(partial(DeltaLoRA, start=start), {"2": 3})
        Steps(model).run_of(10)
        train(model, steps=6)
        assert found["2"].follows
        models.append(model)
    assert torch.equal(models[0](X), models[1](X))
    plain, _ = make(LoRA, {"2": 3})
    train(plain, steps=6)
    assert apart(models[0](X), plain(X)) > 1e-6
    unsaid, _ = make(partial(DeltaLoRA, start=0.3), {"2": 3})
    with pytest.raises(ValueError, match=r"start=0\.3 is a share of the run: call Steps"):
        begin_step(unsaid)
    with pytest.raises(ValueError, match=r"start=10: the run has 10 optimiser steps, so W would never follow"):
        Steps(make(partial(DeltaLoRA, start=10), {"2": 3})[0]).run_of(10)


def test_delta_lora_refusals():
    for options in ({"dropout": 0.1}, {"start": -1}, {"start": 2.5}, {"init": "symmetric"}):
        with pytest.raises(ValueError):
            make(partial(DeltaLoRA, **options))


def test_additive_rank_one_is_rows_plus_columns():
    _, found = make(partial(Additive, alpha=1), {"2": 1})
    adapter = found["2"]
    nn.init.normal_(adapter.lora_A)
    nn.init.normal_(adapter.lora_B)
    expected = adapter.lora_B.expand(8, 36) + adapter.lora_A.expand(8, 36)  # u_i + v_j
    assert torch.allclose(adapter.delta_weight(), expected)
    assert int(torch.linalg.matrix_rank(adapter.delta_weight())) == 2
    with pytest.raises(ValueError, match="divide"):
        make("additive", {"2": 3})


def test_additive_gradient_sums_rows_and_columns():
    model, found = make(partial(Additive, alpha=1), {"2": 1})
    h = model[1](model[0](X)).detach()
    y = model[2](h)
    y.square().sum().backward()
    full = (2 * y).detach().T @ h
    assert torch.allclose(found["2"].lora_A.grad, full.sum(0, keepdim=True))
    assert torch.allclose(found["2"].lora_B.grad, full.sum(1, keepdim=True))


def test_rerandomised_steps_average_to_the_full_gradient():
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    x = torch.randn(7, 4, generator=generator()).double()
    reference = copy.deepcopy(model)
    reference(x).square().sum().backward()
    adapter = inject(model, {"0": 2}, ReRandomised)["0"]
    draws, moves = generator(1), []
    for _ in range(600):
        begin_step(model, draws)
        model.zero_grad()
        model(x).square().sum().backward()
        a, b = adapter.project_in, adapter.project_out
        moves.append(0.5**0.5 * (adapter.lora_B.grad @ a + b @ adapter.lora_A.grad))
    moves = torch.stack(moves)
    error = (moves.mean(0) - reference[0].weight.grad).abs()
    assert bool((error < 5 * moves.std(0) / 600**0.5).all())


def test_rerandomised_folds_exactly():
    model, found = make("rerandomised", {"2": 3})
    begin_step(model, generator())
    with torch.no_grad():
        found["2"].lora_B.normal_()
    expected = model(X)
    end_step(model)
    begin_step(model, generator(1))
    assert torch.allclose(model(X), expected)


def test_kumaraswamy_divergence_against_quadrature():
    a, b, alpha = torch.tensor([0.7, 2.0, 3.0]).double(), torch.tensor([1.5, 0.8, 1.0]).double(), 3.0
    u = (torch.arange(200000).double() + 0.5) / 200000
    nu = (1 - u[:, None] ** (1 / b)) ** (1 / a)  # quantiles: ∫ log(q/p) dq
    log_q = (a * b).log() + (a - 1) * nu.log() + (b - 1) * torch.log1p(-(nu**a))
    log_p = torch.log(torch.tensor(alpha).double()) + (alpha - 1) * nu.log()
    assert torch.allclose(kumaraswamy_to_beta(a, b, alpha), (log_q - log_p).mean(0), atol=1e-3)
    assert float(kumaraswamy_to_beta(a, b, alpha)[2]) == pytest.approx(0.0, abs=1e-12)


def test_gates_start_at_the_prior_and_fall():
    alpha = 3.0
    adapter = GatedLoRA(torch.zeros(20, 20), 10, concentration=alpha)
    expected = torch.tensor([(alpha / (1 + alpha)) ** k for k in range(1, 11)])
    assert torch.allclose(adapter.survival(), expected)
    assert float(adapter.extra_loss().detach()) == pytest.approx(0.0, abs=1e-8)
    adapter.temperature = 1e-3
    draws = generator()
    samples = []
    for _ in range(3000):
        adapter.begin_step(draws)
        samples.append(adapter.gates().detach())
    assert torch.allclose(torch.stack(samples).mean(0), expected, atol=0.05)
    adapter.end_step()
    assert torch.equal(adapter.gates(), adapter.survival())


def test_gates_learn_and_prune_to_ranks():
    model, found = make(partial(GatedLoRA, concentration={"0.q": 1.0, "0.v": 2.0, "2": 3.0}, kl_weight=1e-4))
    train(model, steps=20, lr=0.05, optimiser=torch.optim.Adam)
    assert bool(extra_loss(model) > 0)
    with torch.no_grad():
        found["0.q"].log_a.fill_(-3.0)  # every stick near 0
        found["2"].log_a.fill_(9.0)  # every stick near 1
    model.eval()
    ranks = prune(model)
    assert ranks["0.q"] == 0 and ranks["2"] == 4 and "0.q" not in adapters(model)
    assert type(adapters(model)["2"]) is LoRA
    expected = found["2"].delta_weight()
    assert torch.allclose(adapters(model)["2"].delta_weight(), expected)


def test_gate_options_are_checked():
    for options, error in (
        ({"concentration": 0.0}, ValueError),
        ({"concentration": {"2": 1.0}}, KeyError),
        ({"temperature": 0.0}, ValueError),
    ):
        with pytest.raises(error):
            make(partial(GatedLoRA, **options))


@pytest.mark.parametrize(
    "variant", ["moslora", "gated", "delta", "additive", "rerandomised", "two_subspaces", "block_diagonal"]
)
def test_meta_models_can_be_counted(variant):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 36), nn.GELU(), nn.Linear(36, 8))
    found = inject(model, PLAN, VARIANTS[variant])
    own = {"moslora": 16, "gated": 8}.get(variant, 0)
    assert sum(p.numel() for p in found["2"].parameters()) == 4 * (36 + 8) + own


def test_memory_can_change_between_steps():
    model, _ = make("moslora")
    outputs = []
    for memory in ("lean", "plain"):
        set_memory(model, memory)
        outputs.append(model(X))
    assert torch.allclose(*outputs)


def test_options_without_effect_or_meaning_are_refused():
    weight = torch.randn(6, 5)
    for ratio in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="ratio"):
            DeltaLoRA(weight, 2, ratio=ratio)
    with pytest.raises(ValueError, match="kl_weight"):
        GatedLoRA(weight, 2, kl_weight=-1.0)
    with pytest.raises(ValueError, match="concentration is of law='stick-breaking' alone"):
        DyLoRA(weight, 2, concentration=3.0)


@pytest.mark.parametrize(
    ("effective", "rank", "shape", "most", "expected"),
    [
        (16.0, 2, (64, 64), 16, 8),  # n r = 16
        (15.9, 2, (64, 64), 16, 4),  # never above the effective rank
        (100.0, 1, (64, 64), 16, 16),
        (100.0, 1, (64, 64), 4, 4),
        (3.0, 4, (64, 64), 16, 1),
        (0.0, 1, (64, 64), 16, 1),  # of a gradient of zeros
        (64.0, 2, (36, 64), 16, 4),  # 8 and more do not divide 36
        (64.0, 16, (32, 64), 16, 2),  # a block of 4 has full rank 8
    ],
)
def test_blocks_follow_the_gradients_effective_rank(
    effective: float, rank: int, shape: tuple[int, int], most: int, expected: int
) -> None:
    assert gradient_blocks(effective, rank, *shape, most) == expected
    with pytest.raises(ValueError, match="a power of 2, received 6"):
        gradient_blocks(effective, rank, *shape, 6)
