"""Rules that read spectra, posteriors and given updates."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from orca_rank import ranks
from orca_rank.measuring.records import Spectrum
from orca_rank.ranks import Budget, Layer
from orca_rank.ranks.posterior import choose_tempering, credible_set, rank_posterior, rank_prior
from orca_rank.ranks.theory import chain_error, chain_rank, fit_chain, numerical_rank


def layer(name, kind, values, null=1.0, energy=None, d_in=32, d_out=32):
    energy = float(np.square(values).sum()) if energy is None else energy
    rank = None if null is None else sum(value > null for value in values)
    return Layer(name, d_in, d_out, spectra={kind: Spectrum(tuple(values), null, energy, rank)})


@pytest.mark.parametrize("rule", [ranks.ot_map, ranks.gradient])
def test_without_a_budget_the_rank_is_what_stands_above_the_null(rule):
    kind = rule.__name__
    layers = [
        layer("a", kind, [5.0, 2.0, 0.5]),
        layer("b", kind, [0.9, 0.1]),
        layer("c", kind, [9.0, 8.0, 7.0], d_in=2),
    ]
    assert list(rule(layers).ranks.values()) == [2, 0, 2]  # c is capped at its full rank


def test_with_a_budget_units_go_by_value_and_the_null_comes_last():
    layers = [layer("a", "gradient", [5.0, 4.0, 0.9]), layer("b", "gradient", [3.0, 1.5, 0.99])]
    by_total = [list(ranks.gradient(layers, Budget(total_rank=n)).ranks.values()) for n in range(1, 7)]
    assert by_total == [[1, 0], [2, 0], [2, 1], [2, 2], [2, 3], [3, 3]]
    # ot_map counts shares of the layer's own output energy.
    layers = [layer("a", "ot_map", [5.0, 4.0], energy=1000.0), layer("b", "ot_map", [3.0, 2.0], energy=10.0)]
    assert ranks.ot_map(layers, Budget(total_rank=2)).ranks == {"a": 0, "b": 2}
    # Per parameter: the same spectrum in a layer of half the width is worth twice as much.
    layers = [layer("a", "gradient", [5.0, 4.0]), layer("b", "gradient", [5.0, 4.0], d_in=16, d_out=16)]
    assert ranks.gradient(layers, Budget(parameters=64)).ranks == {"a": 0, "b": 2}


def test_whitened_gradient_leaves_no_layer_without():
    name = "whitened_gradient"
    layers = [layer("a", name, [5.0, 4.0, 0.9]), layer("b", name, [0.9, 0.8]), layer("c", name, [3.0, 2.0])]
    assert list(ranks.whitened_gradient(layers).ranks.values()) == [2, 1, 2]
    assert list(ranks.whitened_gradient(layers, least=0).ranks.values()) == [2, 0, 2]
    assert list(ranks.whitened_gradient(layers, Budget(total_rank=5)).ranks.values()) == [2, 1, 2]
    assert list(ranks.whitened_gradient(layers, Budget(total_rank=3), least=0).ranks.values()) == [2, 0, 1]
    plan = ranks.whitened_gradient(layers, Budget(total_rank=4, r_max=2))
    assert list(plan.ranks.values()) == [2, 1, 1] and plan.budget == Budget(total_rank=4, r_max=2)
    for budget, options, match in ((Budget(total_rank=2), {}, "rank.least=0"), (None, {"least": -1}, "whole number")):
        with pytest.raises(ValueError, match=match):
            ranks.whitened_gradient(layers, budget, **options)


def test_activation_is_eva():
    layers = [layer("a", "activation", [3.0, 0.1], None), layer("b", "activation", [2.0, 2.0, 1.9, 1.8], None)]
    # ratios: a .999, .001; b .27 .27 .24 .22
    assert ranks.activation(layers, Budget(total_rank=4), rho=2).ranks == {"a": 1, "b": 3}
    assert ranks.activation(layers, Budget(total_rank=4), rho=1).ranks == {"a": 2, "b": 2}
    assert ranks.activation(layers, Budget(parameters=4 * 64)).ranks == {"a": 1, "b": 3}
    for rho in (0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="rho"):
            ranks.activation(layers, Budget(total_rank=4), rho=rho)


def test_what_the_cap_of_activation_leaves_over_is_spent():
    # Four narrow layers are full at rank 2; the cap of the wide one, 2 x 6, leaves 30 - 8 - 12 = 10.
    narrow = [layer(f"n{i}", "activation", [1.0, 1.0], d_in=2, d_out=2) for i in range(4)]
    wide = layer("w", "activation", np.linspace(5, 1, 40).tolist(), d_in=40, d_out=40)
    plan = ranks.activation([*narrow, wide], Budget(mean_rank=6))
    assert list(plan.ranks.values()) == [2, 2, 2, 2, 22]
    assert ranks.activation([*narrow, wide], Budget(mean_rank=6, r_max=15))["w"] == 15
    # Where the cap binds and others have room, they still come first.
    assert ranks.activation([layer("b", "activation", [0.1], energy=100.0), wide], Budget(mean_rank=6))["w"] == 12


def test_missing_spectra_name_the_option():
    for rule, option in (
        (ranks.ot_map, "ot_map"),
        *((getattr(ranks, name), name) for name in ("gradient", "whitened_gradient", "activation")),
    ):
        with pytest.raises(ValueError, match=rf"stage=measure.*gap\.measurements\.{option}=true"):
            rule([Layer("a", 4, 4)], Budget(total_rank=1))


def test_theory_bound_is_reached_by_the_construction_and_not_beaten():
    generator = np.random.default_rng(0)
    weights = [np.eye(12) + 0.3 * generator.standard_normal((12, 12)) for _ in range(2)]
    error = generator.standard_normal((12, 8)) @ generator.standard_normal((8, 12))
    target = weights[1] @ weights[0] + error
    values = np.linalg.svd(error, compute_uv=False)
    for rank in range(1, 5):
        updates = fit_chain(weights, error, rank)
        assert all(np.linalg.matrix_rank(update, tol=1e-8) <= rank for update in updates)
        product = (weights[1] + updates[1]) @ (weights[0] + updates[0])
        reached = np.linalg.norm(product - target, 2)
        assert reached == pytest.approx(chain_error(error, rank, 2), abs=1e-8)
        assert chain_error(error, rank, 2) == pytest.approx(values[2 * rank], abs=1e-9)
    assert chain_rank(numerical_rank(error), 2) == 4
    assert chain_error(error, 6, 2) == 0


def test_theory_rule(tmp_path):
    generator = np.random.default_rng(0)
    layers = [Layer("a", 10, 10), Layer("b", 10, 10), Layer("c", 10, 10)]
    update = generator.standard_normal((10, 7)) @ generator.standard_normal((7, 10))
    assert list(ranks.theory(layers, update=update).ranks.values()) == [3, 3, 3]  # ⌈7 / 3⌉
    assert list(ranks.theory(layers, Budget(mean_rank=2), update=update).ranks.values()) == [2, 2, 2]
    own = {"a": np.zeros((10, 10)), "b": np.outer(np.ones(10), np.arange(10.0)), "c": update}
    save_file(own, tmp_path / "updates.safetensors")
    assert list(ranks.theory(layers, update=tmp_path / "updates.safetensors").ranks.values()) == [0, 1, 7]
    with pytest.raises(ValueError, match="nothing for c"):
        ranks.theory(layers, update={"a": own["a"], "b": own["b"]})
    with pytest.raises(ValueError, match=r"rank\.update"):
        ranks.theory(layers)
    with pytest.raises(FileNotFoundError):
        ranks.theory(layers, update=tmp_path / "none")


def test_theory_wants_updates_that_fit_and_obeys_r_min():
    layers = [Layer("a", 10, 6), Layer("b", 6, 8)]
    fitting = {"a": np.zeros((6, 10)), "b": np.ones((8, 6))}
    assert ranks.theory(layers, update=fitting).ranks == {"a": 0, "b": 1}
    assert ranks.theory(layers, Budget(mean_rank=4, r_min=2), update=fitting).ranks == {"a": 2, "b": 2}
    assert ranks.theory(layers, update=np.eye(8, 10)).ranks == {"a": 4, "b": 4}
    with pytest.raises(ValueError, match=r"update of a has shape \(10, 6\), expected .*\(6, 10\)"):
        ranks.theory(layers, update={**fitting, "a": np.zeros((10, 6))})
    with pytest.raises(ValueError, match="names 'typo'"):
        ranks.theory(layers, update={**fitting, "typo": np.eye(3)})
    with pytest.raises(ValueError, match=r"chain.*\(9, 9\)"):
        ranks.theory(layers, update=np.eye(9))


def simulate(seed, images, true_rank=None, ranks_max=12):
    """Nested linear models with noisy coefficients: held-out losses of every rank, and their exact risks."""
    generator = np.random.default_rng(seed)
    k = generator.integers(1, ranks_max) if true_rank is None else true_rank
    coefficients = np.where(np.arange(ranks_max) < k, generator.standard_normal(ranks_max) * 0.3, 0.0)
    fitted = coefficients + 0.15 * generator.standard_normal(ranks_max)
    x = generator.standard_normal((images, ranks_max))
    y = x @ coefficients + generator.standard_normal(images)
    predictions = np.concatenate([np.zeros((images, 1)), np.cumsum(x * fitted, axis=1)], axis=1)
    risk = [((np.where(np.arange(ranks_max) < r, fitted, 0) - coefficients) ** 2).sum() for r in range(ranks_max + 1)]
    return (predictions - y[:, None]).T ** 2 / 2, int(np.argmin(risk))


def test_posterior_follows_bayes():
    prior = np.array([0.5, 0.3, 0.2])
    losses = np.array([[1.0, 2.0], [0.5, 1.0], [0.4, 1.2]])
    weight = prior * np.exp(-0.7 * np.array([3.0, 1.5, 1.6]))
    assert rank_posterior(losses, prior, 0.7) == pytest.approx(weight / weight.sum())
    assert rank_posterior(losses, prior, 0.0) == pytest.approx(prior)
    assert rank_posterior(losses, prior, 1e6).argmax() == 1
    with pytest.raises(ValueError, match="finite"):
        rank_posterior(losses * np.nan, prior, 1.0)


def test_prior_of_skipped_ranks_goes_to_the_next_measured():
    full = rank_prior(3.0, np.arange(9))
    some = rank_prior(3.0, np.array([0, 2, 8]))
    assert some == pytest.approx([full[0], full[1] + full[2], full[3:].sum()])


def test_credible_set_is_the_smallest():
    assert credible_set(np.array([0.05, 0.6, 0.31, 0.04])).tolist() == [False, True, True, False]
    assert credible_set(np.array([0.3, 0.3, 0.4]), 0.95).all()


def test_sets_hold_the_rank_of_least_risk():
    held, sizes = [], []
    for seed in range(120):
        losses, best = simulate(seed, 400)
        probability = rank_posterior(losses, rank_prior(6.0, np.arange(13)), choose_tempering(losses))
        inside = credible_set(probability, 0.9)
        held.append(inside[best])
        sizes.append(inside.sum())
    assert np.mean(held) >= 0.87  # 90 % less what 120 draws may miss
    assert np.mean(sizes) < 8


def test_tempering_needs_images_and_survives_ties():
    with pytest.raises(ValueError, match="at least 10"):
        choose_tempering(np.zeros((3, 4)))
    assert choose_tempering(np.ones((3, 20))) == 0


def test_posterior_rule(tmp_path):
    layers = [Layer("a", 32, 32), Layer("b", 32, 32)]
    flat, steep = np.ones((4, 40)), np.ones((4, 40))
    generator = np.random.default_rng(0)
    steep[:3] += np.array([[3.0], [2.0], [1.0]]) + 0.1 * generator.standard_normal((3, 40))
    losses = {"a": flat, "b": steep, "ranks": np.array([1, 2, 4, 8])}
    save_file(losses, tmp_path / "losses.safetensors")
    plan = ranks.posterior(layers, losses=tmp_path / "losses.safetensors", a=1.0)
    assert plan.ranks == {"a": 1, "b": 8}
    assert plan.ranks == ranks.posterior(layers, losses=losses, a=1.0).ranks
    spent = ranks.posterior(layers, Budget(total_rank=9), losses=losses, a=1.0)
    assert spent["b"] == 8
    assert spent.total_rank == 9
    with pytest.raises(ValueError, match="ascending"):
        ranks.posterior(layers, losses=losses, ranks=[1, 2])
    save_file({"a": flat, "b": steep[:2]}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"a have shape \(4, 40\), those of b \(2, 40\)"):
        ranks.posterior(layers, losses=tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="lack b"):
        ranks.posterior(layers, losses={"a": flat})
    with pytest.raises(ValueError, match=r"rank\.losses"):
        ranks.posterior(layers)


def test_trained_keeps_what_one_threshold_leaves(tmp_path):
    layers = [Layer("a", 32, 32), Layer("b", 32, 32), Layer("c", 16, 16)]
    spectra = {"a": [5.0, 4.0, 0.1], "b": [3.0, 0.2], "c": [3.5, 2.0]}
    matrices = {name: np.zeros((64 // 2 if name != "c" else 16,) * 2, dtype=np.float32) for name in spectra}
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))[0].astype(np.float32)
    for name, values in spectra.items():
        np.fill_diagonal(matrices[name], [*values, *[0.0] * (len(matrices[name]) - len(values))])
    matrices["a"] = turn @ matrices["a"] @ turn.T  # the singular values alone count
    save_file(matrices, tmp_path / "update.safetensors")
    for update in (matrices, tmp_path / "update.safetensors"):
        # worth per parameter: a .39, .25, b .14, c .38, .125
        assert ranks.trained(layers, Budget(parameters=64 + 32), update=update).ranks == {"a": 1, "b": 0, "c": 1}
        assert ranks.trained(layers, Budget(parameters=3 * 64 + 64), update=update).ranks == {"a": 2, "b": 1, "c": 2}
    with pytest.raises(ValueError, match=r"rank\.update"):
        ranks.trained(layers, Budget(total_rank=3))
    with pytest.raises(ValueError, match="nothing for c"):
        ranks.trained(layers, Budget(total_rank=3), update={"a": matrices["a"], "b": matrices["b"]})


def test_recommended_is_uniform_under_a_budget_and_sixteen_without():
    layers = [Layer("small", 8, 40), Layer("large", 64, 64)]
    budget = Budget(mean_rank=3)
    assert ranks.recommended(layers, budget).ranks == ranks.uniform(layers, budget).ranks == {"small": 3, "large": 3}
    free = ranks.recommended(layers)
    assert (free.ranks, free.rule) == ({"small": 8, "large": 16}, "recommended")


def test_only_spends_the_budget_where_it_is_told():
    layers = [Layer("blocks.0.attn.qkv", 8, 8), Layer("blocks.0.mlp.fc1", 8, 24), Layer("blocks.1.mlp.fc1", 8, 24)]
    plan = ranks.only(layers, Budget(parameters=3 * 64), pattern=r"mlp\.")
    assert plan.ranks == {"blocks.0.attn.qkv": 0, "blocks.0.mlp.fc1": 3, "blocks.1.mlp.fc1": 3}
    for pattern, match in ((None, "rank.pattern"), ("(", "no|not a regular"), ("head", "matches none")):
        with pytest.raises(ValueError, match=match):
            ranks.only(layers, Budget(total_rank=3), pattern=pattern)
