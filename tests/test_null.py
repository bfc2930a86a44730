"""Calibrated gaps: 0 under the null, the planted value where one is planted, whatever width, number and scale."""

import functools

import numpy as np
import pytest
import torch
from scipy import stats

from orca_rank.distances import (
    bures_wasserstein,
    energy_distance,
    mmd,
    otdd,
    proxy_a_distance,
    sliced_score,
    sliced_wasserstein,
)
from orca_rank.distances.calibrate import HALVES, calibrate, family_p, standardise, whiten
from orca_rank.distances.draws import exchanges, side_draws, split_draws
from orca_rank.distances.scores import check_metric, has_fast_route, make_score
from orca_rank.distances.sliced import directions

FAST = (mmd, energy_distance, functools.partial(sliced_wasserstein, projections=16))


def squared_means(x, y):
    """A user's own metric: the squared distance of the means."""
    return (x.mean(0) - y.mean(0)).square().sum()


def sample(seed, n, d, shift=0.0, scale=1.0):
    """Anisotropic Gaussian rows; `shift` is the planted ‖t‖²/tr Σ."""
    generator = np.random.default_rng(seed)
    spread = np.exp(-2 * np.arange(d) / d)
    direction = generator.permutation(spread) / np.linalg.norm(spread)
    return scale * (generator.standard_normal((n, d)) * spread + direction * np.sqrt(shift * (spread**2).sum()))


@pytest.mark.parametrize("metric", FAST)
def test_fast_routes_are_the_metrics_themselves(metric):
    x, y = sample(0, 40, 6), sample(1, 40, 6, 0.3)
    pooled = np.concatenate([x, y])
    unit = np.sqrt((x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum()) / 2)
    score = make_score(metric, pooled, np.zeros(80, dtype=np.int64))
    source = np.repeat([[1, 0]], 40, axis=1).reshape(1, 80)
    fast = score.between([source, 1 - source], [(0, 1)])[0, 0]
    left, right = torch.from_numpy(x / unit), torch.from_numpy(y / unit)
    if metric in (mmd, energy_distance):
        assert fast == pytest.approx(float(metric(left, right)), rel=1e-5)
    else:  # whole bases of directions make the mean term of the plain estimate exact too
        many = functools.partial(sliced_wasserstein, projections=600)
        fast = make_score(many, pooled, np.zeros(80, dtype=np.int64)).between([source, 1 - source], [(0, 1)])[0, 0]
        assert fast == pytest.approx(6 * float(many(left, right)), rel=1e-4)
    assert has_fast_route(metric)
    assert not has_fast_route(bures_wasserstein)


@pytest.mark.parametrize("metric", FAST)
def test_groups_with_repeated_images_match_the_long_way(metric):
    pooled = np.concatenate([sample(0, 12, 5), sample(1, 12, 5, 1.0)])
    score = make_score(metric, pooled, np.zeros(24, dtype=np.int64))
    generator = np.random.default_rng(2)
    left = np.concatenate([generator.multinomial(12, np.full(12, 1 / 12)), np.zeros(12, dtype=np.int64)])[None]
    right = np.concatenate([np.zeros(12, dtype=np.int64), generator.multinomial(12, np.full(12, 1 / 12))])[None]
    value = score.between([left, right], [(0, 1)])[0, 0]
    rows = pooled - pooled.mean(0)
    rows /= np.sqrt((pooled[:12].var(0, ddof=1).sum() + pooled[12:].var(0, ddof=1).sum()) / 2)
    a, b = np.repeat(np.arange(24), left[0]), np.repeat(np.arange(24), right[0])
    if score.unbiased:
        squared = ((rows[:, None] - rows[None]) ** 2).sum(-1)
        h = np.median(squared[np.triu_indices(24, 1)])
        kernel = np.exp(-squared / h) if metric is mmd else -np.sqrt(squared)

        def mean(i, j):
            return np.mean([kernel[p, q] for p in i for q in j if p != q])

        assert value == pytest.approx(mean(a, a) + mean(b, b) - 2 * mean(a, b), rel=0.02 if metric is mmd else 1e-9)
    else:
        assert value == pytest.approx(sliced_by_sorting(rows[a], rows[b], 16), rel=1e-5)
        same = score.between([left, left], [(0, 1)])[0, 0]
        assert same == pytest.approx(0, abs=1e-12)


def sliced_by_sorting(x, y, projections, seed=0):
    """d times the mean squared W₂ of the centred projections, every group projected and sorted anew, + ‖m_x − m_y‖²."""
    theta = directions(x.shape[1], projections, seed, torch.from_numpy(x)).numpy()
    left, right = (np.sort((z - z.mean(0)) @ theta, axis=0) for z in (x, y))
    return x.shape[1] * np.mean((left - right) ** 2) + ((x.mean(0) - y.mean(0)) ** 2).sum()


@pytest.mark.parametrize("metric", FAST)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_many_draws_at_once_are_the_draws_one_by_one(metric, shift, monkeypatch):
    monkeypatch.setattr(sliced_score, "ELEMENTS", 500)  # a few draws at a time
    digits = {"rel": 1e-5} if metric is FAST[2] else {"rel": 1e-10, "abs": 1e-12}  # it sorts in float32
    n, labels = 24, np.arange(48) % 3
    pooled = np.concatenate([sample(0, n, 7), sample(1, n, 7, shift)])
    score = make_score(metric, pooled, labels)
    halves = split_draws(labels, 2, 9, 1)[1]
    together = score.between(halves, HALVES)
    assert together.shape == (5, 4)  # the halves and four resamples of them
    alone = [score.between([half[draw : draw + 1] for half in halves], HALVES)[0] for draw in range(5)]
    assert together == pytest.approx(np.array(alone), **digits)
    sides = exchanges(n, 12, 3)
    exchanged = score.exchanged(sides)
    long_way = score.between([sides.astype(int), 1 - sides.astype(int)], [(0, 1)])[:, 0]
    assert exchanged == pytest.approx(long_way, **digits)
    if metric is FAST[2]:
        spread = (pooled[:n].var(0, ddof=1).sum() + pooled[n:].var(0, ddof=1).sum()) / 2
        rows = (pooled - pooled.mean(0)) / np.sqrt(spread)
        for draw in (0, 4):
            picked = [rows[np.repeat(np.arange(2 * n), half[draw])] for half in halves]
            direct = [sliced_by_sorting(picked[i], picked[j], 16) for i, j in HALVES]
            assert together[draw] == pytest.approx(np.array(direct), **digits)
        direct = [sliced_by_sorting(rows[side], rows[~side], 16) for side in sides]
        assert exchanged == pytest.approx(np.array(direct), **digits)


def test_draws_are_of_whole_images_and_of_their_own_side():
    labels = np.concatenate([np.arange(20) % 4, 4 + np.arange(20) % 3])
    first, *_ = split_draws(labels, 3, 7, 0)
    for half, side in zip(first, (slice(20), slice(20), slice(20, None), slice(20, None)), strict=True):
        assert half.shape == (4, 40)  # 7 resamples over 3 halvings: 3, 2 and 2
        assert (half.sum(1) == 10).all() and (half[:, side].sum(1) == 10).all()
        assert set(half[0]) == {0, 1}
        assert not (half[1:] > 0)[:, half[0] == 0].any()  # a resample holds members of its half alone
    assert (first[0][0] + first[1][0] == (np.arange(40) < 20)).all()
    counts = np.bincount(labels[first[0][0] > 0], minlength=4)
    assert (counts[:4] >= 2).all() and (counts[:4] <= 3).all()  # 5 of each class
    for side in side_draws(20, 6, 0):
        assert side.shape == (7, 40) and (side.sum(1) == 20).all()
    marked = exchanges(20, 6, 0)
    assert marked[0].tolist() == [True] * 20 + [False] * 20 and (marked.sum(1) == 20).all()
    assert len(np.unique(marked, axis=0)) == 7


@pytest.mark.parametrize("metric", [*FAST, bures_wasserstein, squared_means])
@pytest.mark.parametrize("d", [64, 256, 1024])
def test_mean_gap_under_the_null(metric, d):
    options = {"bootstrap": 0, "permutations": 0, "splits": 2}
    seeds = range(200_000, 200_080 if metric is bures_wasserstein else 200_200, 2)
    found = [calibrate(metric, sample(s, 40, d), sample(s + 1, 40, d), **options).value for s in seeds]
    assert abs(np.mean(found)) <= 2 * np.std(found, ddof=1) / np.sqrt(len(found))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize(("d", "n"), [(64, 100), (64, 400), (256, 100), (256, 400), (1024, 100), (1024, 400)])
@pytest.mark.parametrize("metric", [FAST[2], squared_means])
def test_a_planted_mean_shift_is_recovered(metric, d, n, scale):
    options = {"bootstrap": 0, "permutations": 0, "splits": 4}
    found = [
        calibrate(metric, sample(2 * s, n, d, 0.0, scale), sample(2 * s + 1, n, d, 0.3, scale), **options).value
        for s in range(8)
    ]
    assert np.mean(found) == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("metric", FAST)
def test_scale_and_shift_change_nothing(metric):
    x, y = sample(0, 60, 10), sample(1, 60, 10, 0.4)
    plain = calibrate(metric, x, y, bootstrap=20, permutations=19)
    moved = calibrate(metric, 250 * x + 3, 250 * y + 3, bootstrap=20, permutations=19)
    assert moved[:5] == pytest.approx(plain[:5], rel=1e-3)
    if metric is not FAST[2]:
        turn = np.linalg.qr(np.random.default_rng(5).standard_normal((10, 10)))[0]
        assert calibrate(metric, x @ turn, y @ turn, bootstrap=0, permutations=0).value == pytest.approx(plain.value)


def test_permutation_p_values_are_uniform_under_the_null():
    options = {"bootstrap": 0, "permutations": 99}
    p = [calibrate(mmd, sample(2 * s, 24, 8), sample(2 * s + 1, 24, 8), **options).p for s in range(120)]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert calibrate(mmd, sample(0, 24, 8), sample(1, 24, 8, 2.0), **options).p == pytest.approx(0.01)


@pytest.mark.parametrize("metric", FAST[::2])
def test_bootstrap_intervals_cover_the_planted_shift(metric):
    samples = [(sample(2 * s, 60, 12), sample(2 * s + 1, 60, 12, 0.5)) for s in range(40)]
    gaps = [calibrate(metric, x, y, bootstrap=60, permutations=0, splits=4) for x, y in samples]
    truth = 0.5 if metric is not mmd else TRUE_MMD
    # 95 % of 40 less three standard deviations and what 60 draws cost
    assert sum(gap.low <= truth <= gap.high for gap in gaps) >= 31
    spread = np.std([gap.value for gap in gaps], ddof=1)  # known to about 11 % from 40 samples
    assert np.mean([gap.high - gap.low for gap in gaps]) == pytest.approx(2 * 1.96 * spread, rel=0.35)


def large_mmd():
    return calibrate(mmd, sample(901, 1500, 12), sample(902, 1500, 12, 0.5), bootstrap=0, permutations=0).value


TRUE_MMD = large_mmd()


def test_family_p_is_the_largest_over_layers():
    generator = np.random.default_rng(0)
    null = generator.standard_normal((5, 400))
    observed = np.array([0.0, 1.0, 2.0, 3.0, 9.0])
    family = family_p(observed, null)
    single = (1 + (null >= observed[:, None]).sum(1)) / 401
    assert (family >= single - 1e-12).all()
    assert family[-1] == pytest.approx(1 / 401)
    assert (np.diff(family) <= 0).all()
    # Under the null the smallest family p-value is uniform or larger: 5 % stays 5 %.
    smallest = [family_p(d[:, 0], d[:, 1:]).min() for d in generator.standard_normal((300, 5, 100))]
    assert np.mean(np.array(smallest) <= 0.05) < 0.1
    # A layer's scale does not matter.
    assert family_p(observed * 7, null * 7) == pytest.approx(family)


def test_labels_reach_otdd_and_stratify_the_halves():
    generator = np.random.default_rng(0)
    labels = np.arange(40) % 4
    centres = generator.standard_normal((4, 6)) * 3
    x = centres[labels] + generator.standard_normal((40, 6))
    y = centres[labels] + generator.standard_normal((40, 6)) + 4.0
    metric = functools.partial(otdd, inner="gaussian", outer="exact")
    gap = calibrate(metric, x, y, labels, labels, splits=2, bootstrap=0, permutations=0)
    spread = (x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum()) / 2
    assert gap.value == pytest.approx(2 * 6 * 16.0 / spread, rel=0.15)  # a translation by t: 2 ‖t‖²


def test_images_with_labels_do_not_change_sides():
    labels = np.arange(24) % 3
    x, y = sample(0, 24, 8), sample(1, 24, 8)
    options = {"splits": 1, "bootstrap": 0, "permutations": 9}
    labelled = calibrate(functools.partial(otdd, outer="exact"), x, y, labels, labels, **options)
    assert np.isnan(labelled.p)
    assert len(labelled.null) == 0
    alone = functools.partial(otdd, inner="none", outer="exact")
    p = [calibrate(alone, sample(2 * s, 16, 4), sample(2 * s + 1, 16, 4), labels[:16], labels[:16], **options).p
         for s in range(60)]  # fmt: skip
    counts = np.bincount(np.round(np.array(p) * 10).astype(int), minlength=11)[1:]
    assert counts.sum() == 60
    assert stats.chisquare(counts).pvalue > 0.01  # each tenth is as likely


def test_a_metric_is_refused_options_that_it_does_not_take():
    check_metric("mmd", functools.partial(mmd, kernels=3))
    check_metric("mine", functools.partial(lambda x, y, **options: 0.0, anything=1))
    with pytest.raises(ValueError, match=r"sliced does not take foo; its options are.*projections"):
        check_metric("sliced", functools.partial(sliced_wasserstein, foo=1))
    assert not has_fast_route(functools.partial(mmd, unbiased=False))


@pytest.mark.parametrize("n", [12, 32, 64])
def test_a_whitened_gap_is_seen_with_few_images(n):
    x, y = sample(0, n, 128), sample(1, n, 128, 20.0)
    gap = calibrate(mmd, *whiten(x, y), bootstrap=0, permutations=39)
    assert gap.p == pytest.approx(1 / 40)
    assert gap.value > 0.03


def test_unequal_sides_are_cut_and_proxy_a_works():
    gap = calibrate(proxy_a_distance, sample(0, 60, 5), sample(1, 33, 5, 9.0), splits=1, bootstrap=0, permutations=0)
    assert gap.value > 1.2
    assert np.isnan(gap.p)
    assert np.isnan(gap.low)


def test_variants():
    x, y = sample(0, 50, 8), sample(1, 50, 8, 1.0)
    for transform in (standardise, whiten):
        left, right = transform(x, y)
        pooled = np.concatenate([left, right])
        assert pooled.mean(0) == pytest.approx(0, abs=1e-9)
        assert pooled.var(0) == pytest.approx(1, rel=1e-6)
    assert np.cov(pooled.T, ddof=0) == pytest.approx(np.eye(8), abs=1e-9)
    assert whiten(x, y, 3)[0].shape == (50, 3)
    x[:, 2] = y[:, 2] = 1.5
    assert standardise(x, y)[0][:, 2] == pytest.approx(0)


def test_bad_input():
    x = sample(0, 20, 4)
    with pytest.raises(ValueError, match="width"):
        calibrate(mmd, x, sample(1, 20, 5))
    with pytest.raises(ValueError, match="at least 8"):
        calibrate(mmd, x[:5], x)
    with pytest.raises(ValueError, match="NaN"):
        calibrate(mmd, x, np.full((20, 4), np.nan))
    with pytest.raises(ValueError, match="do not vary"):
        calibrate(mmd, np.ones((20, 4)), np.ones((20, 4)))
    with pytest.raises(ValueError, match="splits"):
        calibrate(sliced_wasserstein, x, x, splits=0)
