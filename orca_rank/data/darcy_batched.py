"""The Darcy solver of `darcy_solver` for many fields side by side, in torch and on a GPU: the same systems, the same
preconditioner and stopping rule."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from orca_rank.data.darcy_solver import (
    TOLERANCE,
    Solution,
    check,
    face_coefficients,
    right_hand_side,
    solve_direct,
    spline_matrix,
)


def solve_batch(
    a: np.ndarray,
    mode: str = "fno",
    *,
    f: float | np.ndarray = 1.0,
    dtype: type | None = None,
    tolerance: float | None = None,
    max_iterations: int = 200,
    device: str | torch.device = "cuda",
) -> Solution:
    """As `darcy_solver.solve_all`, whose arguments these are, equal to 1e-6 of a field's norm; a sample whose matrix is
    not definite goes to the direct solver of the CPU here too.

    Args:
        a: (n, K, K). device: where conjugate gradients run; several times 12 n K² numbers have to fit there.
    """
    a = np.asarray(a)
    real: np.dtype = np.dtype((np.float64 if a.dtype == np.float64 else np.float32) if dtype is None else dtype)
    check(a, mode, real)
    kind = torch.float64 if real == np.float64 else torch.float32
    n, K, _ = a.shape
    right = right_hand_side(f, K, mode)
    faces = [face_coefficients(one.astype(np.float64), mode) for one in a]  # in float64, as there
    first = torch.from_numpy(np.stack([along for along, _ in faces])).to(device, kind)
    second = torch.from_numpy(np.stack([along for _, along in faces])).to(device, kind)
    b = torch.from_numpy(right).to(device, kind).expand(n, -1, -1)
    x, iterations, failed = _conjugate_gradients(first, second, b, tolerance or TOLERANCE[real.name], max_iterations)
    for i in torch.nonzero(failed).flatten().tolist():
        along_first, along_second = faces[i]
        x[i] = torch.from_numpy(solve_direct(along_first, along_second, right)).to(x)
    u = torch.nn.functional.pad(x, (1, 1, 1, 1))
    if mode == "fno":
        to_centres = torch.from_numpy(spline_matrix(K, "centres", real.name)).to(u)
        u = to_centres @ u @ to_centres.T
    return Solution(u.cpu().numpy(), iterations.cpu().numpy(), failed.cpu().numpy())


def _conjugate_gradients(
    first: Float[Tensor, "n F N"],
    second: Float[Tensor, "n N F"],
    b: Float[Tensor, "n N N"],
    tolerance: float,
    max_iterations: int,
) -> tuple[Float[Tensor, "n N N"], Tensor, Bool[Tensor, " n"]]:
    """x with A x = b for every sample, how many iterations each took (n,), and which did not end; a sample that is done
    takes steps of length 0 while others go on."""
    sine, inverse = _sine(b.shape[-1], b.dtype, b.device)

    def precondition(r: Tensor) -> Tensor:
        return sine @ ((sine @ r @ sine) * inverse) @ sine

    def dot(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum((1, 2))

    x, r = torch.zeros_like(b), b.clone()
    z = precondition(r)
    p, rz = z.clone(), dot(r, z)
    goal = tolerance**2 * rz
    iterations = torch.zeros(len(b), dtype=torch.int64, device=b.device)
    failed = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    for _ in range(max_iterations):
        active = (rz > goal) & ~failed
        if not active.any():
            break
        iterations += active
        product = _multiply(first, second, p)
        curvature = dot(p, product)
        failed |= active & ~(curvature > 0)
        active &= ~failed
        step = torch.where(active, rz / curvature, 0.0)[:, None, None]
        x = x + step * p
        r = r - step * product
        z = precondition(r)
        new = dot(r, z)
        p = torch.where(active, new / rz, 0.0)[:, None, None] * p + z
        rz = torch.where(active, new, rz)
    return x, iterations, failed | (rz > goal)


def _multiply(
    first: Float[Tensor, "n F N"], second: Float[Tensor, "n N F"], p: Float[Tensor, "n N N"]
) -> Float[Tensor, "n N N"]:
    """A p, as differences of fluxes."""
    padded = torch.nn.functional.pad(p, (1, 1, 1, 1))
    along_first = (padded[:, 1:, 1:-1] - padded[:, :-1, 1:-1]) * first
    along_second = (padded[:, 1:-1, 1:] - padded[:, 1:-1, :-1]) * second
    return along_first[:, :-1] - along_first[:, 1:] + along_second[:, :, :-1] - along_second[:, :, 1:]


@lru_cache(maxsize=4)
def _sine(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The orthonormal, symmetric sine matrix, and in its basis the inverse eigenvalues of the Poisson matrix."""
    k = torch.arange(1, size + 1, dtype=torch.float64)
    sine = (2 / (size + 1)) ** 0.5 * torch.sin(torch.pi * k[:, None] * k / (size + 1))
    eigenvalue = 4 * torch.sin(torch.pi * k / (2 * (size + 1))) ** 2
    return sine.to(device, dtype), (1 / (eigenvalue[:, None] + eigenvalue)).to(device, dtype)
