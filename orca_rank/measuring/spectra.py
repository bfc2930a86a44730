"""How many directions a layer must change: singular values against a noise floor, from what `activations` collected.

Null models draw whole images: tokens of one image are correlated and are never treated as independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from scipy import special
from torch import Tensor

from orca_rank.measuring.records import WeightRank


class Decomposition(NamedTuple):
    """Singular values (k,), largest first; null: what the first would hardly exceed if nothing were there (None where
    there is no such model); energy: what the squares are measured against; a (k, d_in), b (d_out, k): the directions,
    b a being the change itself cut to rank k, or b None where only input directions are known."""

    values: Float[Tensor, " k"]
    null: float | None
    energy: float
    a: Float[Tensor, "k d_in"]
    b: Float[Tensor, "d_out k"] | None

    @property
    def rank(self) -> int | None:
        """How many singular values stand above the null."""
        return None if self.null is None else int((self.values > self.null).sum())


class Transport(NamedTuple):
    """The Gaussian optimal transport from target to source inputs of one module, on an orthonormal basis.

    basis (d, m); root (m, m): L with L Lᵀ = Σ_t; change (m, m): (T − I) L; null_changes: the same between random halves
    of one side, at the noise of the full samples: (splits, 2, m, m).
    """

    basis: Float[Tensor, "d m"]
    root: Float[Tensor, "m m"]
    change: Float[Tensor, "m m"]
    null_changes: Float[Tensor, "splits 2 m m"]


def upper_bound(draws: Sequence[float] | Float[np.ndarray, " draws"], level: float = 0.975) -> float:
    """What a further draw of a largest singular value stays below in 95 of 100 cases, from few draws:
    mean + t s √(1 + 1/n). Student's t allows for the few draws; its 97.5 % point rather than the 95 % point because
    largest singular values have a longer upper tail than the normal law (Tracy–Widom's 95 % point is 1.72 standard
    deviations up, not 1.64, and that of heavier-tailed gradients more): false positives then stay at or below 5 %."""
    values = np.asarray(draws, dtype=float)
    n = len(values)
    if n < 2:
        raise ValueError(f"a null needs at least 2 draws, got {n}")
    return float(values.mean() + special.stdtrit(n - 1, level) * values.std(ddof=1) * np.sqrt(1 + 1 / n))


def leading(matrix: Float[Tensor, "... m n"], k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, Vᵀ with at least the k largest singular values: exact for small matrices, otherwise from a block Krylov
    space (Musco and Musco 2015), whose values err by some parts in ten thousand, downwards, even without a gap."""
    if min(matrix.shape[-2:]) <= max(8 * k, 64):
        return torch.linalg.svd(matrix, full_matrices=False)
    generator = torch.Generator().manual_seed(seed)
    width, depth = (4, 20) if k < 4 else (k + 8, 4)
    start = torch.randn(matrix.shape[-1], width, generator=generator).to(matrix)
    blocks = [torch.linalg.qr(matrix @ start)[0]]
    for _ in range(depth):
        blocks.append(torch.linalg.qr(matrix @ (matrix.mT @ blocks[-1]))[0])
    basis = torch.linalg.qr(torch.cat(blocks, -1))[0]  # (..., m, width (depth + 1))
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ u, s, vh


def transport(
    source: Float[Tensor, "n t d"],
    target: Float[Tensor, "m t2 d"],
    *,
    splits: int = 10,
    components: int = 128,
    seed: int = 0,
) -> Transport:
    """T = Σ_t^{-1/2}(Σ_t^{1/2} Σ_s Σ_t^{1/2})^{1/2} Σ_t^{-1/2}, the map that carries the target's centred Gaussian fit
    to the source's, as (T − I) L with L Lᵀ = Σ_t.

    For any roots, T L_t = L_s Q with Q the polar factor of L_sᵀ L_t, so no covariance is inverted. Where d is above
    `components`, both sides are first projected on the leading principal components of both together.

    The null: random halves of the images of one side, mapped on each other. Halves have twice the variance of the
    full samples, so their change is divided by √2.

    Args:
        source, target: tokens of each image. splits: null draws of each side.
    """
    source, target = (side.double() - side.double().mean((0, 1)) for side in (source, target))
    d = source.shape[-1]
    if d > components:
        rows = torch.cat([source.flatten(0, 1), target.flatten(0, 1)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            basis = torch.svd_lowrank(rows, q=components, niter=2)[2]  # (d, m)
        source, target = source @ basis, target @ basis
    else:
        basis = torch.eye(d, dtype=torch.float64)
    root = _root(target)
    generator = torch.Generator().manual_seed(seed)
    null = [[_between_halves(side, generator) for side in (source, target)] for _ in range(splits)]
    nulls = torch.stack([torch.stack(pair) for pair in null])
    return Transport(basis, root, _change(_root(source), root), nulls)


def ot_map(weight: Float[Tensor, "d_out d_in"], module: Transport, keep: int = 32) -> Decomposition:
    """Correcting W x to W T x means ΔW = W (T − I): the singular values of ΔW Σ_t^{1/2}, the change as the target's
    inputs see it. Blind to P(y | x) and to rotations of the inputs."""
    w = weight.double() @ module.basis  # (d_out, m)
    u, s, vh = torch.linalg.svd(w @ module.change, full_matrices=False)
    gram = w.T @ w  # the largest s² of w D is the largest eigenvalue of Dᵀ gram D
    squares = torch.linalg.eigvalsh(module.null_changes.mT @ gram @ module.null_changes)[..., -1]  # (splits, 2)
    null = upper_bound(squares.clamp_min(0).sqrt().amax(1).numpy())
    k = min(keep, len(s))
    root = s[:k].sqrt()
    a = torch.linalg.solve_triangular(module.root, (root[:, None] * vh[:k]), upper=False, left=False) @ module.basis.T
    energy = float((w @ module.root).square().sum())
    return Decomposition(s[:k], null, energy, a, u[:, :k] * root)


def activation(tokens: Float[Tensor, "n t d"], keep: int = 32, seed: int = 0) -> Decomposition:
    """Singular values and right singular vectors of the centred inputs (EVA, arXiv 2410.07170); energy is the sum of
    all squares, so values² / energy are explained-variance ratios."""
    rows = tokens.flatten(0, 1).double()
    rows = rows - rows.mean(0)
    energy = float(rows.square().sum())
    _, s, vh = leading(rows, keep, seed)
    return Decomposition(s[:keep], None, energy, vh[:keep].contiguous(), None)


def weight_rank(weight: Float[Tensor, "d_out d_in"]) -> WeightRank:
    """Stable rank ‖W‖_F² / ‖W‖₂² and effective rank exp(H(s / Σ s)) of a weight."""
    w = weight.double()
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    squares = torch.linalg.eigvalsh(gram).clamp_min(0)
    if not squares[-1] > 0:
        return WeightRank(0.0, 0.0)
    share = squares.sqrt() / squares.sqrt().sum()
    entropy = -torch.special.xlogy(share, share).sum()
    return WeightRank(float(squares.sum() / squares[-1]), float(entropy.exp()))


def intrinsic_dimension(points: Float[Tensor, "n d"]) -> float:
    """TwoNN (Facco et al. 2017): the ratio μ of the distances to the second and first neighbour follows μ^{−d−1}, so
    d = (n − 1) / Σ log μ; images that coincide are left out, and the tenth of largest μ as well.

    Raises:
        ValueError: if fewer than 10 different images are left.
    """
    x = torch.unique(points.double(), dim=0)
    if len(x) < 10:
        raise ValueError(
            f"TwoNN needs at least 10 different images, got {len(x)}: give more, or set "
            f"gap.measurements.intrinsic_dimension=false"
        )
    nearest = torch.cdist(x, x).fill_diagonal_(float("inf")).topk(2, largest=False).values  # (n, 2)
    logs = (nearest[:, 1] / nearest[:, 0]).log().sort().values
    kept = int(0.9 * len(logs))
    # The likelihood of the smallest `kept` of n: the others are only known to be larger.
    total = float(logs[:kept].sum() + (len(logs) - kept) * logs[kept - 1])
    return (kept - 1) / total if total > 0 else 0.0


def load_directions(path: str | Path, kind: str) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """layer -> A (k, d_in), or a pair of A and B (d_out, k), from measure/directions.safetensors: what an adapter
    takes as `directions`.

    Args:
        kind: ot_map, gradient or activation.

    Raises:
        FileNotFoundError: if the file is not there. ValueError: if it holds no directions of this kind.
    """
    stored = _stored(path, kind, ("A", "B"))
    return {layer: (pair[0], pair[1]) if len(pair) == 2 else pair[0] for layer, pair in stored.items()}


def load_gradients(path: str | Path) -> dict[str, Tensor]:
    """layer -> mean gradient G (d_out, d_in), from measure/directions.safetensors: what LoRA's init=gora takes.

    Raises:
        FileNotFoundError: if the file is not there. ValueError: if it holds no mean gradients.
    """
    return {name: pair[0] for name, pair in _stored(path, "mean_gradient", ("G",)).items()}


def _stored(path: str | Path, kind: str, parts: tuple[str, ...]) -> dict[str, list[Tensor]]:
    """layer -> the tensors `<kind>/<layer>.<part>` of it, without those that are not there."""
    option = f"gap.measurements.{kind}=true"
    if not Path(path).is_file():
        raise FileNotFoundError(f"no directions at {path}: run `python -m orca_rank stage=measure` with {option}")
    found: dict[str, list[Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for name in sorted(name for name in names if name.startswith(f"{kind}/") and name.endswith(f".{parts[0]}")):
            layer = name[len(kind) + 1 : -len(parts[0]) - 1]
            stored = [f"{kind}/{layer}.{part}" for part in parts]
            found[layer] = [file.get_tensor(one) for one in stored if one in names]
    if not found:
        raise ValueError(f"{path} has no {kind}: run `python -m orca_rank stage=measure` with {option}")
    return found


def _root(tokens: Tensor) -> Tensor:
    """Lower triangular L with L Lᵀ the covariance of tokens (n, t, m), a hair of the trace on the diagonal."""
    rows = tokens.flatten(0, 1)
    rows = rows - rows.mean(0)
    covariance = rows.T @ rows / len(rows)
    jitter = 1e-10 * covariance.diagonal().mean().clamp_min(1e-300)
    return torch.linalg.cholesky(covariance + jitter * torch.eye(len(covariance), dtype=covariance.dtype))


def _change(source_root: Tensor, target_root: Tensor) -> Tensor:
    """(T − I) L_t = L_s Q − L_t."""
    u, _, vh = torch.linalg.svd(source_root.T @ target_root)
    return source_root @ (u @ vh) - target_root


def _between_halves(side: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(side), generator=generator)
    half = len(side) // 2
    return _change(_root(side[order[:half]]), _root(side[order[half : 2 * half]])) / 2**0.5
