"""How much rank a linear chain needs (Zeng and Lee, "The Expressive Power of Low-Rank Adaptation", ICLR 2024).

Frozen chain Π W_l (the last layer on the left), target W̄ = Π W_l + E. With an update of rank R in each of L layers the
smallest spectral error is σ_{RL+1}(E) (lemma 1), so R >= ⌈rank(E) / L⌉ is enough and necessary for 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.numpy import load_file

from orca_rank.measuring.records import Layer, LayerLike, as_layers
from orca_rank.ranks.plan import Budget, RankPlan
from orca_rank.ranks.rules import uniform

Matrix = Float[np.ndarray, "d_out d_in"]


def theory(
    layers: Sequence[LayerLike],
    budget: Budget | None = None,
    *,
    update: ArrayLike | Mapping[str, ArrayLike] | str | Path | None = None,
    tolerance: float = 1e-6,
) -> RankPlan:
    """Zeng and Lee's bound from a given ΔW. A budget, if given, caps the ranks at what it affords for all alike, and
    its r_min raises them.

    Args:
        update: one matrix E = W̄ − Π W_l (d_out of the last, d_in of the first layer) for the chain of all layers:
            R = ⌈rank(E) / L⌉ everywhere. Or a mapping, or a safetensors file, of exactly these layers to their own ΔW
            (d_out, d_in), for example of a full fine-tune: each layer gets rank(ΔW), L = 1.
        tolerance: singular values below this share of the largest count as 0.

    Raises:
        ValueError: without an update, or for one that does not fit the layers' names or shapes. FileNotFoundError: if
            the file is not there.
    """
    records = as_layers(layers)
    if update is None:
        raise ValueError("rank=theory needs the change it is to make: set rank.update=<safetensors: layer -> ΔW>")
    options: dict[str, Any] = {"tolerance": tolerance}
    if isinstance(update, str | Path):
        options["update"] = str(update)
    if isinstance(update, Mapping | str | Path):
        wanted = {name: numerical_rank(matrix, tolerance) for name, matrix in updates(records, update).items()}
    else:
        whole = _fitting(update, (records[-1].d_out, records[0].d_in), "the chain of all layers")
        rank = chain_rank(numerical_rank(whole, tolerance), len(records))
        wanted = {layer.name: rank for layer in records}
    low = {layer.name: 0 for layer in records}
    top = {layer.name: layer.full_rank for layer in records}
    if budget is not None:
        low = dict(zip(low, budget.bounds(records)[0], strict=True))
        top = dict(uniform(records, budget).ranks)
    ranks = {name: max(low[name], min(rank, top[name])) for name, rank in wanted.items()}
    return RankPlan(ranks, "theory", budget, options)


def updates(layers: Sequence[Layer], update: Mapping[str, ArrayLike] | str | Path) -> dict[str, Matrix]:
    """layer -> its ΔW (d_out, d_in), of exactly these layers, from a mapping or a safetensors file.

    Raises:
        FileNotFoundError: if the file is not there. ValueError: if it is damaged, or of other layers or shapes.
    """
    if not isinstance(update, Mapping):
        if not Path(update).is_file():
            raise FileNotFoundError(
                f"no file of updates at {update}: set rank.update=<finetune folder>/update.safetensors"
            )
        try:
            update = load_file(update)
        except SafetensorError as error:
            raise ValueError(f"{update} is no safetensors file of updates: {error}") from error
    names = {layer.name for layer in layers}
    if missing := [layer.name for layer in layers if layer.name not in update]:
        raise ValueError(f"the update has nothing for {missing[0]} and {len(missing) - 1} more layers")
    if unknown := [name for name in update if name not in names]:
        raise ValueError(f"the update names {unknown[0]!r}, which is none of the layers {sorted(names)[:4]}, ...")
    return {layer.name: _fitting(update[layer.name], (layer.d_out, layer.d_in), layer.name) for layer in layers}


def _fitting(update: ArrayLike, shape: tuple[int, int], what: str) -> np.ndarray:
    matrix = np.asarray(update)
    if matrix.shape != shape:
        raise ValueError(f"the update of {what} has shape {matrix.shape}, expected (d_out, d_in) = {shape}")
    return matrix


def numerical_rank(matrix: np.ndarray, tolerance: float = 1e-6) -> int:
    """Number of singular values above `tolerance` times the largest; 0 for the zero matrix."""
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ValueError(f"an update is a finite matrix (d_out, d_in), got shape {matrix.shape}")
    values = np.linalg.svd(matrix, compute_uv=False)
    return int((values > tolerance * values[0]).sum()) if values.size else 0


def chain_rank(error_rank: int, depth: int) -> int:
    """⌈rank(E) / L⌉."""
    if error_rank < 0 or depth < 1:
        raise ValueError(f"need rank(E) >= 0 and at least one layer, got {error_rank} and {depth}")
    return -(-error_rank // depth)


def chain_error(error: Matrix, rank: int, depth: int) -> float:
    """The smallest spectral error with rank R in each of L layers, σ_{RL+1}(E)."""
    values = np.linalg.svd(error, compute_uv=False)
    return float(values[rank * depth]) if rank * depth < len(values) else 0.0


def fit_chain(weights: Sequence[Matrix], error: Matrix, rank: int) -> list[Matrix]:
    """Updates ΔW_l of rank R that reach `chain_error`, as the lemma's proof builds them.

    With M_l = Π W + (E cut to rank l R) the adapted product after l layers is made M_l:
    ΔW_l = (W_L … W_{l+1})⁻¹ (M_l − M_{l−1}) ((W_{l−1} + ΔW_{l−1}) … (W_1 + ΔW_1))⁻¹.

    Args:
        weights: W_1 … W_L in the order in which they act, square and invertible.
    """
    u, s, vh = np.linalg.svd(error)
    width = len(error)
    after = [np.eye(width)]  # W_L … W_{l+1} for l = L, L − 1, …, 1
    for weight in reversed(weights[1:]):
        after.append(after[-1] @ weight)
    done, updates = np.eye(width), []
    for index, (weight, later) in enumerate(zip(weights, reversed(after), strict=True)):
        part = slice(index * rank, (index + 1) * rank)
        step = (u[:, part] * s[part]) @ vh[part]  # M_l − M_{l−1}
        updates.append(np.linalg.solve(later, step) @ np.linalg.inv(done))
        done = (weight + updates[-1]) @ done
    return updates
