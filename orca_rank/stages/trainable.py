"""Which parameters a fine-tune trains, and how many they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orca_rank.adapters import inject, probe
from orca_rank.adapters.block_diagonal import gradient_blocks
from orca_rank.backbone import OrcaModel
from orca_rank.build import build
from orca_rank.measuring.spectra import load_directions, load_gradients, weight_rank
from orca_rank.options import one_of
from orca_rank.ranks import Layer, RankPlan
from orca_rank.ranks.ibp import concentration
from orca_rank.ranks.rules import gap_values

DIRECTIONS = "directions.safetensors"
TAKEN = ("directions", "gradients")  # options that hold what stage=measure stored
METHODS = ("inject", "full", "norm", "probe")


def adapter_module(
    adapter: Mapping[str, Any], layers: Sequence[Layer], measured: Path, plan: RankPlan
) -> dict[str, Any]:
    """The adapter's module config with what it takes from stage=measure filled in.

    Args:
        adapter: its config as plain values. layers: with their measurements. measured: the folder of stage=measure.
        plan: the ranks that the adapters have.

    `concentration: gaps` becomes each layer's α_i = mean · (D_i / D̄)^γ of the IBP prior (adapter.prior), and
    `init: directions` reads the leading directions that the measurement adapter.directions found, `init: gora` the mean
    gradients, by whose effective ranks `blocks: gradient` becomes RaLoRA's number of blocks of each layer.

    Raises:
        ValueError: if the layers carry no such gap, or no such directions were stored. FileNotFoundError: if none were.
    """
    module = dict(adapter["module"])
    if module.get("concentration") == "gaps":
        prior = adapter["prior"]
        gaps = gap_values(layers, prior["metric"], adapter["name"])
        alphas = concentration(gaps, prior["mean"], prior["gamma"]).clip(min=0.01 * prior["mean"])
        module["concentration"] = {layer.name: float(a) for layer, a in zip(layers, alphas, strict=True)}
    if module.get("init") == "directions":
        module["directions"] = load_directions(measured / DIRECTIONS, adapter["directions"])
    if module.get("init") == "gora":
        module["gradients"] = load_gradients(measured / DIRECTIONS)
    if module.get("blocks") == "gradient":
        gradients = load_gradients(measured / DIRECTIONS)
        module["blocks"] = {
            layer.name: gradient_blocks(
                weight_rank(gradients[layer.name]).effective_rank,
                plan.ranks[layer.name],
                layer.d_in,
                layer.d_out,
                adapter["most_blocks"],
            )
            for layer in layers
            if plan.ranks[layer.name]
        }
    return module


def rebuilt(module: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's module config where its first values do not matter, as for loading: nothing that
    was measured needs to be at hand."""
    module = {name: value for name, value in module.items() if name not in TAKEN}
    if module.get("blocks") == "gradient":
        module["blocks"] = 1
    return {**module, "init": "kaiming"} if module.get("init") in ("directions", "gora") else module


def make_trainable(
    model: OrcaModel,
    method: str,
    plan: RankPlan | None,
    adapter: Mapping[str, Any] | None,
    *,
    embedder: bool,
    predictor: bool,
) -> None:
    """Freeze the model, then free what is to be trained.

    Args:
        method: adapter.method. plan, adapter: of "inject" (see `adapter_module`).
        embedder, predictor: whether they are trained.

    Raises:
        ValueError: for an unknown adapter.method, or a plan that adapts no layer.
    """
    model.requires_grad_(False)
    if method == "inject":
        if plan is None or not any(plan.ranks.values()):
            raise ValueError(
                f"the rank plan adapts no layer: all {0 if plan is None else len(plan)} ranks are 0. Raise the budget, "
                "rank.r or layers.target, or set adapter=linear_probe to keep the body frozen on purpose"
            )
        inject(model.body, plan, adapter=build(adapter))
    elif method == "full":
        model.body.requires_grad_(True)
    elif method == "norm":
        for module in model.body.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
    else:
        one_of("adapter.method", method, METHODS)
    model.embedder.requires_grad_(embedder)
    model.predictor.requires_grad_(predictor)


def probe_adapters(model: OrcaModel, input_shape: Sequence[int]) -> None:
    """Pass two random images through the model, in evaluation mode, to see that each adapter gets a gradient.

    Args:
        input_shape: (C, H, W) of the task.

    Raises:
        ValueError: naming the layers that would never train.
    """
    place = next(model.parameters())
    x = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0)).to(place)  # (2, C, H, W)
    modes = {module: module.training for module in model.modules()}
    try:
        probe(model.body, lambda: model.eval()(x))
    finally:
        for module, training in modes.items():
            module.training = training


def count_parameters(model: OrcaModel, adapters: bool, beside: nn.Module | None = None) -> dict[str, Any]:
    """Trainable parameters by part, and the total of all parameters.

    `adapter` counts what was injected into the body, `other` what else of the body is trained, and what is trained
    `beside` the model.
    """
    also = 0 if beside is None else sum(p.numel() for p in beside.parameters() if p.requires_grad)
    parts = {
        name: sum(p.numel() for p in getattr(model, name).parameters() if p.requires_grad)
        for name in ("embedder", "body", "predictor")
    }
    body = parts.pop("body")
    parts |= {"adapter": body if adapters else 0, "other": also + (0 if adapters else body)}
    return {
        "trainable_parameters": {"total": sum(parts.values()), **parts},
        "total_parameters": also + sum(p.numel() for p in model.parameters()),
    }


def in_words(counts: Mapping[str, Any]) -> str:
    """What `count_parameters` found, as stages print it."""
    trained = counts["trainable_parameters"]
    parts = ", ".join(f"{name} {trained[name]:,}" for name in ("adapter", "embedder", "predictor", "other"))
    return f"trainable: {trained['total']:,} of {counts['total_parameters']:,} parameters ({parts})"


def audit(model: OrcaModel, embedder: Mapping[str, Any], frozen_on_purpose: bool) -> None:
    """Stop before training when a freshly initialised module is frozen: every rank would look equally bad.

    Args:
        embedder: its options. frozen_on_purpose: that of the predictor.

    Raises:
        ValueError: the predictor, or an embedder with random weights, is frozen and no option says so on purpose.
    """
    if not any(p.requires_grad for p in model.predictor.parameters()) and not frozen_on_purpose:
        raise ValueError(
            "the freshly initialised predictor is frozen: train it, or set predictor.frozen_on_purpose=true"
        )
    if embedder["init"] == "random" and not embedder["aligned"] and not embedder["train"]:
        raise ValueError(
            "the embedder has random weights and is frozen: set embedder.train=true, embedder.init=pretrained, or "
            "embedder.aligned=true"
        )
