"""The calibrated gap of every layer of any model, between any two kinds of batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from orca_rank.api.batches import Batch, batches_of, empty
from orca_rank.api.gaps import Gaps
from orca_rank.api.models import as_found, called, check_alone, check_like, device_of, watched_in
from orca_rank.distances import (
    bures_wasserstein,
    energy_distance,
    mmd,
    otdd,
    proxy_a_distance,
    sliced_wasserstein,
)
from orca_rank.distances.scores import Metric
from orca_rank.measuring.activations import module_of
from orca_rank.measuring.gradients import Gradients, collect_gradients
from orca_rank.measuring.hidden import hidden_dimensions
from orca_rank.measuring.layers import Side, layer_gaps, take_side
from orca_rank.measuring.layers import measurements as measure_others
from orca_rank.measuring.matrices import adaptable_layers, matrix_of
from orca_rank.measuring.options import GRADIENTS, GapOptions
from orca_rank.measuring.records import Gap, Layer

# As conf/gap/all.yaml has them.
METRICS: dict[str, Metric] = {
    "mmd": mmd,
    "sliced": partial(sliced_wasserstein, projections=32),
    "energy": energy_distance,
    "bures": bures_wasserstein,
    "wasserstein": partial(otdd, inner="none", outer="exact"),
    "otdd": partial(otdd, inner="gaussian", outer="exact"),
    "proxy_a": proxy_a_distance,
}


def measure(
    model: nn.Module,
    source: Any,
    target: Any,
    layers: str,
    *,
    metrics: Sequence[str] | Mapping[str, Metric] = ("mmd", "sliced"),
    measurements: Sequence[str] = ("weight",),
    qkv: str = "fused",
    target_model: nn.Module | None = None,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    samples: int = 256,
    batch_size: int = 32,
    clusters: int = 10,
    seed: int = 0,
    **options: Any,
) -> Gaps:
    """How far source and target are apart at the input of every layer, on one scale for all layers: the same figures
    as stage=measure, see `orca_rank.distances.calibrate`. The image is the unit of every interval and p-value.

    Tokens of an image are averaged, so a layer must receive (images, ..., d), or windows (images · windows, ..., d)
    with the image outermost, and every image must pass by itself: both are checked on the first batch. The model runs
    in evaluation mode, where it is, and is left as it was found.

    Args:
        model: any module, such as timm's or transformers', called as model(x), or model(**x) for named tensors.
        source, target: a DataLoader or another iterable of batches; or one tensor or array of images (n, ...). A batch
            is x; (x,) or (x, y, ...); or a dict with x, image or images, or else with the names of the model's own
            arguments (pixel_values, input_ids), and labels, label, y, target or targets. Only so many batches are read
            as `samples` asks for. Labels y are classes (n,), or targets of which k-means clusters are taken. Only the
            gap otdd and the measurements of gradients need them; where there are some, halves are drawn by class.
        layers: regular expression, searched in the names of the model's Linear modules and 1 × 1 convolutions.
        metrics: names among mmd, sliced, energy, bures, wasserstein, otdd and proxy_a, or name -> a function
            (x (n, d), y (m, d)) -> number.
        measurements: what rules other than those of gaps read: weight, ot_map, activation, intrinsic_dimension, and
            with a `loss` gradient, whitened_gradient, importance and fisher.
        qkv: "fused" takes a Linear called qkv as the one layer that it is, "separate" as the three <name>.q, .k and .v.
        target_model: what the target passes through where that is another model of the same layers, such as one with an
            embedder of its own.
        loss: (output, y) -> the batch's mean loss at the target, for measurements of gradients.
        samples: images of each side, at least 8. batch_size: of a tensor or array. clusters: of targets that are no
            classes. seed: of every draw.
        options: further ones of the config group gap: splits, bootstrap, permutations, slow, variants, tokens,
            null_splits, sign_draws, components.

    Returns:
        a `Gaps`: a table of `Layer` records that `orca_rank.plan` takes.

    Raises:
        TypeError: for loaders or batches of another form. ValueError: for an option that means nothing, layers that
            match nothing or take no part, an empty loader, labels that are missing, a model that does not take the
            batches, or one in which images do not pass by themselves.
    """
    other = model if target_model is None else target_model
    asked = _options(metrics, measurements, loss, samples=samples, batch_size=batch_size, **options)
    records = adaptable_layers(model, layers, qkv, option="layers")
    modules = {layer.name: module_of(layer.name, model) for layer in records}
    watched = list(dict.fromkeys(modules.values()))
    check_like(model, other, watched)
    sides = {"source": (model, source), "target": (other, target)}
    tokens = asked.tokens if asked.asks("ot_map", "activation") else 0
    with as_found(*{id(one): one for one in (model, other)}.values()):
        read = {side: _opened(data, batch_size, side) for side, (_, data) in sides.items()}
        asked.check_unlabelled([side for side, (first, _) in read.items() if first.y is None])
        for side, (first, _) in read.items():
            check_alone(called(sides[side][0], side), watched_in(sides[side][0], watched), first, side)
        found: dict[str, Side] = {}
        for side, (_, batches) in read.items():
            through = sides[side][0]
            found[side] = take_side(
                called(through, side),
                watched_in(through, watched),
                batches,
                samples,
                clusters,
                tokens=tokens,
                seed=seed,
                device=device_of(through),
            )
        gradients = None
        if loss is not None and asked.asks(*GRADIENTS):
            gradients = _gradients(other, loss, target, watched, asked, seed)
    dimensions = {}
    if asked.asks("intrinsic_dimension"):
        with as_found(other):
            dimensions = _hidden(other, target, watched, asked)
    pair = found["source"], found["target"]
    gaps: dict[str, dict[str, Gap]] = {module: {} for module in watched}
    for name, metric in asked.metrics.items():
        for module, one in layer_gaps(name, metric, asked, seed, *pair).items():
            gaps[module] |= one
    measured, _ = measure_others(asked, seed, records, modules, other, *pair, gradients, dimensions)
    measured = [replace(layer, gap=gaps[modules[layer.name]]) for layer in measured]
    return Gaps(measured, *(len(found[side].labels) for side in ("source", "target")))


def layers(model: nn.Module, layers: str, *, qkv: str = "fused") -> list[Layer]:
    """The layers of a model that a rule such as `uniform` can share ranks among without anything measured.

    Args: as in `measure`.

    Raises:
        ValueError: for a bad expression, or one that matches nothing.
    """
    return adaptable_layers(model, layers, qkv, option="layers")


def _options(
    metrics: Sequence[str] | Mapping[str, Metric],
    measurements: Sequence[str],
    loss: Callable[[Any, Tensor], Tensor] | None,
    **options: Any,
) -> GapOptions:
    if isinstance(metrics, str) or isinstance(measurements, str):
        raise ValueError(f"metrics and measurements are lists of names, received {metrics!r} and {measurements!r}")
    if not isinstance(metrics, Mapping):
        if unknown := [name for name in metrics if name not in METRICS]:
            raise ValueError(f"metrics has {', '.join(map(str, unknown))}; there are {', '.join(METRICS)}")
        metrics = {name: METRICS[name] for name in metrics}
    asked = GapOptions.from_dict({**options, "measurements": dict.fromkeys(measurements, True)}, metrics)
    if asked.asks("mean_gradient"):
        raise ValueError("measurements has mean_gradient, which only stage=measure keeps, in a file for adapter=gora")
    if asked.asks(*GRADIENTS) and loss is None:
        raise ValueError(f"measurements={list(measurements)} needs a loss: pass loss=(output, y) -> the mean loss")
    return asked


def _opened(data: Any, batch_size: int, side: str) -> tuple[Batch, Iterable[Batch]]:
    """The first batch, to look at, and all batches."""
    batches = batches_of(data, batch_size, side)
    first = next(batches, None)
    if first is None:
        raise ValueError(empty(side))
    return first, itertools.chain([first], batches)


def _hidden(model: nn.Module, target: Any, watched: Sequence[str], asked: GapOptions) -> dict[str, tuple[float, float]]:
    _check_again(target, "hidden states need")
    batches = batches_of(target, asked.batch_size or 32, "target")
    blocks = dict(model.named_modules())
    return hidden_dimensions(
        called(model, "target"), watched_in(model, watched), blocks, batches, asked.samples, device=device_of(model)
    )


def _check_again(target: Any, who: str) -> None:
    if isinstance(target, Iterator):
        raise ValueError(f"{who} a second pass over the target: give a DataLoader or a list, not a generator")


def _gradients(
    model: nn.Module,
    loss: Callable[[Any, Tensor], Tensor],
    target: Any,
    watched: Sequence[str],
    asked: GapOptions,
    seed: int,
) -> dict[str, Gradients]:
    _check_again(target, "gradients need")

    def images(x: Any) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError("gradients are measured for batches of one tensor x of floats; this target has others")
        return x

    pairs = ((images(x), y) for x, y in batches_of(target, asked.batch_size or 32, "target"))
    modules = {name: matrix_of(model, name) for name in watched}
    return collect_gradients(
        lambda x: x, called(model, "target"), loss, modules, pairs, asked.samples,
        draws=asked.sign_draws, moments=asked.asks("whitened_gradient"), seed=seed, device=device_of(model),
    )  # fmt: skip
