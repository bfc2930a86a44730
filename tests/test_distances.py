"""Sliced, Bures-Wasserstein and two-sample distances against closed forms; what all distances have in common."""

from __future__ import annotations

from collections.abc import Callable

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import apart
from torch import Tensor

from orca_rank.distances import (
    bures_wasserstein,
    energy_distance,
    gaussian,
    knn_two_sample,
    legacy_otdd,
    mmd,
    objectives,
    permutation_p_value,
    proxy_a_distance,
    sliced_wasserstein,
)
from orca_rank.distances.gaussian import GaussianClasses

Distance = Callable[[Tensor, Tensor], Tensor]
DIFFERENTIABLE: list[Distance] = [mmd, energy_distance, sliced_wasserstein, bures_wasserstein]
ALL: list[Distance] = [*DIFFERENTIABLE, proxy_a_distance, knn_two_sample]


def normal(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("n", "m"), [(30, 30), (30, 17), (6, 4)])
def test_one_dimension_is_the_linear_programme(n: int, m: int, p: int) -> None:
    x, y = normal(n, 1), normal(m, 1, 1) + 1
    wanted = ot.emd2([], [], torch.cdist(x, y).pow(p).numpy())
    assert sliced_wasserstein(x, y, p=p).item() == pytest.approx(wanted, rel=1e-9)


def test_sliced_translation() -> None:
    x, shift = normal(50, 4), torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    # Eight directions are two orthonormal bases of four dimensions.
    value = sliced_wasserstein(x, x + shift, projections=8).item()
    assert 4 * value == pytest.approx(float(shift.square().sum()), rel=1e-9)


def test_bures_closed_forms() -> None:
    x = normal(60, 5)
    shift = torch.full((5,), 0.7, dtype=torch.float64)
    assert bures_wasserstein(x, x).item() == pytest.approx(0, abs=1e-9)
    assert bures_wasserstein(x, x + shift).item() == pytest.approx(5 * 0.49, rel=1e-9)
    # S and c² S commute: tr S (1 − c)².
    centred = x - x.mean(0)
    trace = float(centred.square().sum() / 59)
    assert bures_wasserstein(centred, 3 * centred).item() == pytest.approx(4 * trace, rel=1e-9)
    y = normal(40, 5, 1) @ torch.diag(torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)) + shift
    wanted = ot.gaussian.bures_wasserstein_distance(x.mean(0), y.mean(0), x.T.cov(), y.T.cov()) ** 2
    assert bures_wasserstein(x, y).item() == pytest.approx(float(wanted), rel=1e-9)


def test_bures_of_few_samples_in_many_dimensions() -> None:
    x, y = normal(8, 300, dtype=torch.float32), normal(5, 300, 1, torch.float32)
    # tr (Σx^½ Σy Σx^½)^½ of empirical covariances is the nuclear norm of the product of the centred samples.
    a, b = ((z.double() - z.double().mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    shift = (x.double().mean(0) - y.double().mean(0)).square().sum()
    exact = shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")
    assert bures_wasserstein(x, y).item() == pytest.approx(float(exact), rel=1e-4)
    y.requires_grad_()
    bures_wasserstein(x, y).backward()
    assert bool(torch.isfinite(y.grad).all())


def class_distances(x: Tensor, y: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Sum-of-squares gradient in y of the distances between the Gaussians of all classes, and the distances."""
    y = y.clone().requires_grad_()
    fits = [GaussianClasses(z, label, label.bincount(), 1) for z in (x, y)]
    within, across = fits[1].own_distances(), fits[0].distances(fits[1])
    (within.square().sum() + across.square().sum()).backward()
    assert y.grad is not None
    return y.grad, torch.cat([within, across]).detach()


@pytest.mark.parametrize("d", [3, 40])
def test_batches_of_class_distances(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    label = torch.arange(60).square() % 11  # six classes, five to ten samples each
    label = torch.unique(label, return_inverse=True)[1]
    x, y = normal(60, d), 2 * normal(60, d, 1) + 0.5
    gradient, distances = class_distances(x, y, label)
    for i, j in ((0, 4), (3, 3)):
        assert distances[6 + i, j].item() == pytest.approx(
            bures_wasserstein(x[label == i], y[label == j]).item(), rel=1e-9
        )
    monkeypatch.setattr(gaussian, "BATCH_ELEMENTS", 1)
    for wanted, value in zip((gradient, distances), class_distances(x, y, label), strict=True):
        assert apart(value, wanted) < 1e-12
    for side in (0, 64):  # float32 by singular values and by Gram matrices
        monkeypatch.setattr(gaussian, "SMALL_SIDE", side)
        for wanted, value in zip((gradient, distances), class_distances(x.float(), y.float(), label), strict=True):
            assert apart(value, wanted) < 1e-4


@pytest.mark.parametrize("distance", [sliced_wasserstein, bures_wasserstein])
def test_gradients(distance: Distance) -> None:
    x, y = normal(9, 3).requires_grad_(), normal(7, 3, 1).requires_grad_()
    assert torch.autograd.gradcheck(distance, (x, y))


@pytest.mark.parametrize("distance", DIFFERENTIABLE)
@pytest.mark.parametrize("make", ["identical points", "constant feature", "wide", "float16", "bfloat16"])
def test_hard_inputs(distance: Distance, make: str) -> None:
    x, y = normal(12, 5, dtype=torch.float32), normal(9, 5, 1, torch.float32)
    if make == "identical points":
        x, y = torch.ones_like(x), torch.ones_like(y)
    elif make == "constant feature":
        x[:, 0], y[:, 0] = 1e4, 1e4
    elif make == "wide":
        x, y = normal(6, 500, dtype=torch.float32), normal(4, 500, 1, torch.float32)
    else:
        x, y = x.to(getattr(torch, make)), y.to(getattr(torch, make))
    x.requires_grad_()
    y.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = distance(x, y)
    assert value.dtype == torch.float32
    assert bool(torch.isfinite(value))
    gradients = torch.autograd.grad(value, (x, y))
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    if make == "identical points":
        assert value.item() == pytest.approx(0, abs=1e-6)
    if make in ("float16", "bfloat16"):
        wanted = distance(x.detach().float(), y.detach().float()).item()
        assert value.item() == pytest.approx(wanted, rel=1e-5)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), n=st.integers(4, 12), d=st.integers(1, 4))
def test_symmetry_and_rotation(seed: int, n: int, d: int) -> None:
    x, y = normal(n, d, seed), normal(9, d, seed + 1) + 0.5
    rotation = torch.linalg.qr(normal(d, d, seed + 2))[0]
    for distance in (mmd, energy_distance, bures_wasserstein):
        value = distance(x, y).item()
        assert distance(y, x).item() == pytest.approx(value, rel=1e-6, abs=1e-9)
        assert distance(x @ rotation + 3, y @ rotation + 3).item() == pytest.approx(value, rel=1e-6, abs=1e-9)
    assert bures_wasserstein(x, y).item() > -1e-9
    assert sliced_wasserstein(x, y).item() >= 0
    for distance, power in ((energy_distance, 1), (bures_wasserstein, 2), (sliced_wasserstein, 2)):
        assert distance(2 * x, 2 * y).item() == pytest.approx(2**power * distance(x, y).item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("distance", ALL)
def test_far_is_larger_than_near(distance: Distance) -> None:
    x, y = normal(40, 3), normal(40, 3, 1)
    near, far = distance(x, y).item(), distance(x, y + 4).item()
    assert far > near + 0.1


def test_two_sample_statistics_at_their_ends() -> None:
    x, y = normal(60, 2), normal(60, 2, 1)
    assert proxy_a_distance(x, y + 20).item() == pytest.approx(2.0)
    assert knn_two_sample(x, y + 100).item() == pytest.approx(1.0)
    assert abs(knn_two_sample(x, y).item()) < 0.2
    assert abs(proxy_a_distance(x, y).item()) < 0.7
    with pytest.raises(ValueError, match="k must lie"):
        knn_two_sample(x, y, k=120)


@pytest.mark.parametrize("statistic", [mmd, energy_distance])
def test_cached_permutations_equal_the_plain_ones(statistic: Distance) -> None:
    x, y = normal(15, 2), normal(12, 2, 1) + 0.5
    options = {"permutations": 50, "seed": 3}
    cached = permutation_p_value(x, y, statistic, **options)
    if statistic is mmd:
        h = torch.pdist(torch.cat([x, y])).square().median().item()
        assert permutation_p_value(x, y, lambda a, b: mmd(a, b, bandwidth=h), **options) == cached
    else:
        assert permutation_p_value(x, y, lambda a, b: energy_distance(a, b), **options) == cached


def test_p_values_are_uniform_under_the_null_and_small_otherwise() -> None:
    values = [permutation_p_value(normal(15, 2, s), normal(15, 2, s + 500), permutations=39) for s in range(80)]
    # P(p <= 0.25) = 0.25: between the 0.001 and 0.999 quantiles of a binomial of 80.
    assert 9 <= sum(p <= 0.25 for p in values) <= 33
    assert permutation_p_value(normal(30, 2), normal(30, 2, 1) + 3, permutations=99) == pytest.approx(0.01)


@pytest.mark.parametrize("distance", ALL)
def test_bad_input_is_named(distance: Distance) -> None:
    x = normal(9, 3)
    for y, message in (
        (normal(9, 4), "same width"),
        (torch.zeros(0, 3), "n >= 1"),
        (torch.full((9, 3), float("inf")), "27 NaN or infinite"),
        (torch.zeros(9), r"received \(9,\)"),
        (torch.zeros(9, 3, dtype=torch.long), "floating-point"),
    ):
        with pytest.raises(ValueError, match=message):
            distance(x, y)
    with pytest.raises(TypeError, match="must be a tensor"):
        distance(x, [[1.0, 2.0, 3.0]])


@pytest.mark.parametrize("name", ["OTDD", "LegacyOTDD", "MMD", "Sliced", "Bures", "L2"])
def test_objectives_fall_along_their_gradient(name: str) -> None:
    source, label = normal(60, 4, dtype=torch.float32), torch.arange(60) % 3
    objective = getattr(objectives, name)(source, label)
    target = (normal(20, 4, 1, torch.float32) + 1).requires_grad_()
    value = objective(target, torch.zeros(20, dtype=torch.long))
    value.backward()
    step = 1e-2 * value.item() / target.grad.square().sum()
    assert objective((target - step * target.grad).detach(), torch.zeros(20, dtype=torch.long)).item() < value.item()


def test_objectives_equal_their_functions() -> None:
    source, label, target = normal(30, 4), torch.zeros(30, dtype=torch.long), normal(20, 4, 1) + 1
    one = torch.zeros(20, dtype=torch.long)
    objective = objectives.MMD(source, label)
    wanted = mmd(source, target, bandwidth=objective.bandwidth, kernels=5, unbiased=False).item()
    assert objective(target, one).item() == pytest.approx(wanted, rel=1e-9)
    difference = (source.mean(0) - target.mean(0)).square().sum().item()
    assert objectives.L2(source, label)(target, one).item() == pytest.approx(difference, rel=1e-9)
    far, labels = target.requires_grad_(), torch.arange(30) % 3
    mine = objectives.LegacyOTDD(source, labels)(far, one)
    theirs = legacy_otdd(source, labels, far, one, inner="exact").value
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-12)
    assert torch.equal(torch.autograd.grad(mine, far)[0], torch.autograd.grad(theirs, far)[0])
    with pytest.raises(ValueError, match="epsilon=0: expected a positive number"):
        objectives.LegacyOTDD(source, labels, epsilon=0)
    target = target.detach()
    options = {"inner": "means", "epsilon": 0.05}
    otdd, other = (
        objectives.OTDD(source, label, backend=name, **options)(target, one) for name in ("native", "geomloss")
    )
    assert other.item() == pytest.approx(otdd.item(), rel=1e-4)
