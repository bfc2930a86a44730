"""The Darcy solver and its random coefficients, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import make_interp_spline
from scipy.sparse.linalg import spsolve

from orca_rank.data.darcy import gaussian_field, sample_coefficient, solve, solve_all
from orca_rank.data.darcy_batched import solve_batch
from orca_rank.data.darcy_field import spectrum
from orca_rank.data.darcy_solver import face_coefficients, matrix, solve_direct

MODES = ("fno", "clean")


def positions(K: int, mode: str) -> np.ndarray:
    return (np.arange(K) + 0.5) / K if mode == "fno" else np.linspace(0, 1, K)


def distance(u: np.ndarray, v: np.ndarray) -> float:
    return float(np.linalg.norm(u - v) / np.linalg.norm(v))


def manufactured(K: int, mode: str) -> float:
    """Error for u = sin(πx) sin(2πy), a = e^{x} (1 + y/2), not symmetric in x and y."""
    x, y = positions(K, mode)[:, None], positions(K, mode)[None]
    a = np.exp(x) * (1 + y / 2)
    sx, cx, sy, cy = np.sin(np.pi * x), np.cos(np.pi * x), np.sin(2 * np.pi * y), np.cos(2 * np.pi * y)
    f = 5 * np.pi**2 * a * sx * sy - a * np.pi * cx * sy - np.exp(x) * np.pi * sx * cy
    return distance(solve(a, mode, f=f), sx * sy)


@pytest.mark.parametrize("mode", MODES)
def test_second_order_on_a_manufactured_solution(mode):
    coarse, fine = manufactured(85, mode), manufactured(141, mode)
    assert 1.95 < np.log(coarse / fine) / np.log(140 / 84) < 2.05


@pytest.mark.parametrize("mode", MODES)
def test_constant_coefficient_against_the_sine_series(mode):
    def error(K: int) -> float:
        x, y = positions(K, mode)[:, None], positions(K, mode)[None]
        m = np.arange(1, 100, 2)[:, None, None]
        # cosh(mπ(y − ½)) / cosh(mπ/2) without overflow
        ratio = (np.exp(-m * np.pi * y) + np.exp(-m * np.pi * (1 - y))) / (1 + np.exp(-m * np.pi))
        exact = x * (1 - x) / 2 - (4 / (np.pi * m) ** 3 * np.sin(m * np.pi * x) * ratio).sum(0)
        return distance(solve(np.ones((K, K)), mode), exact)

    coarse, fine = error(43), error(85)
    assert fine < 5e-4
    assert 1.8 < np.log2(coarse / fine) < 2.2


def test_clean_matrix_is_a_symmetric_m_matrix_and_the_solution_is_positive():
    a = sample_coefficient(1, 21, seed=3, positions="nodes", dtype=np.float64)[0]
    A = matrix(*face_coefficients(a, "clean")).toarray()
    off = A - np.diag(np.diag(A))
    np.testing.assert_array_equal(A, A.T)
    assert (off <= 0).all() and (np.diag(A) > 0).all()
    assert (A.sum(1) > -1e-12 * np.diag(A)).all() and np.linalg.eigvalsh(A)[0] > 0
    u = solve(a, "clean")
    assert (u[1:-1, 1:-1] > 0).all()
    assert not np.concatenate([u[0], u[-1], u[:, 0], u[:, -1]]).any()


def test_energy_identity():
    K = 61
    a = sample_coefficient(1, K, seed=1, dtype=np.float64)[0]
    u = solve(a, "clean")
    face = 2 * a[1:] * a[:-1] / (a[1:] + a[:-1])
    across = 2 * a[:, 1:] * a[:, :-1] / (a[:, 1:] + a[:, :-1])
    energy = (face * np.diff(u, axis=0) ** 2).sum() + (across * np.diff(u, axis=1) ** 2).sum()
    assert energy == pytest.approx(u.sum() / (K - 1) ** 2, rel=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_transpose_and_scaling_equivariance(mode):
    a = sample_coefficient(2, 33, seed=5, dtype=np.float64)
    u = solve(a, mode)
    np.testing.assert_allclose(solve(a.transpose(0, 2, 1), mode), u.transpose(0, 2, 1), rtol=0, atol=1e-11 * u.max())
    np.testing.assert_allclose(solve(7 * a, mode), u / 7, rtol=0, atol=1e-11 * u.max())
    np.testing.assert_allclose(solve(a, mode, f=3.0), 3 * u, rtol=0, atol=1e-11 * u.max())
    np.testing.assert_array_equal(solve(a[1], mode), u[1])


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-6), (np.float64, 1e-10)])
@pytest.mark.parametrize("K", [85, 165])  # the sine matrix, and the fast transform
def test_conjugate_gradients_against_lu(dtype, bound, K):
    a = sample_coefficient(1, K, seed=2, positions="nodes", dtype=dtype)
    solution = solve_all(a, "clean")
    faces = face_coefficients(a[0].astype(np.float64), "clean")
    exact = spsolve(matrix(*faces), np.full((K - 2) ** 2, 1 / (K - 1) ** 2))
    assert not solution.fallback.any() and solution.iterations[0] < 40
    assert solution.u.dtype == dtype
    assert distance(solution.u[0, 1:-1, 1:-1].ravel(), exact) < bound


def test_published_route_in_single_precision_agrees_with_double():
    a = sample_coefficient(2, 85, seed=2)
    assert distance(solve(a, "fno"), solve(a.astype(np.float64), "fno")) < 1e-6


def rough_coefficient() -> np.ndarray:
    """Values on which the spline overshoots so far that the matrix has negative eigenvalues."""
    return np.where(np.random.default_rng(0).random((18, 18)) < 0.5, 12.0, 0.3)


def test_an_indefinite_matrix_takes_the_direct_solver():
    a = rough_coefficient()
    faces = face_coefficients(a, "fno")
    eigenvalues = np.linalg.eigvalsh(matrix(*faces).toarray())
    assert eigenvalues[0] < 0 < eigenvalues[-1]
    right = np.full((16, 16), 1 / 17**2)
    good = np.ones_like(a)
    solution = solve_all(np.stack([good, a, good]), "fno")
    assert solution.fallback.tolist() == [False, True, False]
    inner = spsolve(matrix(*faces), right.ravel()).reshape(16, 16)
    np.testing.assert_allclose(solve_direct(*faces, right), inner, rtol=0, atol=1e-10 * abs(inner).max())
    nodes, centres = np.linspace(0, 1, 18), (np.arange(18) + 0.5) / 18
    once = make_interp_spline(nodes, np.pad(inner, 1), k=3)(centres)
    expected = make_interp_spline(nodes, once, k=3, axis=1)(centres)
    np.testing.assert_allclose(solution.u[1], expected, rtol=0, atol=1e-10 * abs(expected).max())
    np.testing.assert_array_equal(solution.u[0], solution.u[2])
    assert distance(solve(a.astype(np.float32), "fno"), solve(a.astype(np.float32), "fno", dtype=np.float64)) < 1e-6


def test_running_out_of_iterations_takes_the_direct_solver():
    a = sample_coefficient(1, 33, seed=0, dtype=np.float64)
    stopped = solve_all(a, "clean", max_iterations=3)
    assert stopped.fallback.all()
    assert distance(stopped.u, solve(a, "clean")) < 1e-10


@pytest.mark.parametrize(
    ("a", "options", "message"),
    [
        (np.ones(9), {}, "shape"),
        (np.ones((9, 8)), {}, "square"),
        (np.ones((3, 3)), {"mode": "fno"}, "at least 4"),
        (np.zeros((9, 9)), {}, "positive"),
        (np.full((9, 9), np.nan), {}, "NaN"),
        (np.ones((9, 9)), {"mode": "fem"}, "mode"),
        (np.ones((9, 9)), {"dtype": np.float16}, "float32 or float64"),
        (np.ones((9, 9)), {"f": np.ones((8, 8))}, "f must be"),
    ],
)
def test_bad_input_is_one_clear_error(a, options, message):
    with pytest.raises(ValueError, match=message):
        solve(a, **options)


def test_precision_follows_the_coefficient_unless_asked():
    a = sample_coefficient(1, 9, seed=0)
    assert a.dtype == np.float32 and solve(a).dtype == np.float32
    assert solve(a.astype(int)).dtype == np.float32
    assert solve(a.astype(np.float64)).dtype == np.float64
    assert solve(a, dtype=np.float64).dtype == np.float64


def test_smallest_grids():
    assert solve(np.ones((3, 3)), "clean")[1, 1] == pytest.approx(1 / 16)  # 4u/h² = 1, h = ½
    assert solve(np.ones((4, 4)), "fno").shape == (4, 4)


# ---------------------------------------------------------------- random fields


@pytest.fixture(scope="module")
def fields() -> np.ndarray:
    return gaussian_field(8000, 12, seed=0)


def test_variance_of_the_field(fields):
    assert (spectrum(421) ** 2).sum() == pytest.approx(0.085305, rel=2e-4)
    assert (fields**2).mean() / (spectrum(12) ** 2).sum() == pytest.approx(1, abs=0.02)


def covariance(K: int) -> np.ndarray:
    """Covariance of the field at the cell centres, (K, K, K, K), by summing the cosine series."""
    k, x = np.arange(K), (np.arange(K) + 0.5) / K
    cosine = np.cos(np.pi * k[:, None] * x) * np.where(k == 0, 1, np.sqrt(2))[:, None]  # (k, x)
    return np.einsum("kl,kx,ky,lu,lv->xuyv", spectrum(K) ** 2, cosine, cosine, cosine, cosine, optimize=True)


def test_thresholding_follows_the_arcsine_law(fields):
    rho = covariance(12).reshape(144, 144)
    scale = np.sqrt(np.diag(rho))
    rho = rho / scale / scale[:, None]
    sign = np.where(fields >= 0, 1.0, -1.0).reshape(len(fields), -1)
    assert (sign > 0).mean() == pytest.approx(0.5, abs=0.005)
    found = sign.T @ sign / len(sign)
    expected = 2 / np.pi * np.arcsin(rho.clip(-1, 1))
    assert abs(found - expected).max() < 0.06  # five standard errors of the worst of 10,296 pairs
    assert np.sqrt(((found - expected) ** 2).mean()) < 0.013


def test_fields_are_the_cosine_series_at_centres_and_nodes():
    K = 7
    noise = np.random.default_rng(np.random.SeedSequence(4, spawn_key=(1, 2))).standard_normal((K, K))
    k = np.arange(K)
    weight = np.where(k == 0, 1, np.sqrt(2))
    series = spectrum(K) * noise * weight[:, None] * weight
    for name, x in (("centres", (k + 0.5) / K), ("nodes", k / (K - 1))):
        cosine = np.cos(np.pi * k[:, None] * x)
        field = gaussian_field(1, K, seed=4, stream=1, first=2, positions=name)[0]
        np.testing.assert_allclose(field, cosine.T @ series @ cosine, atol=1e-12)


def test_a_sample_depends_on_its_own_number_alone():
    many = sample_coefficient(5, 16, seed=9)
    np.testing.assert_array_equal(sample_coefficient(2, 16, seed=9), many[:2])
    np.testing.assert_array_equal(sample_coefficient(2, 16, seed=9, first=3), many[3:])
    assert not np.array_equal(sample_coefficient(5, 16, seed=9, stream=1), many)
    assert not np.array_equal(sample_coefficient(5, 16, seed=10), many)
    assert set(np.unique(many)) == {3.0, 12.0}
    np.testing.assert_array_equal(many == 12, gaussian_field(5, 16, seed=9) >= 0)


@pytest.mark.parametrize("options", [{"K": 1}, {"n": -1}, {"positions": "corners"}, {"low": 0.0}])
def test_bad_coefficient_options(options):
    arguments = {"n": 1, "K": 8, "seed": 0, **options}
    with pytest.raises(ValueError, match="received"):
        sample_coefficient(**arguments)


@pytest.mark.parametrize("mode", ["fno", "clean"])
@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-6), (np.float64, 1e-10)])
def test_a_batch_in_torch_is_the_samples_one_by_one(mode, dtype, bound):
    a = sample_coefficient(5, 33, seed=3, positions="nodes" if mode == "clean" else "centres")
    a[1] = 1.0  # one that is done after a step while others go on
    f = np.random.default_rng(0).standard_normal((33, 33))
    one_by_one, batch = (solver(a, mode, f=f, dtype=dtype) for solver in (solve_all, cpu_batch))
    assert batch.u.dtype == dtype and not batch.fallback.any()
    assert np.linalg.norm(batch.u - one_by_one.u) < bound * np.linalg.norm(one_by_one.u)
    assert abs(batch.iterations - one_by_one.iterations).max() <= 1 and batch.iterations[1] < batch.iterations[0]


def cpu_batch(a, mode, **options):
    return solve_batch(a, mode, device="cpu", **options)


def test_a_batch_hands_what_does_not_converge_to_the_direct_solver():
    a = sample_coefficient(3, 21, seed=0)
    batch = solve_batch(a, max_iterations=2, dtype=np.float64, device="cpu")
    assert batch.fallback.all()
    assert np.linalg.norm(batch.u - solve(a, dtype=np.float64)) < 1e-9 * np.linalg.norm(batch.u)
    with pytest.raises(ValueError, match="positive"):
        solve_batch(-a, device="cpu")
