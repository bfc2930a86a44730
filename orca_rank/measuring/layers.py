"""From what was collected at a layer to its entry in layers.json: gaps, spectra and single numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from scipy.stats import spearmanr
from torch import Tensor, nn

from orca_rank.distances.calibrate import Gap, calibrate, family_p, standardise, whiten
from orca_rank.distances.scores import check_metric, has_fast_route
from orca_rank.measuring.activations import Inputs
from orca_rank.measuring.gradients import Gradients
from orca_rank.measuring.records import Layer
from orca_rank.measuring.spectra import Spectrum, activation, intrinsic_dimension, ot_map, transport, weight_ranks

VARIANTS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "standardised": standardise,
    "whitened": whiten,
}
MEASUREMENTS = ("weight", "ot_map", "activation", "intrinsic_dimension", "gradient", "importance", "fisher")
KEPT = 32  # singular values of a layer in layers.json
NEGLIGIBLE = 1e-6  # of the largest
Record = dict[str, Any]


class Side(NamedTuple):
    """What one dataset sent through its model: module -> inputs, and the class of every image."""

    inputs: dict[str, Inputs]
    labels: np.ndarray


def classes(labels: Tensor, seed: int, clusters: int = 10) -> np.ndarray:
    """Class of every image; fields (n, c, H, W) are grouped by k-means of their values, k = 10, as in ORCA."""
    if labels.ndim == 1:
        return labels.numpy().astype(np.int64)
    from sklearn.cluster import KMeans

    flat = labels.flatten(1).numpy()
    return KMeans(min(clusters, len(flat)), n_init=1, random_state=seed).fit_predict(flat).astype(np.int64)


def gap_records(
    gap: DictConfig,
    seed: int,
    metrics: Mapping[str, Callable[..., Any]],
    source: Side,
    target: Side,
    advance: Callable[[], None],
) -> dict[str, dict[str, Record]]:
    """module -> metric -> {"value", "low", "high", "p", "p_family"}; a variant is a metric of its own."""
    found: dict[str, dict[str, Gap]] = {}
    for metric, function in metrics.items():
        draws = gap if has_fast_route(function) else gap.slow
        for module in source.inputs:
            pair = source.inputs[module].pooled.numpy(), target.inputs[module].pooled.numpy()
            versions = {metric: pair} | {f"{metric}_{name}": VARIANTS[name](*pair) for name in gap.variants}
            for key, (x, y) in versions.items():
                try:
                    found.setdefault(key, {})[module] = calibrate(
                        function,
                        x,
                        y,
                        source.labels,
                        target.labels,
                        splits=gap.splits,
                        bootstrap=draws.bootstrap,
                        permutations=draws.permutations,
                        seed=seed,
                    )
                except ValueError as error:
                    raise ValueError(f"{key} at the input of {module}: {error}") from error
            advance()
    records: dict[str, dict[str, Record]] = {module: {} for module in source.inputs}
    for key, by_module in found.items():
        observed = np.array([value.observed for value in by_module.values()])
        together = family_p(observed, np.stack([value.null for value in by_module.values()]))
        for (module, value), p_family in zip(by_module.items(), together, strict=True):
            numbers = {"value": value.value, "low": value.low, "high": value.high, "p": value.p}
            numbers["p_family"] = float(p_family) if len(value.null) else float("nan")
            records[module][key] = {name: _short(number) for name, number in numbers.items()}
    return records


def measurements(
    gap: DictConfig,
    seed: int,
    layers: Sequence[Layer],
    modules: Mapping[str, str],
    body: nn.Module,
    source: Side,
    target: Side,
    gradients: Mapping[str, Gradients] | None,
    advance: Callable[[], None],
) -> tuple[dict[str, Record], dict[str, Tensor]]:
    """layer -> what else was measured, and the directions `<measurement>/<layer>.A` and `.B`."""
    wanted = gap.measurements
    names = list(source.inputs)
    dimensions = _dimensions(names, body, target) if wanted.intrinsic_dimension else {}
    records: dict[str, Record] = {}
    directions: dict[str, Tensor] = {}
    module, carried, active = "", None, None
    for layer in layers:
        weight, rows = _weight(body, layer.name, modules[layer.name])
        if modules[layer.name] != module:  # q, k and v follow each other and share their input
            module = modules[layer.name]
            if wanted.ot_map:
                sides = source.inputs[module].tokens, target.inputs[module].tokens
                carried = transport(*sides, splits=gap.null_splits, components=gap.components, seed=seed)
            if wanted.activation:
                active = activation(target.inputs[module].tokens, KEPT, seed)
        record = records[layer.name] = {}
        spectra: dict[str, Spectrum] = {}
        if wanted.weight:
            record["weight"] = {name: _short(value) for name, value in weight_ranks(weight).items()}
        if carried is not None:
            spectra["ot_map"] = ot_map(weight, carried, KEPT)
        if active is not None:
            spectra["activation"] = active
        if module in dimensions:
            record["intrinsic_dimension"] = dimensions[module]
        if gradients is not None:
            own = gradients[module]
            if wanted.gradient:
                spectra["gradient"] = own.spectrum(rows, KEPT)
            if wanted.importance:
                record["importance"] = _short(own.importance(body.get_submodule(module).weight, rows))
            if wanted.fisher:
                record["fisher"] = _short(own.fisher(rows))
        for name, spectrum in spectra.items():
            record[name] = _spectrum(spectrum)
            directions[f"{name}/{layer.name}.A"] = spectrum.a[: gap.directions].float()
            if spectrum.b is not None:
                directions[f"{name}/{layer.name}.B"] = spectrum.b[:, : gap.directions].float()
        advance()
    return records, directions


def check_options(gap: DictConfig, metrics: Mapping[str, Callable[..., Any]]) -> None:
    """Raise ValueError, naming the option, for what cannot be measured."""
    if unknown := sorted(set(gap.variants) - set(VARIANTS)):
        raise ValueError(f"gap.variants has {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    if unknown := sorted(set(gap.measurements) - set(MEASUREMENTS)):
        raise ValueError(f"gap.measurements has {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}")
    if not metrics:
        raise ValueError("gap.metrics is empty: name at least one metric, such as mmd in gap=default")
    for name, metric in metrics.items():
        check_metric(name, metric)
    wanted = gap.measurements
    least = {"samples": 8, "splits": 1, "bootstrap": 0, "permutations": 0, "slow.bootstrap": 0, "slow.permutations": 0}
    least |= {"tokens": 2, "components": 1, "directions": 0} if wanted.ot_map or wanted.activation else {}
    least |= {"null_splits": 2} if wanted.ot_map else {}
    least |= {"sign_draws": 2} if wanted.gradient else {}
    for name, smallest in least.items():
        value = OmegaConf.select(gap, name)
        if not isinstance(value, int) or value < smallest:
            raise ValueError(f"gap.{name} must be an integer of at least {smallest}, received {value!r}")


def agreement(layers: Sequence[Layer]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation over layers between depth and everything that gives one number a layer."""
    columns: dict[str, list[float]] = {"depth": [float(place) for place in range(len(layers))]}
    for layer in layers:
        for metric, gap in layer.gap.items():
            columns.setdefault(f"{metric} gap", []).append(gap["value"])
        for kind, value in layer.measured.items():
            if isinstance(value, float):
                columns.setdefault(kind, []).append(value)
            elif kind in ("ot_map", "gradient"):
                columns.setdefault(f"{kind} rank", []).append(float(value["rank"]))
            elif kind == "weight":
                columns.setdefault("stable rank", []).append(value["stable_rank"])
    varying = {name: values for name, values in columns.items() if len(set(values)) > 1}
    return {
        name: {other: round(float(spearmanr(values, others).statistic), 3) for other, others in varying.items()}
        for name, values in varying.items()
    }


def placeholder(gap: DictConfig, metrics: Mapping[str, Callable[..., Any]], layer: Layer) -> Layer:
    """A layer with a stand-in for everything that will be measured, to try a rank rule before the work is done."""
    spectrum = {"singular_values": [1.0], "null": 0.5, "energy": 1.0, "rank": 1}
    stand_in: Record = {
        "weight": {"stable_rank": 1.0, "effective_rank": 1.0},
        "intrinsic_dimension": {"input": 1.0, "output": 1.0},
        "importance": 1.0,
        "fisher": 1.0,
    }
    measured = {name: stand_in.get(name, spectrum) for name, wanted in gap.measurements.items() if wanted}
    gaps: dict[str, Record] = {}
    for metric, function in metrics.items():
        draws = gap if has_fast_route(function) else gap.slow
        p = 0.5 if draws.permutations else None
        one = {"value": 1.0, "low": 1.0, "high": 1.0, "p": p, "p_family": p}
        gaps |= {f"{metric}{variant}": one for variant in ("", *(f"_{v}" for v in gap.variants))}
    return Layer(layer.name, layer.d_in, layer.d_out, gaps, measured)


def _weight(body: nn.Module, layer: str, module: str) -> tuple[Tensor, slice]:
    weight = body.get_submodule(module).weight.detach().cpu()
    if layer == module:
        return weight, slice(None)
    third = len(weight) // 3
    part = "qkv".index(layer.rpartition(".")[2])
    rows = slice(part * third, (part + 1) * third)
    return weight[rows], rows


def _dimensions(names: Sequence[str], body: nn.Module, target: Side) -> dict[str, Record]:
    """Intrinsic dimension of a module's inputs and of the next one's; the last module is followed by its own output."""
    last = body.get_submodule(names[-1])
    with torch.no_grad():
        output = last(target.inputs[names[-1]].pooled.to(last.weight.device)).cpu()
    found = [intrinsic_dimension(target.inputs[name].pooled) for name in names] + [intrinsic_dimension(output)]
    return {
        name: {"input": _short(before), "output": _short(after)}
        for name, before, after in zip(names, found, found[1:], strict=False)
    }


def _spectrum(spectrum: Spectrum) -> Record:
    values = spectrum.values.tolist()
    return {
        "singular_values": [_short(value) for value in values if value > NEGLIGIBLE * values[0]],
        "null": None if spectrum.null is None else _short(spectrum.null),
        "energy": _short(spectrum.energy),
        "rank": spectrum.rank,
    }


def _short(value: float) -> float | None:
    """Six significant digits; None for what was not measured."""
    return None if np.isnan(value) else float(f"{float(value):.6g}")
