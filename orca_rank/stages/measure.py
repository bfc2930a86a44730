"""stage=measure: the calibrated gap and the spectra of every adaptable layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from orca_rank.artifacts.command import command, leave
from orca_rank.artifacts.files import file_hash, read_json, read_tensors, write_json, write_tensors
from orca_rank.artifacts.provenance import finished, plain, select
from orca_rank.artifacts.unfinished import Unfinished, tidy
from orca_rank.backbone import OrcaModel, create_model
from orca_rank.build import build
from orca_rank.data import Data
from orca_rank.data.module import InMemory
from orca_rank.measuring.activations import Inputs, module_of
from orca_rank.measuring.gradients import Gradients
from orca_rank.measuring.layers import Side, agreement, layer_gaps, measurements, placeholder
from orca_rank.measuring.matrices import adaptable_layers
from orca_rank.measuring.options import GRADIENTS, VARIANTS, GapOptions
from orca_rank.measuring.records import Gap, Layer
from orca_rank.options import whole
from orca_rank.processes import agreed, first, first_alone
from orca_rank.stages.layer_table import gap_table, nulls
from orca_rank.stages.passing import Pass, labelled
from orca_rank.stages.planning import gap_options, make_plan, read_layers
from orca_rank.stages.setup import (
    aligned_embedder,
    bare_layers,
    build_model,
    check_model,
    contents,
    held,
    ready,
    resolve_backbone,
    seed_everything,
    source_side,
    stage_folder,
)
from orca_rank.stages.tracking import show, shown
from orca_rank.stages.trainer import device_of
from orca_rank.task import Task
from orca_rank.tracking.pages import measure_page

console = Console(markup=False)


def check_options(config: DictConfig) -> GapOptions:
    """The options of this stage, checked, and whether the rank rule can work with what is measured.

    Raises:
        ValueError: for a value that means nothing, or a rule that needs a measurement that is turned off.
    """
    check_model(config)
    if not isinstance(plain(config.measure.compare), dict):
        raise ValueError(f"measure.compare={config.measure.compare}: expected names with a data config each, or {{}}")
    if not isinstance(config.measure.fitted, str | None):
        raise ValueError(f"measure.fitted={config.measure.fitted}: expected the folder of a fine-tune, or null")
    whole("align.clusters", config.align.clusters)
    source = build(config.source)
    if getattr(source, "embedded", False) and config.backbone.pretrained != "on_source":
        source_side(resolve_backbone(config), config.seed, source)  # refuses tokens of another backbone
    options = gap_options(config.gap)
    options.check_unlabelled([name for name, node in _nodes(config).items() if not labelled(build(node))])
    make_plan(config, [placeholder(options, layer) for layer in bare_layers(config)[1]])
    return options


def run(config: DictConfig) -> None:
    """Measure as configured and write measure/layers.json and measure/compare/<name>.json; what was measured under the
    same options is kept.

    Raises:
        ValueError: for a bad option, a rule that needs a measurement that is turned off, or bad features.
            BlockingIOError: another process is at work in the folder.
    """
    options = check_options(config)
    config = _embedder_at_hand(config)
    folder = stage_folder(config, "measure")
    path = folder / "layers.json"
    made_from = select(config, "data", "source", "backbone", "layers", "embedder", "seed", "gap", "measure")
    made_from["clusters"] = config.align.clusters
    made_from["contents"] = contents(
        config, "data", "source", "backbone", *(f"measure.compare.{name}" for name in config.measure.compare)
    )
    if options.asks(*GRADIENTS):
        made_from["predictor"] = plain(config.predictor.module)  # gradients pass through it
    del made_from["layers"]["group"]  # how a rule reads the measurements does not change them

    def done() -> bool:
        return agreed(lambda: finished(path, made_from, force=config.force, made_by="stage=measure"))

    before = done()
    if not before:
        with held(folder):
            if not done():
                _measure(config, options, folder, made_from)
    if not first():
        return
    layers = read_layers(path)
    if before:
        tidy(folder)
        console.print(f"measure is done: {path} (force=true redoes it)", soft_wrap=True)
        make_plan(config, layers)  # refuses a rule that needs what was not measured
    if not (before and shown(folder)):
        used = list(read_json(path, "stage=measure")["inputs"])
        show(config, "measure", folder, made_from, lambda: measure_page(folder.parent, used))
    _print(layers)
    console.print(f"written to {path}; stage=plan shows the ranks that follow", soft_wrap=True)


def _measure(config: DictConfig, options: GapOptions, folder: Path, made_from: Mapping[str, Any]) -> None:
    """Processes pass images through the models together, whenever the first asks for it; it does the rest."""
    if first():
        leave(folder)
    seed = int(config.seed)
    seed_everything(seed)
    nodes = _nodes(config)
    with first_alone():
        sets = {name: _ready(node, options.batch_size) for name, node in nodes.items()}
        backbone = resolve_backbone(config)
    model = build_model(config, _task(sets["target"])).eval().requires_grad_(False)
    layers = adaptable_layers(model.body, config.layers.target, config.layers.qkv)
    modules = {layer.name: module_of(layer.name, model.body) for layer in layers}
    watched = list(dict.fromkeys(modules.values()))

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        passing = Pass(options.samples, int(config.align.clusters), seed, device_of(config.trainer), progress)
        passes = _passes(config, options, passing, backbone, model, sets, watched)
        if not first():
            while name := agreed(str):
                passes[name]()
            return
        fitted = _fitted_weights(config)
        used = [aligned_embedder(config)] if config.embedder.aligned else []
        used += [fitted] if fitted is not None else []
        parts_of = {**made_from, "embedder": [file_hash(path) for path in used]}
        unfinished = Unfinished(folder, parts_of, force=config.force, records=(Side, Inputs, Gap, Gradients))

        def passed(name: str) -> Any:
            return unfinished.part(name, lambda: passes[agreed(lambda: name)]())

        def gaps(name: str, side: Side) -> dict[str, dict[str, Gap]]:
            found: dict[str, dict[str, Gap]] = {module: {} for module in watched}
            for metric, function in options.metrics.items():
                bar = passing.bar(f"{metric}: {name}", len(watched))
                one = unfinished.part(
                    f"{name}-{metric}", layer_gaps, metric, function, options, seed, source, side, bar
                )
                found = {module: found[module] | one[module] for module in watched}
            return found

        source: Side = passed("source")
        target: Side = passed("target")
        gradients: dict[str, Gradients] | None = passed("gradients") if options.asks(*GRADIENTS) else None
        dimensions: dict[str, tuple[float, float]] = passed("hidden") if options.asks("intrinsic_dimension") else {}
        found = gaps("target", target)
        bar = passing.bar("spectra", len(layers))
        measured, directions = measurements(
            options, seed, layers, modules, model.body, source, target, gradients, dimensions, bar
        )
        measured = [replace(layer, gap=found[modules[layer.name]]) for layer in measured]
        for key in nodes:
            if not key.startswith("compare/"):
                continue
            other: Side = passed(key)
            found = gaps(key, other)
            name = key.partition("/")[2]
            records = [replace(layer, gap=found[modules[layer.name]]).to_dict() for layer in layers]
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
    agreed(str)  # the others need not pass anything any more


def _passes(
    config: DictConfig,
    options: GapOptions,
    passing: Pass,
    backbone: Mapping[str, Any],
    model: OrcaModel,
    sets: Mapping[str, Data],
    watched: Sequence[str],
) -> dict[str, Callable[[], Any]]:
    """What may be asked to pass through a model, by the name of the part that is kept of it.

    Args:
        backbone: as `resolve_backbone` gives it. model: the target's. sets: as `_nodes` names them.
    """
    seed, fitted = int(config.seed), _fitted_weights(config)
    tokens = options.tokens if options.asks("ot_map", "activation") else 0

    def source() -> Side:
        return passing.side(source_side(backbone, seed, sets["source"]), sets["source"], watched, tokens, "source")

    def compared(name: str) -> Side:
        torch.manual_seed(seed)
        through = create_model(backbone, _task(sets[name]), config.embedder.init)
        return passing.side(through, sets[name], watched, 0, name)

    def gradients() -> dict[str, Gradients]:
        through = model if fitted is None else _fitted(config, fitted, sets["target"].task)
        moments = options.asks("whitened_gradient")
        return passing.gradients(through, sets["target"], watched, options.sign_draws, moments)

    return {
        "source": source,
        "target": lambda: passing.side(model, sets["target"], watched, tokens, "target"),
        "gradients": gradients,
        "hidden": lambda: passing.hidden(model, sets["target"], watched),
        **{name: partial(compared, name) for name in sets if name.startswith("compare/")},
    }


def _nodes(config: DictConfig) -> dict[str, DictConfig]:
    """The data that are measured: source, target, compare/<name>."""
    compared = {f"compare/{name}": node for name, node in config.measure.compare.items()}
    return {"source": config.source, "target": config.data, **compared}


def _task(data: Data) -> Task:
    """The task of the data; without targets, one of their shape whose predictor nothing passes through."""
    if labelled(data):
        return data.task
    x, _ = next(iter(cast(InMemory, data).loader("all")))
    channels, height, width = x.shape[1:]
    return Task("classification", (channels, height, width), (1,))


def _fitted_weights(config: DictConfig) -> Path | None:
    return None if config.measure.fitted is None else Path(config.measure.fitted) / "model.safetensors"


def _fitted(config: DictConfig, path: Path, task: Task) -> OrcaModel:
    """The model with the embedder and the predictor of a finished fine-tune: through a predictor that has learned
    nothing yet, gradients say what its random weights say.

    Raises:
        FileNotFoundError: if the fine-tune left nothing. ValueError: if it does not fit.
    """
    tensors = read_tensors(path, "stage=finetune")
    model = build_model(config, task).eval().requires_grad_(False)
    for name in ("embedder", "predictor"):
        part = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        try:
            getattr(model, name).load_state_dict(part)
        except RuntimeError as error:
            raise ValueError(
                f"measure.fitted: the {name} of {path} does not fit ({str(error).splitlines()[-1].strip()}): name a "
                f"fine-tune of this backbone, predictor and data"
            ) from error
    return model


def _embedder_at_hand(config: DictConfig) -> DictConfig:
    """The config with embedder.aligned turned off, and said so, where stage=align has not run."""
    if not config.embedder.aligned or agreed(aligned_embedder(config).exists):
        return config
    console.print(
        f"no aligned embedder at {aligned_embedder(config)}: measuring with the embedder's initialisation "
        f"(embedder.init={config.embedder.init}); `{command('stage=align')}` makes one",
        soft_wrap=True,
    )
    config = copy.deepcopy(config)
    config.embedder.aligned = False
    return config


def _ready(node: DictConfig, batch_size: int | None) -> Data:
    """A data module, ready for its training loader, with this batch size where it has one."""
    options: dict[str, Any] = {} if batch_size is None or "batch_size" not in node else {"batch_size": batch_size}
    data: Data = build(node, **options)
    return ready(node, **options) if labelled(data) else data


def _print(layers: Sequence[Layer]) -> None:
    console.print(gap_table(layers, console.width))
    console.print("* p < 0.05 for all layers together; intervals and p-values are in layers.json")
    if kinds := nulls(layers):
        console.print(f"{' and '.join(kinds)}: singular values above their noise floor")
    found = agreement(layers)
    for name in ("depth", f"{next(iter(layers[0].gap))} gap"):
        others = [other for other in found.get(name, {}) if not any(variant in other for variant in VARIANTS)]
        pairs = [f"{other} {found[name][other]:+.2f}" for other in others if other not in ("depth", name)]
        if pairs:
            console.print(f"rank correlation with {name}: {', '.join(pairs)}")
