"""Steady Darcy flow −∇·(a ∇u) = f on the unit square with u = 0 on its boundary.

Five-point finite differences, solved by conjugate gradients with a constant-coefficient Poisson preconditioner. A
discrete sine transform inverts the preconditioner exactly, so the number of iterations depends on the contrast of a
and not on the grid (about 15 for a contrast of 4 in float32).

Two discretisations:

- ``fno``, the published script of FNO [1]: a and u live at the cell centres (i + ½)/K. a goes to the nodes i/(K − 1)
  by a not-a-knot cubic spline, faces take arithmetic means, the (K − 2)² inner nodes are solved for and u returns to
  the centres by a spline. u is therefore small but not zero along the border of the array. The spline overshoots at
  jumps of a; the matrix can lose positive definiteness, which conjugate gradients notice (p·Ap <= 0) and a direct
  solve replaces.
- ``clean``: a and u live on the nodes i/(K − 1), faces take harmonic means. Symmetric positive definite M-matrix; u is
  exactly zero along the border of the array.

Reference:
    [1] Li et al., Fourier Neural Operator (2020), data_generation/darcy (solve_gwf.m).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.fft import dstn
from scipy.interpolate import make_interp_spline
from scipy.linalg import get_blas_funcs
from scipy.sparse import csc_array, diags_array
from scipy.sparse.linalg import splu

MODES = ("fno", "clean")
_MATRIX_SINE_LIMIT = 160  # below, two matrix products beat the fast transform
TOLERANCE = {"float32": 1e-7, "float64": 1e-12}


class Solution(NamedTuple):
    """What `solve_all` returns: u (n, K, K), iterations (n,), and whether sample i took the direct solver (n,)."""

    u: np.ndarray
    iterations: np.ndarray
    fallback: np.ndarray


def solve(
    a: np.ndarray,
    mode: str = "fno",
    *,
    f: float | np.ndarray = 1.0,
    dtype: type | None = None,
    tolerance: float | None = None,
    max_iterations: int = 200,
) -> Float[np.ndarray, "*batch K K"]:
    """u with −∇·(a ∇u) = f on the unit square, u = 0 on the boundary.

    Args:
        a: positive coefficient (K, K) or (n, K, K): at the cell centres (i + ½)/K for mode "fno", on the nodes
            i/(K − 1) for mode "clean". The first axis of the grid is the first coordinate.
        mode: "fno" or "clean", see the module's text.
        f: right-hand side, a number or an array (K, K) at the same positions as a.
        dtype: np.float32 or np.float64; by default float64 for a float64 coefficient and float32 for all else.
        tolerance: on the residual relative to the first one, in the preconditioner's norm; 1e-7 or 1e-12 by dtype.
        max_iterations: a sample that needs more is solved directly.

    Returns:
        u, of the shape of a and at the same positions.

    Raises:
        ValueError: for a wrong shape, a coefficient that is not finite and positive, or an unknown mode or dtype.
    """
    a = np.asarray(a)
    if a.ndim not in (2, 3):
        raise ValueError(f"the coefficient must be (K, K) or (n, K, K), received shape {a.shape}")
    batch = a if a.ndim == 3 else a[None]
    solution = solve_all(batch, mode, f=f, dtype=dtype, tolerance=tolerance, max_iterations=max_iterations)
    return solution.u.reshape(a.shape)


def solve_all(
    a: np.ndarray,
    mode: str = "fno",
    *,
    f: float | np.ndarray = 1.0,
    dtype: type | None = None,
    tolerance: float | None = None,
    max_iterations: int = 200,
) -> Solution:
    """As `solve` for a (n, K, K), and also how each sample was solved."""
    a = np.asarray(a)
    real: np.dtype = np.dtype((np.float64 if a.dtype == np.float64 else np.float32) if dtype is None else dtype)
    check(a, mode, real)
    n, K, _ = a.shape
    right = right_hand_side(f, K, mode)
    method = _ConjugateGradients(K, real, tolerance or TOLERANCE[real.name], max_iterations)
    u: np.ndarray = np.zeros((n, K, K), real)
    iterations = np.zeros(n, np.int64)
    fallback = np.zeros(n, np.bool_)
    for i in range(n):
        # Faces in float64: near an indefinite matrix the answer magnifies every rounding of them.
        first, second = face_coefficients(a[i].astype(np.float64), mode)
        inner, iterations[i] = method(first.astype(real), second.astype(real), right.astype(real))
        if inner is None:
            fallback[i] = True
            inner = solve_direct(first, second, right)
        u[i, 1:-1, 1:-1] = inner
        if mode == "fno":
            to_centres = spline_matrix(K, "centres", real.name)
            u[i] = to_centres @ u[i] @ to_centres.T
    return Solution(u, iterations, fallback)


def check(a: np.ndarray, mode: str, dtype: np.dtype) -> None:
    """Raise a ValueError for what `solve` refuses."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, received {mode!r}")
    if dtype.name not in TOLERANCE:
        raise ValueError(f"dtype must be float32 or float64, received {dtype.name}")
    smallest = 4 if mode == "fno" else 3
    if a.ndim != 3 or a.shape[1] != a.shape[2] or a.shape[1] < smallest:
        raise ValueError(f"expected square grids of at least {smallest} points a side, received shape {a.shape}")
    if not (np.isfinite(a).all() and (a > 0).all()):
        raise ValueError("the coefficient must be finite and positive; it has NaN, infinite, zero or negative values")


def right_hand_side(f: float | np.ndarray, K: int, mode: str) -> Float[np.ndarray, "N N"]:
    """h² f on the inner nodes, N = K − 2."""
    if np.ndim(f) == 0:
        nodes = np.full((K, K), float(f))
    else:
        nodes = np.asarray(f, dtype=np.float64)
        if nodes.shape != (K, K):
            raise ValueError(f"f must be a number or an array ({K}, {K}), received shape {nodes.shape}")
        if mode == "fno":
            to_nodes = spline_matrix(K, "nodes", "float64")
            nodes = to_nodes @ nodes @ to_nodes.T
    return nodes[1:-1, 1:-1] / (K - 1) ** 2


@lru_cache(maxsize=16)
def spline_matrix(K: int, to: str, dtype: str) -> Float[np.ndarray, "K K"]:
    """Not-a-knot cubic spline between the centres (i + ½)/K and the nodes i/(K − 1), as a matrix."""
    centres, nodes = (np.arange(K) + 0.5) / K, np.linspace(0, 1, K)
    source, target = (centres, nodes) if to == "nodes" else (nodes, centres)
    spline = make_interp_spline(source, np.eye(K), k=3)(target)
    spline[abs(spline) < 1e-20] = 0.0  # the weights decay geometrically, and denormal numbers make products slow
    return spline.astype(dtype)


def face_coefficients(
    a: Float[np.ndarray, "K K"], mode: str
) -> tuple[Float[np.ndarray, "F N"], Float[np.ndarray, "N F"]]:
    """Coefficients on the faces between nodes: along the first axis (K − 1, K − 2) and the second (K − 2, K − 1)."""
    if mode == "fno":
        to_nodes = spline_matrix(len(a), "nodes", a.dtype.name)
        nodes = to_nodes @ a @ to_nodes.T
        return (nodes[1:, 1:-1] + nodes[:-1, 1:-1]) / 2, (nodes[1:-1, 1:] + nodes[1:-1, :-1]) / 2
    resistance = 1 / a
    return 2 / (resistance[1:, 1:-1] + resistance[:-1, 1:-1]), 2 / (resistance[1:-1, 1:] + resistance[1:-1, :-1])


def matrix(first: Float[np.ndarray, "F N"], second: Float[np.ndarray, "N F"]) -> csc_array:
    """The five-point matrix (times h²) of the faces' coefficients over the inner nodes in row-major order, float64."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    size = first.shape[1]
    diagonal = first[1:] + first[:-1] + second[:, 1:] + second[:, :-1]
    along_second = -second[:, 1:]
    along_second[:, -1] = 0.0  # the last node of a row is no neighbour of the next row's first
    near, far = along_second.ravel()[:-1], -first[1:-1].ravel()
    return csc_array(diags_array([far, near, diagonal.ravel(), near, far], offsets=[-size, -1, 0, 1, size]))


def solve_direct(
    first: Float[np.ndarray, "F N"], second: Float[np.ndarray, "N F"], right: Float[np.ndarray, "N N"]
) -> Float[np.ndarray, "N N"]:
    """The same system by a sparse LU factorisation in float64, definite or not."""
    factors = splu(matrix(first, second), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
    return factors.solve(right.astype(np.float64).ravel()).reshape(right.shape)


def _sine_inverse(size: int, dtype: np.dtype) -> Callable[[np.ndarray, np.ndarray], None]:
    """A function (r, out) that writes into out the solution of the five-point Poisson equation with right side r."""
    k = np.arange(1, size + 1)
    eigenvalue = 4 * np.sin(np.pi * k / (2 * (size + 1))) ** 2
    inverse = (1 / (eigenvalue[:, None] + eigenvalue)).astype(dtype)
    if size > _MATRIX_SINE_LIMIT:

        def transform(r: np.ndarray, out: np.ndarray) -> None:
            modes = dstn(r, type=1, norm="ortho")
            modes *= inverse
            out[...] = dstn(modes, type=1, norm="ortho", overwrite_x=True)

        return transform
    sine = (np.sqrt(2 / (size + 1)) * np.sin(np.pi * np.outer(k, k) / (size + 1))).astype(dtype)
    left, both = np.empty((size, size), dtype), np.empty((size, size), dtype)

    def product(r: np.ndarray, out: np.ndarray) -> None:
        np.matmul(sine, r, out=left)
        np.matmul(left, sine, out=both)
        np.multiply(both, inverse, out=both)
        np.matmul(sine, both, out=left)
        np.matmul(left, sine, out=out)

    return product


class _ConjugateGradients:
    """Preconditioned conjugate gradients on one grid; buffers are made once and used for every sample."""

    def __init__(self, K: int, dtype: np.dtype, tolerance: float, max_iterations: int) -> None:
        size = K - 2
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.precondition = _sine_inverse(size, dtype)
        self.x, self.z, self.p, self.product = (np.empty((size, size), dtype) for _ in range(4))
        self.padded = np.zeros((K, K), dtype)  # p inside a border of boundary zeros
        self.flux_first, self.flux_second = np.empty((K - 1, size), dtype), np.empty((size, K - 1), dtype)
        self.axpy, self.dot = get_blas_funcs(("axpy", "dot"), dtype=dtype)

    def _multiply(self, first: np.ndarray, second: np.ndarray) -> None:
        """product = A p, as differences of fluxes."""
        padded, flux_first, flux_second, out = self.padded, self.flux_first, self.flux_second, self.product
        padded[1:-1, 1:-1] = self.p
        np.subtract(padded[1:, 1:-1], padded[:-1, 1:-1], out=flux_first)
        np.multiply(flux_first, first, out=flux_first)
        np.subtract(padded[1:-1, 1:], padded[1:-1, :-1], out=flux_second)
        np.multiply(flux_second, second, out=flux_second)
        np.subtract(flux_first[:-1], flux_first[1:], out=out)
        np.add(out, flux_second[:, :-1], out=out)
        np.subtract(out, flux_second[:, 1:], out=out)

    def __call__(self, first: np.ndarray, second: np.ndarray, r: np.ndarray) -> tuple[np.ndarray | None, int]:
        """The solution (a buffer that the next call overwrites) or None where the matrix is not definite or the
        iterations ran out, and the number of iterations. Overwrites the right-hand side r."""
        x, z, p = self.x, self.z, self.p
        x.fill(0)
        self.precondition(r, z)
        p[...] = z
        rz = float(self.dot(r.ravel(), z.ravel()))
        goal = self.tolerance**2 * rz
        for iteration in range(1, self.max_iterations + 1):
            if rz <= goal:  # also a right-hand side of zeros
                return x, iteration - 1
            self._multiply(first, second)
            curvature = float(self.dot(p.ravel(), self.product.ravel()))
            if not curvature > 0:
                return None, iteration
            step = rz / curvature
            self.axpy(p.ravel(), x.ravel(), a=step)
            self.axpy(self.product.ravel(), r.ravel(), a=-step)
            self.precondition(r, z)
            rz, previous = float(self.dot(r.ravel(), z.ravel())), rz
            np.multiply(p, rz / previous, out=p)
            np.add(p, z, out=p)
        return None, self.max_iterations
