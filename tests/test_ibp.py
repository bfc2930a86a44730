"""The Indian buffet process against enumeration, and the three priors against their closed forms."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from orca_rank import ranks
from orca_rank.measuring.records import Gap
from orca_rank.ranks import Budget, Layer
from orca_rank.ranks.ibp import (
    beta_bernoulli_law,
    concentration,
    left_ordered,
    log_prob_ibp,
    log_prob_left_ordered,
    poisson_law,
    sample_ibp,
    stick_law,
)


def matrices(customers, dishes, in_order):
    """All binary matrices without empty columns whose columns are ordered by first row, or left-ordered."""
    histories = [h for h in itertools.product((1, 0), repeat=customers) if any(h)]  # largest binary number first
    if not in_order:
        return [
            np.array(c).reshape(dishes, customers).T for c in itertools.combinations_with_replacement(histories, dishes)
        ]
    found = itertools.product(histories, repeat=dishes)
    return [
        np.array(c).reshape(dishes, customers).T
        for c in found
        if [h.index(1) for h in c] == sorted(h.index(1) for h in c)
    ]


@pytest.mark.parametrize("alpha", [0.3, 0.8])
@pytest.mark.parametrize(("log_prob", "in_order"), [(log_prob_ibp, True), (log_prob_left_ordered, False)])
def test_probabilities_sum_to_one(alpha, log_prob, in_order):
    customers, most = 2, 7
    total = sum(math.exp(log_prob(z, alpha)) for k in range(most + 1) for z in matrices(customers, k, in_order))
    # K₊ ~ Poisson(α H_N): what is left out is its tail.
    tail = stats.poisson(alpha * 1.5).sf(most)
    assert total == pytest.approx(1 - tail, abs=1e-12)


def test_probability_is_that_of_the_sampling_steps():
    # Two customers, α = 1.5: 2 dishes first, then the second takes the first of them and one new dish.
    z = [[1, 1, 0], [1, 0, 1]]
    alpha = 1.5
    steps = stats.poisson(alpha).pmf(2) * 0.5 * 0.5 * stats.poisson(alpha / 2).pmf(1)
    assert math.exp(log_prob_ibp(z, alpha)) == pytest.approx(steps, rel=1e-12)
    # An empty column counts for nothing, and no dish at all has probability exp(−α H_N).
    assert log_prob_ibp([[1, 0, 1, 0], [1, 0, 0, 1]], alpha) == pytest.approx(log_prob_ibp(z, alpha))
    assert log_prob_ibp(np.zeros((3, 0)), alpha) == pytest.approx(-alpha * (1 + 1 / 2 + 1 / 3))


def test_samples_are_ordered_and_have_the_right_frequencies():
    draws = [sample_ibp(2, 0.7, seed=seed) for seed in range(4000)]
    for z in draws[:200]:
        assert set(np.unique(z)) <= {0, 1}
        assert z.any(axis=0).all()
        first = z.argmax(axis=0)
        assert (np.diff(first) >= 0).all()
    counts = {}
    for z in draws:
        counts[z.tobytes() + bytes([z.shape[1]])] = counts.get(z.tobytes() + bytes([z.shape[1]]), 0) + 1
    for z in (m for k in range(3) for m in matrices(2, k, True)):
        expected = 4000 * math.exp(log_prob_ibp(z, 0.7))
        seen = counts.get(z.astype(np.int64).tobytes() + bytes([z.shape[1]]), 0)
        assert abs(seen - expected) < 4.5 * math.sqrt(expected) + 1
    assert (sample_ibp(5, 3.0, seed=1) == sample_ibp(5, 3.0, seed=1)).all()


def test_mean_number_of_dishes():
    rows = np.array([sample_ibp(6, 2.0, seed=seed).sum(axis=1) for seed in range(400)])
    # Every customer takes Poisson(α) dishes.
    assert np.abs(rows.mean(axis=0) - 2.0).max() < 4.5 * math.sqrt(2.0 / 400)


def test_left_ordered_form():
    z = np.array([[0, 1, 0, 1], [1, 0, 0, 1]])
    assert left_ordered(z).tolist() == [[1, 1, 0], [1, 0, 1]]
    assert (left_ordered(left_ordered(z)) == left_ordered(z)).all()
    assert left_ordered(np.zeros((2, 3))).shape == (2, 0)
    shuffled = z[:, [3, 0, 2, 1]]
    assert log_prob_left_ordered(shuffled, 1.0) == log_prob_left_ordered(z, 1.0)


@pytest.mark.parametrize("call", [lambda: sample_ibp(0, 1.0, seed=0), lambda: sample_ibp(2, 0.0, seed=0),
                                  lambda: log_prob_ibp([[2]], 1.0), lambda: log_prob_ibp([1, 0], 1.0),
                                  lambda: log_prob_ibp([[1]], -1.0)])  # fmt: skip
def test_bad_input(call):
    with pytest.raises(ValueError, match=r"n must|alpha|matrix"):
        call()


ALPHA, LOW, HIGH = np.array([0.0, 0.5, 3.0]), np.zeros(3, dtype=int), np.full(3, 60)


def test_priors_have_their_closed_forms():
    k = np.arange(61)
    for law in (poisson_law, stick_law, beta_bernoulli_law):
        assert law(ALPHA, LOW, HIGH).sum(axis=1) == pytest.approx(1)
        assert law(ALPHA, LOW, HIGH)[0, 0] == 1  # α = 0: rank 0
        truncated = law(ALPHA, LOW + 2, np.array([2, 5, 60]))
        assert truncated[0, 2] == truncated.sum() / 3 == pytest.approx(1)
        assert truncated[1, 6:].sum() == 0
    assert poisson_law(ALPHA, LOW, HIGH)[2] == pytest.approx(stats.poisson(3.0).pmf(k), abs=1e-12)
    stick = stick_law(ALPHA, LOW, HIGH)[2]
    survival = stick[::-1].cumsum()[::-1]
    assert survival[:20] == pytest.approx(0.75 ** k[:20], abs=1e-6)  # P(r >= k) = (α/(1+α))^k
    assert stick @ k == pytest.approx(3.0, abs=1e-4)
    finite = beta_bernoulli_law(ALPHA, LOW, HIGH, np.full(3, 12))
    assert finite[2] @ k == pytest.approx(3.0 / (1 + 3.0 / 12))  # E[r] = α/(1 + α/K)


def test_stick_law_is_the_one_dylora_draws_from():
    adapters = pytest.importorskip("orca_rank.adapters.dylora")
    ours = stick_law(np.array([3.0]), np.array([1]), np.array([8]))[0, 1:]
    assert ours == pytest.approx(np.asarray(adapters.survival_law(3.0, 1, 8)))


def test_concentration_has_the_asked_mean():
    gaps = np.array([-1.0, 0.0, 1.0, 3.0])
    assert concentration(gaps, 4.0) == pytest.approx([0, 0, 4, 12])
    assert concentration(gaps, 4.0, 2.0).mean() == pytest.approx(4.0)
    assert concentration(np.zeros(2), 4.0) == pytest.approx([4, 4])


def layers(*values):
    return [Layer(f"l{i}", 64, 64, {"mmd": Gap(float(v))}) for i, v in enumerate(values)]


def test_rules_with_a_given_mean_need_no_budget():
    two = layers(1, 3)
    assert list(ranks.ibp_count(two, a=4).ranks.values()) == [2, 6]
    assert list(ranks.ibp_count(two, a=4.2, statistic="mode").ranks.values()) == [2, 6]  # floor(α)
    high = ranks.ibp_count(two, a=4, statistic="quantile", quantile=0.9)
    assert list(high.ranks.values()) == [int(stats.poisson(2).ppf(0.9)), int(stats.poisson(6).ppf(0.9))]
    drawn = [ranks.ibp_count(two, a=4, statistic="sample", seed=s)["l1"] for s in range(300)]
    assert np.mean(drawn) == pytest.approx(6, abs=4.5 * math.sqrt(6 / 300))
    with pytest.raises(ValueError, match=r"rank\.a"):
        ranks.ibp_count(two)
    with pytest.raises(ValueError, match="statistic"):
        ranks.ibp_count(two, a=4, statistic="median")


def test_the_mean_is_rounded_by_largest_remainder():
    # Means 1.4, 1.4, 1.4, 1.8: rounding each alone gives 1, 1, 1, 2 in all 5, their sum is 6.
    four = layers(7, 7, 7, 9)
    assert list(ranks.ibp_count(four, a=1.5).ranks.values()) == [2, 1, 1, 2]
    assert ranks.ibp_count(layers(*[1] * 10), a=2.5).total_rank == 25


@pytest.mark.parametrize("rule", [ranks.ibp_count, ranks.ibp_stick, ranks.beta_bernoulli])
def test_a_given_mean_keeps_to_the_budget_or_says_so(rule):
    two = layers(1, 3)
    plan = rule(two, Budget(mean_rank=8), a=2)
    assert plan.budget == Budget(mean_rank=8)
    assert plan.total_rank == rule(two, a=2).total_rank <= 4
    with pytest.raises(ValueError, match=r"a=20 asks for \d+ ranks, the budget allows 8: lower rank\.a"):
        rule(two, Budget(mean_rank=4), a=20)
    with pytest.raises(ValueError, match=r"asks for \d+ parameters, the budget allows 1000"):
        rule(two, Budget(parameters=1000), a=20)
    for a in (float("inf"), float("nan"), -1):
        with pytest.raises(ValueError, match="a, the mean prior rank, must be a finite number >= 0"):
            rule(two, a=a)


def test_no_rank_of_the_finite_prior_exceeds_its_features():
    two = layers(1, 3)
    assert ranks.beta_bernoulli(two, Budget(mean_rank=10), features=4).ranks == {"l0": 4, "l1": 4}
    assert ranks.beta_bernoulli(two, Budget(mean_rank=10, r_max=3), features=4).ranks == {"l0": 3, "l1": 3}
    assert max(ranks.beta_bernoulli(two, a=60, features=4, statistic="quantile").ranks.values()) == 4
    plan = ranks.beta_bernoulli(two, Budget(mean_rank=2), features=4)
    assert plan.budget == Budget(mean_rank=2)
    assert plan.total_rank == 4
    with pytest.raises(ValueError, match="features"):
        ranks.beta_bernoulli(two, Budget(mean_rank=8, r_min=5), features=4)


def test_the_mode_of_the_stick_law_is_refused():
    law = stick_law(np.array([0.5, 50.0]), np.array([0, 2]), np.array([60, 60]))
    assert law.argmax(axis=1).tolist() == [0, 2]  # r_min whatever α
    for options in ({"a": 4}, {"budget": Budget(total_rank=8)}):
        with pytest.raises(ValueError, match=r"mode of ibp_stick is r_min"):
            ranks.ibp_stick(layers(1, 3), **options, statistic="mode")


STATISTICS = {
    ranks.ibp_count: ("mean", "mode", "quantile", "sample"),
    ranks.ibp_stick: ("mean", "quantile", "sample"),
    ranks.beta_bernoulli: ("mean", "mode", "quantile", "sample"),
}


@pytest.mark.parametrize(("rule", "statistic"), [(rule, name) for rule, names in STATISTICS.items() for name in names])
def test_rules_spend_the_budget(rule, statistic):
    many = layers(0, 1, 2, 3, 4)
    budget = Budget(total_rank=30)
    plan = rule(many, budget, statistic=statistic)
    assert plan.total_rank == 30
    assert plan["l0"] == 0
    if statistic == "mean":
        assert list(plan.ranks.values()) == [0, 3, 6, 9, 12]
