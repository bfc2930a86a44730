"""OTDD against reference implementations, closed forms, the linear programme and finite differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import apart
from sklearn.datasets import load_digits
from torch import Tensor

from orca_rank.distances import OTDDSource, legacy_otdd, otdd

REFERENCE = Path(__file__).parent / "reference"
CASES = ["gm_d2_k3v2", "digits_pca8_noise_k10v10", "gm_orca_singleclass_d32_k10v1", "identical_d10_k4",
         "translation_d10_k4"]  # fmt: skip
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def case(name: str) -> tuple[Data, dict[str, Any], Any]:
    with np.load(REFERENCE / f"{name}.npz") as stream:
        arrays = dict(stream)
    values = json.loads((REFERENCE / f"{name}.json").read_text())["values"]
    x, x_label, y, y_label = (torch.tensor(arrays[key]) for key in ("X1", "Y1", "X2", "Y2"))
    return (x, x_label, y, y_label), values, arrays


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def classes(n: int, m: int, d: int, seed: int = 0, k: int = 2, dtype: torch.dtype = torch.float64) -> Data:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(size, d, generator=generator, dtype=dtype) for size in (n, m))
    x_label, y_label = torch.arange(n) % k, torch.arange(m) % k
    return x + x_label[:, None], x_label, y - y_label[:, None], y_label


@pytest.mark.parametrize("name", CASES)
def test_exact_is_the_linear_programme(name: str) -> None:
    data, values, arrays = case(name)
    for inner, key in (("gaussian", "emd_otdd2_gauss"), ("exact", "emd_otdd2_exact"), ("none", "emd_w2sq_unlabelled")):
        assert otdd(*data, inner=inner, outer="exact").value.item() == pytest.approx(values[key], rel=1e-6, abs=1e-9)
    result = otdd(*data, outer="exact")
    assert apart(result.label_distances, torch.tensor(arrays["W12_gauss_closed"])) < 1e-6
    assert result.marginal_error < 1e-9


@pytest.mark.parametrize("epsilon", ["0.1", "1.0", "10.0"])
@pytest.mark.parametrize("name", CASES)
def test_converged_sinkhorn(name: str, epsilon: str) -> None:
    data, values, _ = case(name)
    result = otdd(*data, epsilon=float(epsilon), epsilon_units="half_cost")
    wanted = 2 * values[f"conv_gauss_eps{epsilon}"]["divergence"]
    assert result.value.item() == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert result.marginal_error <= 5e-4
    assert result.epsilon == 2 * float(epsilon)


LEGACY = ["gaussian_approx_eps0.1_ideb0_double", "gaussian_approx_eps0.1_ideb0_single",
          "gaussian_approx_eps10.0_ideb0_double", "exact_eps0.1_ideb1_double"]  # fmt: skip


@pytest.mark.parametrize("key", LEGACY)
@pytest.mark.parametrize("name", CASES)
def test_legacy_returns_the_numbers_of_the_reference(name: str, key: str) -> None:
    (x, x_label, y, y_label), values, _ = case(name)
    if key.startswith("exact") and name.startswith("digits"):
        pytest.skip("a second of pairs; the other cases cover it")
    dtype = torch.float32 if "single" in key else torch.float64
    epsilon = float(key.split("eps")[1].split("_")[0])
    inner = "gaussian" if "gaussian" in key else "exact"
    value = legacy_otdd(x.to(dtype), x_label, y.to(dtype), y_label, inner=inner, epsilon=epsilon).value
    assert value.item() == pytest.approx(values[f"ms_{key}"], rel=1e-3, abs=1e-4)


def test_legacy_inner_bias_and_gradient() -> None:
    (x, x_label, y, y_label), values, arrays = case("gm_d2_k3v2")
    biased = legacy_otdd(x, x_label, y, y_label, inner="exact", inner_debias=False, epsilon=1.0).value.item()
    assert biased == pytest.approx(values["ms_exact_eps1.0_ideb0_double"], rel=1e-9)
    y = y.clone().requires_grad_()
    legacy_otdd(x, x_label, y, y_label, inner="exact").value.backward()
    assert apart(y.grad, torch.tensor(arrays["ms_grad_X2_exact_ideb1"])) < 1e-8


@pytest.mark.parametrize("name", ["gm_d2_k3v2", "digits_pca8_noise_k10v10", "gm_orca_singleclass_d32_k10v1"])
def test_default_is_near_the_linear_programme_in_value_and_gradient(name: str) -> None:
    (x, x_label, y, y_label), values, arrays = case(name)
    y = y.clone().requires_grad_()
    result = otdd(x, x_label, y, y_label, detach_labels=True)
    result.value.backward()
    assert result.value.item() == pytest.approx(values["emd_otdd2_gauss"], rel=2e-3)
    assert cosine(y.grad, torch.tensor(arrays["emd_grad_X2_gauss_Wdetached"])) > 0.999
    y.grad = None
    otdd(x, x_label, y, y_label, outer="exact", detach_labels=True).value.backward()
    assert apart(y.grad, torch.tensor(arrays["emd_grad_X2_gauss_Wdetached"])) < 1e-7


@pytest.mark.parametrize("outer", ["exact", "sinkhorn"])
@pytest.mark.parametrize("inner", ["gaussian", "exact", "means", "none"])
def test_gradients_are_finite_differences(inner: str, outer: str) -> None:
    x, x_label, y, y_label = classes(9, 7, 3)
    options = {"inner": inner, "outer": outer, "epsilon": 0.4, "epsilon_units": "half_cost", "tolerance": 1e-10}
    x.requires_grad_()
    y.requires_grad_()
    otdd(x, x_label, y, y_label, **options).value.backward()
    step = 1e-5
    for z in (x, y):
        for position in ((0, 0), (3, 1), (6, 2)):
            with torch.no_grad():
                values = []
                for sign in (1, -1):
                    z[position] += sign * step
                    values.append(otdd(x, x_label, y, y_label, **options).value.item())
                    z[position] -= sign * step
            assert (values[0] - values[1]) / (2 * step) == pytest.approx(z.grad[position].item(), rel=1e-4, abs=1e-6)


def test_gradient_through_labels_differs_from_detached() -> None:
    x, x_label, y, y_label = classes(20, 20, 3)
    gradients = []
    for detach in (False, True):
        z = y.clone().requires_grad_()
        otdd(x, x_label, z, y_label, detach_labels=detach).value.backward()
        gradients.append(z.grad)
    assert cosine(*gradients) < 0.999
    # A single target class: W is a constant of the transport and drops out of the plan.
    z = y.clone().requires_grad_()
    otdd(x, x_label, z, torch.zeros(20, dtype=torch.long), detach_labels=True).value.backward()
    w = y.clone().requires_grad_()
    otdd(x, None, w, None, inner="none").value.backward()
    assert cosine(z.grad, w.grad) > 0.999


@pytest.mark.parametrize("outer", ["sinkhorn", "exact"])
@pytest.mark.parametrize("inner", ["gaussian", "exact", "means", "none"])
def test_translation(inner: str, outer: str) -> None:
    x, label, _, _ = classes(30, 1, 4)
    shift = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    wanted = (1 if inner == "none" else 2) * float(shift.square().sum())
    assert otdd(x, label, x + shift, label, inner=inner, outer=outer).value.item() == pytest.approx(wanted, rel=1e-6)
    assert otdd(x, label, x, label, inner=inner, outer=outer).value.item() == pytest.approx(0, abs=1e-9)


def test_sliced_with_all_directions_gives_the_translation() -> None:
    x, label, _, _ = classes(40, 1, 4)
    shift = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    y = (x + shift).requires_grad_()
    # The four class means span a plane: 4 + 2 coordinates, so that 60 directions are ten orthonormal bases.
    result = otdd(x, label, y, label, inner="means", outer="sliced", projections=60)
    assert result.value.item() == pytest.approx(2 * float(shift.square().sum()), rel=1e-6)
    result.value.backward()
    assert apart(y.grad.sum(0), 4 * shift) < 1e-5
    assert otdd(x, label, x, label, outer="sliced").value.item() == pytest.approx(0, abs=1e-9)


def test_single_class_closed_forms() -> None:
    x, x_label, y, _ = classes(24, 16, 3)
    one = torch.full((16,), 7)
    plain = otdd(x, None, y, None, inner="none", outer="exact").value.item()
    result = otdd(x, x_label, y, one, inner="exact", outer="exact")
    share = torch.bincount(x_label).double() / len(x_label)
    assert result.value.item() == pytest.approx(plain + float(share @ result.label_distances[:, 0]), rel=1e-9)
    both = otdd(x, torch.zeros(24, dtype=torch.long), y, one, inner="exact", outer="exact").value.item()
    assert both == pytest.approx(2 * plain, rel=1e-9)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 3), d=st.integers(1, 5))
def test_invariances(seed: int, k: int, d: int) -> None:
    x, x_label, y, y_label = classes(14, 11, d, seed, k)
    value = otdd(x, x_label, y, y_label).value.item()
    near = pytest.approx(value, rel=2e-3, abs=1e-6)
    assert value > -1e-6
    assert otdd(y, y_label, x, x_label).value.item() == near
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(14, generator=generator)
    assert otdd(x[order], x_label[order], y, 100 - 3 * y_label).value.item() == near
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    assert otdd(x @ rotation + 5, x_label, y @ rotation + 5, y_label).value.item() == near
    assert otdd(3 * x, x_label, 3 * y, y_label).value.item() == pytest.approx(9 * value, rel=2e-3, abs=1e-6)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_gaussian_inner_is_a_lower_bound(seed: int) -> None:
    data = classes(20, 18, 3, seed)
    gaussian = otdd(*data, inner="gaussian", outer="exact", ddof=0)
    exact = otdd(*data, inner="exact", outer="exact")
    assert bool((gaussian.label_distances <= exact.label_distances + 1e-9).all())
    assert gaussian.value.item() <= exact.value.item() + 1e-9
    assert otdd(*data, inner="means", outer="exact").value.item() <= gaussian.value.item() + 1e-9


def test_prepared_source_gives_the_same() -> None:
    x, x_label, y, y_label = classes(40, 30, 5, k=3)
    source = OTDDSource(x, x_label)
    y.requires_grad_()
    prepared = source.distance(y, y_label)
    prepared.value.backward()
    first, y.grad = y.grad, None
    direct = otdd(x, x_label, y, y_label, epsilon=source.epsilon / 2, epsilon_units="half_cost")
    direct.value.backward()
    assert prepared.value.item() == pytest.approx(direct.value.item(), rel=1e-6)
    assert cosine(first, y.grad) > 1 - 1e-5


def value_and_gradients(data: Data, **options: Any) -> tuple[Tensor, Tensor]:
    x, x_label, y, y_label = data
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    result = otdd(x, x_label, y, y_label, **options)
    result.value.backward()
    assert x.grad is not None and y.grad is not None
    return result.value.detach(), torch.cat([x.grad, y.grad])


@pytest.mark.parametrize(
    ("epsilon", "dtype", "tolerance", "wanted"), [(0.05, torch.float64, 1e-6, 1e-5), (0.01, torch.float32, 5e-4, 5e-3)]
)
@pytest.mark.parametrize("inner", ["gaussian", "exact", "means", "none"])
def test_geomloss_gives_the_same(
    inner: str, epsilon: float, dtype: torch.dtype, tolerance: float, wanted: float
) -> None:
    data = classes(40, 30, 5, k=3, dtype=dtype)
    options: dict[str, Any] = {"inner": inner, "epsilon": epsilon, "tolerance": tolerance}
    value, gradients = value_and_gradients(data, **options)
    other, others = value_and_gradients(data, backend="geomloss", **options)
    assert other.item() == pytest.approx(value.item(), rel=wanted / 5)
    assert apart(others, gradients) < wanted


def test_geomloss_closed_forms() -> None:
    x, label, _, _ = classes(30, 1, 4)
    shift = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    result = otdd(x, label, x + shift, label, backend="geomloss")
    assert result.value.item() == pytest.approx(2 * float(shift.square().sum()), rel=1e-4)
    assert result.marginal_error <= 5e-4
    assert otdd(x, label, x, label, backend="geomloss").value.item() == pytest.approx(0, abs=1e-4)
    same = torch.ones(6, 3)
    assert otdd(same, label[:6], same, label[:6], backend="geomloss").value.item() == pytest.approx(0, abs=1e-5)


def test_geomloss_leaves_the_gradient_mode_alone() -> None:
    x, x_label, y, y_label = classes(12, 9, 3)
    y.requires_grad_()
    with torch.no_grad():
        value = otdd(x, x_label, y, y_label, backend="geomloss").value
        assert not torch.is_grad_enabled()
    assert not value.requires_grad


def test_geomloss_source() -> None:
    x, x_label, y, y_label = classes(40, 30, 5, k=3)
    gradients = []
    for backend in ("native", "geomloss"):
        z = y.clone().requires_grad_()
        source = OTDDSource(x, x_label, epsilon=0.05, backend=backend, tolerance=1e-6)
        source.distance(z, y_label).value.backward()
        gradients.append(z.grad)
    assert apart(gradients[1], gradients[0]) < 1e-5


def test_geomloss_without_keops_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    data = classes(12, 9, 3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"12 x 9 samples .* pip install pykeops"):
        otdd(*data, backend="geomloss_online")
    monkeypatch.setattr("orca_rank.distances.with_geomloss.DENSE", 100)
    with pytest.raises(ImportError, match="pykeops is not"):
        otdd(*data, backend="geomloss")


def test_geomloss_online_gives_the_same() -> None:
    pytest.importorskip("pykeops")
    data = classes(40, 30, 5, k=3)
    value, gradients = value_and_gradients(data, backend="geomloss", epsilon=0.05)
    other, others = value_and_gradients(data, backend="geomloss_online", epsilon=0.05)
    assert other.item() == pytest.approx(value.item(), rel=1e-9)
    assert apart(others, gradients) < 1e-8


@pytest.mark.parametrize("inner", ["gaussian", "exact", "means"])
@pytest.mark.parametrize("make", ["digits", "identical points", "wide", "one each", "constant feature"])
def test_hard_inputs_give_finite_values_and_gradients(make: str, inner: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, x_label, y, y_label = classes(12, 9, 6, k=3, dtype=torch.float32)
    if make == "digits":
        digits = load_digits()
        images, labels = torch.tensor(digits.images).flatten(1).float(), torch.tensor(digits.target).long()
        x, x_label, y, y_label = images[:60], labels[:60], images[60:110], labels[60:110]
    elif make == "identical points":
        x = torch.ones_like(x)
        y = torch.ones_like(y)
    elif make == "wide":
        x, y = torch.randn(12, 400, generator=generator), torch.randn(9, 400, generator=generator)
    elif make == "one each":
        x_label, y_label = torch.arange(12) - 5, torch.arange(9) * 7
    else:
        x[:, 2], y[:, 2] = 1000.0, 1000.0
    x.requires_grad_()
    y.requires_grad_()
    for outer in ("sinkhorn", "exact", "sliced"):
        result = otdd(x, x_label, y, y_label, inner=inner, outer=outer)
        gradients = torch.autograd.grad(result.value, (x, y))
        assert bool(torch.isfinite(result.value)), outer
        assert all(bool(torch.isfinite(g).all()) for g in gradients), outer
    if make == "identical points":
        assert result.value.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, x_label, y, y_label = classes(30, 20, 4, dtype=torch.float32)
    x, y = x.to(dtype), y.to(dtype).requires_grad_()
    wanted = otdd(x.float(), x_label, y.detach().float(), y_label).value.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = otdd(x, x_label, y, y_label).value
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(wanted, rel=1e-5)
    result.backward()
    assert y.grad.dtype == dtype


def test_far_from_the_origin() -> None:
    x, x_label, y, y_label = classes(40, 30, 8, dtype=torch.float32)
    near = otdd(x, x_label, y, y_label).value.item()
    assert otdd(x + 1e3, x_label, y + 1e3, y_label).value.item() == pytest.approx(near, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(7, 4)}, "same width"),
        ({"y": torch.zeros(0, 3)}, "n >= 1"),
        ({"y": torch.full((7, 3), float("nan"))}, "21 NaN or infinite"),
        ({"y": torch.zeros(7, 3, dtype=torch.long)}, "floating-point"),
        ({"y_label": torch.zeros(6, dtype=torch.long)}, r"shape \(7,\), received \(6,\)"),
        ({"y_label": torch.zeros(7)}, "integers"),
        ({"y_label": None}, "y_label is None"),
        ({"inner": "gauss"}, "inner must be one of"),
        ({"outer": "emd"}, "outer must be one of"),
        ({"backend": "pot"}, "backend must be one of"),
        ({"backend": "geomloss", "outer": "exact"}, "solves outer='sinkhorn' only"),
        ({"epsilon": -1.0}, "positive"),
        ({"epsilon_units": "blur"}, "epsilon_units"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    x, x_label, y, y_label = classes(9, 7, 3, dtype=torch.float32)
    arguments: dict[str, Any] = {"x": x, "x_label": x_label, "y": y, "y_label": y_label, **change}
    with pytest.raises(ValueError, match=message):
        otdd(**arguments)
