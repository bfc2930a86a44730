"""stage=measure: the calibrated gap and the spectra of every adaptable layer, and the configured rule's rank plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from orca_rank.artifacts.command import command
from orca_rank.artifacts.files import file_hash, read_json, write_json, write_tensors
from orca_rank.artifacts.provenance import finished, plain, select
from orca_rank.artifacts.unfinished import Unfinished
from orca_rank.backbone import OrcaModel, adaptable_layers, create_model
from orca_rank.build import build
from orca_rank.measuring.activations import collect, module_of
from orca_rank.measuring.gradients import Gradients, collect_gradients
from orca_rank.measuring.layers import (
    VARIANTS,
    Record,
    Side,
    agreement,
    check_options,
    classes,
    gap_records,
    measurements,
    placeholder,
)
from orca_rank.ranks import Layer, RankPlan
from orca_rank.stages.planning import grouped, make_plan
from orca_rank.stages.setup import (
    aligned_embedder,
    bare_model,
    build_model,
    contents,
    device_of,
    outline,
    ready,
    resolve_backbone,
    source_side,
    stage_folder,
)

console = Console()


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
    made_from["contents"] = contents(
        config, "data", "source", *(f"measure.compare.{name}" for name in config.measure.compare)
    )
    if any(config.gap.measurements[name] for name in ("gradient", "importance", "fisher")):
        made_from["predictor"] = plain(config.predictor.module)  # gradients pass through it
    del made_from["layers"]["group"]  # how a rule reads the measurements does not change them
    if finished(path, made_from, force=config.force, made_by="stage=measure"):
        console.print(f"measure is done: {path} (force=true redoes it)", soft_wrap=True)
        layers = [Layer.from_dict(record) for record in read_json(path, "stage=measure")["layers"]]
    else:
        layers = _measure(config, folder, made_from)
    plan = make_plan(config, layers)
    plan = RankPlan(plan.ranks, plan.rule, plan.budget, plan.options, plan.allow_above_full, file_hash(path))
    ranks = folder / "ranks.json"
    write_json(ranks, plan.to_dict(), config=select(config, "layers", "rank", "budget"), inputs=[path])
    _print(layers, plan)
    console.print(f"written to {path} and {ranks}", soft_wrap=True)


def _measure(config: DictConfig, folder: Path, made_from: Mapping[str, Any]) -> list[Layer]:
    gap, seed = config.gap, int(config.seed)
    metrics = {name: build(node) for name, node in gap.metrics.items()}
    L.seed_everything(seed, verbose=False)
    target_data = build(config.data)
    _try_out(config, metrics, target_data)
    sets = {"source": _ready(config, config.source), "target": _ready(config, config.data)}
    compared = {f"compare/{name}": name for name in config.measure.compare}
    sets |= {key: _ready(config, config.measure.compare[name]) for key, name in compared.items()}
    model = build_model(config, sets["target"].task).eval().requires_grad_(False)
    layers = adaptable_layers(model.body, config.layers.target, config.layers.qkv)
    modules = {layer.name: module_of(layer.name, model.body) for layer in layers}
    wanted = gap.measurements
    tokens = gap.tokens if wanted.ot_map or wanted.activation else 0
    used = [aligned_embedder(config)] if config.embedder.aligned else []
    unfinished = Unfinished(folder, {**made_from, "embedder": [file_hash(path) for path in used]}, force=config.force)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:

        def side(name: str, body: OrcaModel, tokens: int) -> Side:
            return unfinished.part(name, _pass, config, body, sets[name], modules, tokens, progress, name)

        def gaps(name: str, side: Side) -> dict[str, dict[str, Record]]:
            records: dict[str, dict[str, Record]] = {module: {} for module in source.inputs}
            for metric, function in metrics.items():
                bar = _bar(progress, f"{metric}: {name}", len(records))
                one = {metric: function}
                found = unfinished.part(f"{name}-{metric}", gap_records, gap, seed, one, source, side, bar)
                for module, record in found.items():
                    records[module] |= record
            return records

        source = side("source", source_side(resolve_backbone(config), seed, sets["source"]), tokens)
        target = side("target", model, tokens)
        gradients = None
        if wanted.gradient or wanted.importance or wanted.fisher:
            gradients = unfinished.part("gradients", _gradients, config, model, sets["target"], modules, progress)
        found = gaps("target", target)
        rest, directions = measurements(
            gap, seed, layers, modules, model.body, source, target, gradients, _bar(progress, "spectra", len(layers))
        )
        measured = [Layer(x.name, x.d_in, x.d_out, found[modules[x.name]], rest[x.name]) for x in layers]
        for key, name in compared.items():
            torch.manual_seed(seed)
            other = side(key, create_model(resolve_backbone(config), sets[key].task, config.embedder.init), 0)
            found = gaps(key, other)
            records = [Layer(x.name, x.d_in, x.d_out, found[modules[x.name]]).to_dict() for x in layers]
            payload = {"name": name, "images": len(other.labels), "layers": records}
            write_json(folder / "compare" / f"{name}.json", payload, config=made_from)
    if directions:
        write_tensors(folder / "directions.safetensors", directions)
    payload = {
        "images": {"source": len(source.labels), "target": len(target.labels)},
        "agreement": agreement(measured),
        "layers": [layer.to_dict() for layer in measured],
    }
    write_json(folder / "layers.json", payload, config=made_from, inputs=used)
    unfinished.drop()
    return measured


def _try_out(config: DictConfig, metrics: Mapping[str, Callable[..., Any]], data: L.LightningDataModule) -> None:
    """Refuse before any work what would fail after it: a bad option, a rule whose measurement is turned off."""
    check_options(config.gap, metrics)
    body = bare_model(config, outline(data)).body
    layers = adaptable_layers(body, config.layers.target, config.layers.qkv)
    make_plan(config, [placeholder(config.gap, metrics, layer) for layer in layers])


def _embedder_at_hand(config: DictConfig) -> DictConfig:
    """The config with embedder.aligned turned off, and said so, where stage=align has not run."""
    if not config.embedder.aligned or aligned_embedder(config).exists():
        return config
    console.print(
        f"no aligned embedder at {aligned_embedder(config)}: measuring with the embedder's initialisation "
        f"(embedder.init={config.embedder.init}); `{command('stage=align')}` makes one",
        soft_wrap=True,
    )
    config = copy.deepcopy(config)
    config.embedder.aligned = False
    return config


def _ready(config: DictConfig, node: DictConfig) -> L.LightningDataModule:
    resized = "batch_size" in node and config.gap.batch_size is not None
    return ready(node, **({"batch_size": config.gap.batch_size} if resized else {}))


def _watched(model: OrcaModel, modules: Mapping[str, str]) -> dict[str, torch.nn.Module]:
    return {name: model.body.get_submodule(name) for name in dict.fromkeys(modules.values())}


def _images(config: DictConfig, data: L.LightningDataModule) -> tuple[Any, int]:
    loader = data.train_dataloader()
    return loader, min(int(config.gap.samples), len(loader.dataset))


def _pass(
    config: DictConfig,
    model: OrcaModel,
    data: L.LightningDataModule,
    modules: Mapping[str, str],
    tokens: int,
    progress: Progress,
    name: str,
) -> Side:
    """Images through embedder and body: what reaches every adaptable module."""
    L.seed_everything(int(config.seed), verbose=False)  # the order of the images, whatever ran before
    device = device_of(config)
    model = model.eval().to(device)
    loader, samples = _images(config, data)
    inputs, labels = collect(
        lambda x: model.body(model.embedder(x)),
        _watched(model, modules),
        loader,
        samples,
        tokens=tokens,
        seed=int(config.seed),
        device=device,
        advance=_bar(progress, f"images: {name}", samples),
    )
    return Side(inputs, classes(labels, int(config.seed)))


def _gradients(
    config: DictConfig, model: OrcaModel, data: L.LightningDataModule, modules: Mapping[str, str], progress: Progress
) -> dict[str, Gradients]:
    """The target's loss at the start of fine-tuning, backward to every adaptable module."""
    L.seed_everything(int(config.seed), verbose=False)
    device = device_of(config)
    model = model.eval().to(device)
    loader, samples = _images(config, data)
    return collect_gradients(
        model.embedder,
        model.head,
        data.task.loss,
        _watched(model, modules),
        loader,
        samples,
        draws=config.gap.sign_draws,
        seed=int(config.seed),
        device=device,
        advance=_bar(progress, "gradients", samples),
    )


def _bar(progress: Progress, name: str, total: int) -> Callable[..., None]:
    task = progress.add_task(name, total=total)
    return lambda steps=1: progress.advance(task, steps)


def _print(layers: Sequence[Layer], plan: RankPlan) -> None:
    """One row a layer; q, k and v of one matrix share a row because they share their input."""
    metrics = list(dict.fromkeys(metric for layer in layers for metric in layer.gap))
    nulls = [kind for kind in ("ot_map", "gradient") if kind in layers[0].measured]
    wide = console.width >= 110
    shown = [metric for metric in metrics if not metric.endswith(tuple(VARIANTS))] if wide else metrics[:1]
    table = Table()
    for title in ("layer", *(["d_in × d_out"] if wide or not nulls else []), *shown, *nulls, "gap", "rank"):
        table.add_column(title, justify="left" if title in ("layer", "gap") else "right", no_wrap=True)
    largest = max(layer.gap[shown[0]]["value"] for layer in layers)
    for name, members in grouped(layers).items():
        first = members[0]
        share = first.gap[shown[0]]["value"] / largest if largest > 0 else 0.0
        counts = [" ".join(str(member.measured[kind]["rank"]) for member in members) for kind in nulls]
        ranks = " ".join(str(plan[member.name]) for member in members)
        values = [_starred(first.gap[metric]) for metric in shown]
        shape = [f"{first.d_in} × {first.d_out}"] if wide or not nulls else []
        table.add_row(name, *shape, *values, *counts, "█" * round(10 * max(share, 0)), ranks)
    console.print(table)
    console.print("* p < 0.05 for all layers together; intervals and p-values are in layers.json")
    if nulls:
        console.print(f"{' and '.join(nulls)}: singular values above their noise floor")
    found = agreement(layers)
    for name in ("depth", f"{metrics[0]} gap"):
        others = [other for other in found.get(name, {}) if not any(variant in other for variant in VARIANTS)]
        pairs = [f"{other} {found[name][other]:+.2f}" for other in others if other not in ("depth", name)]
        if pairs:
            console.print(f"rank correlation with {name}: {', '.join(pairs)}")
    console.print(
        f"rule {plan.rule}: mean rank {plan.total_rank / len(layers):.2f}, "
        f"{plan.parameters(layers):,} adapter parameters"
    )


def _starred(gap: Mapping[str, float | None]) -> str:
    family = gap.get("p_family")
    return f"{gap['value']:.3g}" + ("*" if family is not None and family < 0.05 else " ")
