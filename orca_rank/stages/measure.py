"""stage=measure: the calibrated gap and the spectra of every adaptable layer, and the configured rule's rank plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from orca_rank.artifacts import file_hash, finished, select, stage_folder, write_json
from orca_rank.backbone import OrcaModel, adaptable_layers, create_model, source_model
from orca_rank.build import build
from orca_rank.distances.null import Gap, calibrate, family_p, standardise, whiten
from orca_rank.distances.scores import has_fast_route
from orca_rank.ranks import Layer, RankPlan
from orca_rank.stages.parts import aligned_embedder, build_model, make_plan, resolve_backbone
from orca_rank.statistics import Inputs, collect, module_of

console = Console()
VARIANTS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "standardised": standardise,
    "whitened": whiten,
}


def run(config: DictConfig) -> None:
    """Measure as configured and write measure/layers.json, measure/compare/<name>.json and measure/ranks.json.

    The plan is made anew whenever the stage runs; what was measured under the same options is kept.

    Raises:
        ValueError: for an unknown variant, a rule that needs a measurement that is turned off, or bad features.
    """
    config = _embedder_at_hand(config)
    folder = stage_folder(config, "measure")
    path = folder / "layers.json"
    made_from = select(config, "data", "source", "backbone", "layers", "embedder", "seed", "gap", "measure")
    if finished(path, made_from, force=config.force, made_by="stage=measure"):
        console.print(f"measure is done: {path} (force=true redoes it)", soft_wrap=True)
        layers = [Layer.from_dict(record) for record in _read(path)]
    else:
        layers = _measure(config, folder, made_from)
    _plan(config, layers, path)


def _measure(config: DictConfig, folder: Path, made_from: Mapping[str, Any]) -> list[Layer]:
    if unknown := sorted(set(config.gap.variants) - set(VARIANTS)):
        raise ValueError(f"gap.variants has {unknown}; there are {', '.join(VARIANTS)}")
    metrics = {name: build(node) for name, node in config.gap.metrics.items()}
    L.seed_everything(config.seed, verbose=False)
    device = _device(config)
    target_data = _data(config, config.data)
    model = build_model(config, target_data.task).eval().to(device)
    layers = adaptable_layers(model.body, config.layers.target, config.layers.qkv)
    others = {name: _data(config, node) for name, node in config.measure.compare.items()}

    with _progress() as progress:
        source = _pass(
            config, source_model(resolve_backbone(config)), _data(config, config.source), layers, progress, "source"
        )
        target = _pass(config, model, target_data, layers, progress, "target")
        gaps = _gaps(config, metrics, layers, source, target, progress, "target")
        measured = [Layer(layer.name, layer.d_in, layer.d_out, gaps[layer.name]) for layer in layers]
        for name, data in others.items():
            torch.manual_seed(config.seed)
            other = create_model(resolve_backbone(config), data.task, config.embedder.init)
            inputs = _pass(config, other, data, layers, progress, name)
            found = _gaps(config, metrics, layers, source, inputs, progress, name)
            records = [Layer(layer.name, layer.d_in, layer.d_out, found[layer.name]).to_dict() for layer in layers]
            write_json(folder / "compare" / f"{name}.json", {"name": name, "layers": records}, config=made_from)
    used = [aligned_embedder(config)] if config.embedder.aligned else []
    write_json(
        folder / "layers.json",
        {"images": len(target[1]), "layers": [layer.to_dict() for layer in measured]},
        config=made_from,
        inputs=used,
    )
    return measured


def _embedder_at_hand(config: DictConfig) -> DictConfig:
    """The config with embedder.aligned turned off, and said so, where stage=align has not run."""
    if not config.embedder.aligned or aligned_embedder(config).exists():
        return config
    console.print(
        f"no aligned embedder at {aligned_embedder(config)}: measuring with the embedder's initialisation "
        f"(embedder.init={config.embedder.init}); `python -m orca_rank stage=align run={config.run}` makes one",
        soft_wrap=True,
    )
    config = copy.deepcopy(config)
    config.embedder.aligned = False
    return config


def _data(config: DictConfig, node: DictConfig) -> L.LightningDataModule:
    options = {} if config.gap.batch_size is None or "batch_size" not in node else {"batch_size": config.gap.batch_size}
    data = build(node, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def _device(config: DictConfig) -> torch.device:
    wanted = config.trainer.get("accelerator", "auto")
    return torch.device("cuda" if wanted in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu")


def _pass(
    config: DictConfig,
    model: OrcaModel,
    data: L.LightningDataModule,
    layers: Sequence[Layer],
    progress: Progress,
    name: str,
) -> tuple[dict[str, Inputs], Tensor]:
    """Images through embedder and body; what reaches every adaptable module, and the labels."""
    device = _device(config)
    model = model.eval().to(device)
    modules = {name: model.body.get_submodule(name) for name in _modules(model, layers).values()}
    loader = data.train_dataloader()
    samples = min(config.gap.samples, len(loader.dataset))
    bar = progress.add_task(f"images: {name}", total=samples)
    return collect(
        lambda x: model.body(model.embedder(x)),
        modules,
        loader,
        samples,
        seed=config.seed,
        device=device,
        advance=lambda images: progress.advance(bar, images),
    )


def _modules(model: OrcaModel, layers: Sequence[Layer]) -> dict[str, str]:
    return {layer.name: module_of(layer.name, model.body) for layer in layers}


def _gaps(
    config: DictConfig,
    metrics: Mapping[str, Callable[..., Any]],
    layers: Sequence[Layer],
    source: tuple[dict[str, Inputs], Tensor],
    target: tuple[dict[str, Inputs], Tensor],
    progress: Progress,
    name: str,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """layer -> metric -> {"value", "low", "high", "p", "p_family"}; layers that share an input share the result."""
    (x, x_label), (y, y_label) = source, target
    x_class, y_class = classes(x_label, config.seed), classes(y_label, config.seed)
    bar = progress.add_task(f"gaps: {name}", total=len(x) * len(metrics))
    found: dict[str, dict[str, Gap]] = {}
    for metric, function in metrics.items():
        draws = config.gap if has_fast_route(function) else config.gap.slow
        for module in x:
            pair = x[module].pooled.numpy(), y[module].pooled.numpy()
            versions = {metric: pair} | {f"{metric}_{v}": VARIANTS[v](*pair) for v in config.gap.variants}
            for key, (left, right) in versions.items():
                found.setdefault(key, {})[module] = calibrate(
                    function,
                    left,
                    right,
                    x_class,
                    y_class,
                    splits=config.gap.splits,
                    bootstrap=draws.bootstrap,
                    permutations=draws.permutations,
                    seed=config.seed,
                )
            progress.advance(bar)
    gaps: dict[str, dict[str, dict[str, float | None]]] = {module: {} for module in x}
    for key, by_module in found.items():
        family = family_p(
            np.array([gap.observed for gap in by_module.values()]), np.stack([g.null for g in by_module.values()])
        )
        for (module, gap), together in zip(by_module.items(), family, strict=True):
            values = {"value": gap.value, "low": gap.low, "high": gap.high, "p": gap.p}
            values["p_family"] = float(together) if len(gap.null) else float("nan")
            gaps[module][key] = {k: None if np.isnan(v) else round(float(v), 6) for k, v in values.items()}
    return {layer.name: gaps[_shared(layer.name, gaps)] for layer in layers}


def _shared(layer: str, modules: Mapping[str, Any]) -> str:
    return layer if layer in modules else layer.rpartition(".")[0]


def classes(labels: Tensor, seed: int, clusters: int = 10) -> np.ndarray:
    """Class of every image; fields (n, c, H, W) are grouped by k-means of their values, k = 10, as in ORCA."""
    if labels.ndim == 1:
        return labels.numpy().astype(np.int64)
    from sklearn.cluster import KMeans

    flat = labels.flatten(1).numpy()
    return KMeans(min(clusters, len(flat)), n_init=1, random_state=seed).fit_predict(flat).astype(np.int64)


def _read(path: Path) -> list[dict[str, Any]]:
    from orca_rank.artifacts import read_json

    return read_json(path, "stage=measure")["layers"]


def _plan(config: DictConfig, layers: list[Layer], path: Path) -> None:
    plan = make_plan(config, layers)
    plan = RankPlan(plan.ranks, plan.rule, plan.budget, plan.options, plan.allow_above_full, file_hash(path))
    ranks = path.parent / "ranks.json"
    write_json(ranks, plan.to_dict(), config=select(config, "rank", "budget"), inputs=[path])
    _print(layers, plan, path, ranks)


def _print(layers: Sequence[Layer], plan: RankPlan, path: Path, ranks: Path) -> None:
    metrics = list(dict.fromkeys(metric for layer in layers for metric in layer.gap))
    table = Table("layer", "d_in × d_out", *[f"{metric} gap" for metric in metrics], "", "rank")
    largest = max((layer.gap[metrics[0]]["value"] for layer in layers), default=0.0) if metrics else 0.0
    for layer in layers:
        cells = [_interval(layer.gap[metric]) for metric in metrics]
        share = max(0.0, layer.gap[metrics[0]]["value"] / largest) if largest > 0 else 0.0
        table.add_row(
            layer.name, f"{layer.d_in} × {layer.d_out}", *cells, "█" * round(16 * share), str(plan[layer.name])
        )
    console.print(table)
    console.print(f"bars: {metrics[0] if metrics else 'none'}; * p < 0.05 over all layers together (permutations)")
    console.print(f"rule {plan.rule}: {plan.parameters(layers):,} adapter parameters, mean rank "
                  f"{plan.total_rank / len(layers):.2f}")  # fmt: skip
    console.print(f"written to {path} and {ranks}", soft_wrap=True)


def _interval(gap: Mapping[str, float | None]) -> str:
    star = "*" if gap.get("p_family") is not None and gap["p_family"] < 0.05 else " "
    if gap["low"] is None:
        return f"{gap['value']:.3f}{star}"
    return f"{gap['value']:.3f}{star} [{gap['low']:.3f}, {gap['high']:.3f}]"


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
