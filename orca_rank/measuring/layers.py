"""From what was collected at a layer to its record: gaps, spectra and single numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from orca_rank.distances.calibrate import Calibrated, calibrate, family_p
from orca_rank.distances.scores import Metric
from orca_rank.measuring.activations import Inputs, collect
from orca_rank.measuring.classes import Labeller
from orca_rank.measuring.gradients import Gradients
from orca_rank.measuring.hidden import block_of
from orca_rank.measuring.matrices import matrix_of, weight_of
from orca_rank.measuring.options import VARIANTS, GapOptions
from orca_rank.measuring.passes import Shared
from orca_rank.measuring.records import SPECTRA, Dimension, Gap, Layer, Spectrum, WeightRank
from orca_rank.measuring.spectra import Decomposition, activation, ot_map, transport, weight_rank

KEPT = 32  # singular values of a layer in layers.json
NULLED = ("ot_map", "gradient", "whitened_gradient")  # spectra with a noise floor
NEGLIGIBLE = 1e-6  # of the largest


class Side(NamedTuple):
    """What one dataset sent through its model: module -> inputs, and the class of every image."""

    inputs: dict[str, Inputs]
    labels: Int[np.ndarray, " n"]


def take_side(
    model: Callable[[Any], object],
    modules: Mapping[str, nn.Module],
    batches: Iterable[Sequence[Any]],
    samples: int,
    clusters: int,
    *,
    tokens: int,
    seed: int,
    device: torch.device,
    shared: Shared | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> Side:
    """What images send to every module, see `collect`, and their classes: k-means clusters of targets that are no
    classes, one class where there are no targets."""
    inputs, y = collect(
        model, modules, batches, samples, tokens=tokens, seed=seed, device=device, shared=shared, advance=advance
    )
    images = len(next(iter(inputs.values())).pooled)
    return Side(inputs, np.zeros(images, np.int64) if y is None else Labeller(y, clusters, seed)(y).numpy())


def layer_gaps(
    name: str,
    metric: Metric,
    options: GapOptions,
    seed: int,
    source: Side,
    target: Side,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Gap]]:
    """module -> {metric: gap} of one metric; a variant is a metric of its own, `<name>_<variant>`.

    Raises:
        ValueError: if a module's inputs cannot be compared, naming metric and module.
    """
    draws = options.draws(metric)
    found: dict[str, dict[str, Calibrated]] = {}
    for module in source.inputs:
        pair = source.inputs[module].pooled.numpy(), target.inputs[module].pooled.numpy()
        versions = {name: pair} | {f"{name}_{variant}": VARIANTS[variant](*pair) for variant in options.variants}
        for key, (x, y) in versions.items():
            try:
                found.setdefault(key, {})[module] = calibrate(
                    metric,
                    x,
                    y,
                    source.labels,
                    target.labels,
                    splits=options.splits,
                    bootstrap=draws.bootstrap,
                    permutations=draws.permutations,
                    seed=seed,
                )
            except ValueError as error:
                raise ValueError(f"{key} at the input of {module}: {error}") from error
        advance()
    gaps: dict[str, dict[str, Gap]] = {module: {} for module in source.inputs}
    for key, by_module in found.items():
        observed = np.array([one.observed for one in by_module.values()])
        together = family_p(observed, np.stack([one.null for one in by_module.values()]))
        for (module, one), p_family in zip(by_module.items(), together, strict=True):
            family = float(p_family) if len(one.null) else None
            low, high, p, family = (_known(number) for number in (one.low, one.high, one.p, family))
            gaps[module][key] = Gap(_short(one.value), low, high, p, family)
    return gaps


def measurements(
    options: GapOptions,
    seed: int,
    layers: Sequence[Layer],
    modules: Mapping[str, str],
    body: nn.Module,
    source: Side,
    target: Side,
    gradients: Mapping[str, Gradients] | None,
    dimensions: Mapping[str, tuple[float, float]],
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[Layer], dict[str, Tensor]]:
    """The layers with everything but gaps, and the directions `<spectrum>/<layer>.A` (k, d_in) and `.B` (d_out, k),
    with the mean gradients `mean_gradient/<layer>.G` (d_out, d_in).

    Args:
        modules: layer -> the module whose inputs it reads. gradients: by module; None where nothing asks for them.
        dimensions: of the hidden states at both ends of a block, see `hidden_dimensions`; empty likewise.
    """
    asks = options.asks
    measured: list[Layer] = []
    directions: dict[str, Tensor] = {}
    module, carried, active = "", None, None
    for layer in layers:
        whole = weight_of(matrix_of(body, modules[layer.name])).detach().cpu()
        rows = _rows(layer.name, modules[layer.name], len(whole))
        if modules[layer.name] != module:  # q, k and v follow each other and share their input
            module = modules[layer.name]
            tokens = source.inputs[module].tokens, target.inputs[module].tokens
            if asks("ot_map"):
                carried = transport(*tokens, splits=options.null_splits, components=options.components, seed=seed)
            if asks("activation"):
                active = activation(tokens[1], KEPT, seed)
        found: dict[str, Decomposition] = {}
        if carried is not None:
            found["ot_map"] = ot_map(whole[rows], carried, KEPT)
        if active is not None:
            found["activation"] = active
        if gradients is not None and asks("gradient"):
            found["gradient"] = gradients[module].spectrum(rows, KEPT)
        if gradients is not None and asks("whitened_gradient"):
            found["whitened_gradient"] = gradients[module].whitened(rows, KEPT)
        for name, one in found.items():
            directions[f"{name}/{layer.name}.A"] = one.a[: options.directions].float()
            if one.b is not None:
                directions[f"{name}/{layer.name}.B"] = one.b[:, : options.directions].float()
        own = None if gradients is None else gradients[module]
        if own is not None and asks("mean_gradient"):
            directions[f"mean_gradient/{layer.name}.G"] = own.mean(rows).float().cpu()
        measured.append(
            Layer(
                layer.name,
                layer.d_in,
                layer.d_out,
                weight=_short_ranks(weight_rank(whole[rows])) if asks("weight") else None,
                intrinsic_dimension=_dimension(dimensions, block_of(module)),
                importance=_short(own.importance(whole, rows)) if own is not None and asks("importance") else None,
                fisher=_short(own.fisher(rows)) if own is not None and asks("fisher") else None,
                spectra={name: _spectrum(one) for name, one in found.items()},
            )
        )
        advance()
    return measured, directions


def agreement(layers: Sequence[Layer]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation over layers between depth and everything that gives one number a layer."""
    rows = [_numbers(layer, depth) for depth, layer in enumerate(layers)]
    columns = {name: [row[name] for row in rows] for name in rows[0] if all(name in row for row in rows)}
    varying = {name: values for name, values in columns.items() if len(set(values)) > 1}
    if not varying:
        return {}
    found = np.atleast_2d(np.corrcoef([_ranked(values) for values in varying.values()]))
    return {
        name: {other: round(float(value), 3) for other, value in zip(varying, row, strict=True)}
        for name, row in zip(varying, found, strict=True)
    }


def _ranked(values: Sequence[float]) -> Float[np.ndarray, " n"]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]


def placeholder(options: GapOptions, layer: Layer) -> Layer:
    """A layer with a stand-in for everything that will be measured, to try a rank rule before the work is done."""
    asks = options.asks
    gaps: dict[str, Gap] = {}
    for metric, function in options.metrics.items():
        p = 0.5 if options.draws(function).permutations else None
        names = (metric, *(f"{metric}_{variant}" for variant in options.variants))
        gaps |= {name: Gap(1.0, 1.0, 1.0, p, p) for name in names}
    return Layer(
        layer.name,
        layer.d_in,
        layer.d_out,
        gaps,
        WeightRank(1.0, 1.0) if asks("weight") else None,
        Dimension(1.0, 1.0) if asks("intrinsic_dimension") else None,
        1.0 if asks("importance") else None,
        1.0 if asks("fisher") else None,
        {name: Spectrum((1.0,), 0.5, 1.0, 1) for name in SPECTRA if asks(name)},
    )


def _numbers(layer: Layer, depth: int) -> dict[str, float]:
    """What is known of a layer as one number each, under the names of the report."""
    found = {"depth": float(depth)} | {f"{metric} gap": gap.value for metric, gap in layer.gap.items()}
    stable = None if layer.weight is None else layer.weight.stable_rank
    ranks = {f"{name} rank": layer.spectra[name].rank for name in NULLED if name in layer.spectra}
    others = {"stable rank": stable, "importance": layer.importance, "fisher": layer.fisher, **ranks}
    return found | {name: float(value) for name, value in others.items() if value is not None}


def _rows(layer: str, module: str, outputs: int) -> slice:
    """The outputs of a layer: all of its module's, or a third for q, k or v of a fused matrix."""
    if layer == module:
        return slice(None)
    third, part = outputs // 3, "qkv".index(layer.rpartition(".")[2])
    return slice(part * third, (part + 1) * third)


def _dimension(found: Mapping[str, tuple[float, float]], block: str) -> Dimension | None:
    return Dimension(*(_short(one) for one in found[block])) if block in found else None


def _spectrum(found: Decomposition) -> Spectrum:
    values = found.values.tolist()
    kept = tuple(_short(value) for value in values if value > NEGLIGIBLE * values[0])
    return Spectrum(kept, _known(found.null), _short(found.energy), found.rank)


def _short_ranks(weight: WeightRank) -> WeightRank:
    return WeightRank(_short(weight.stable_rank), _short(weight.effective_rank))


def _short(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


def _known(value: float | None) -> float | None:
    """Six significant digits; None for what was not measured."""
    return None if value is None or math.isnan(value) else _short(value)
