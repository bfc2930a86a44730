"""Which layers of a body are measured and adapted."""

from __future__ import annotations

import re

from torch import nn

from orca_rank.backbone.families import POSITIONS
from orca_rank.ranks import Layer


def adaptable_layers(body: nn.Module, target: str, qkv: str = "fused") -> list[Layer]:
    """The Linear modules of a body whose names match a regular expression, networks of position biases aside.

    Args:
        target: regular expression, searched in module names such as layers.0.blocks.1.attn.qkv.
        qkv: "fused" takes a matrix that holds q, k and v as one (3d, d) layer; "separate" as three (d, d) layers
            named <module>.q, <module>.k and <module>.v.

    Raises:
        ValueError: for a bad expression or one that matches no Linear, or another `qkv`.
    """
    if qkv not in ("fused", "separate"):
        raise ValueError(f"layers.qkv must be 'fused' or 'separate', received {qkv!r}")
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise ValueError(f"layers.target is not a regular expression: {target!r} ({error})") from error
    aside = re.compile(POSITIONS)
    linear = {
        name: module
        for name, module in body.named_modules()
        if isinstance(module, nn.Linear) and not aside.search(name)
    }
    if not linear:
        raise ValueError(
            "the body has no Linear modules to adapt (its layers are convolutions): choose another backbone.name, of "
            "ConvNeXt one from convnext_tiny on"
        )
    layers = []
    for name, module in linear.items():
        if not pattern.search(name):
            continue
        if qkv == "separate" and name.rpartition(".")[2] == "qkv":
            third = module.out_features // 3
            layers += [Layer(f"{name}.{part}", module.in_features, third) for part in "qkv"]
        else:
            layers.append(Layer(name, module.in_features, module.out_features))
    if not layers:
        raise ValueError(
            f"layers.target={target!r} matches none of the body's {len(linear)} Linear modules, for example "
            f"{', '.join(list(linear)[:4])}"
        )
    return layers
