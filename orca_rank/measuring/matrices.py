"""The layers that are measured and adapted: matrices that act on every token, as Linear or as 1 × 1 convolution."""

from __future__ import annotations

import re
from typing import TypeGuard

from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.measuring.records import Layer

Matrix = nn.Linear | nn.Conv2d
# Networks that make position biases: they see coordinates, not tokens.
POSITIONS = re.compile(r"(rel_pos|meta_mlp|cpb_mlp|rpe_mlp|pos_embed|pos_block)")


def is_matrix(module: nn.Module) -> TypeGuard[Matrix]:
    """Whether a module is a Linear, or a convolution that is one for every pixel: 1 × 1, one group, no padding."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1 and module.padding in ((0, 0), "valid")
    return isinstance(module, nn.Linear)


def matrix_of(body: nn.Module, name: str) -> Matrix:
    """The layer of this name.

    Raises:
        TypeError: if the module is no matrix.
    """
    module = body.get_submodule(name)
    if not is_matrix(module):
        raise TypeError(f"{name} is a {type(module).__name__}; only Linear modules and 1 × 1 Conv2d are measured")
    return module


def weight_of(module: Matrix) -> Float[Tensor, "d_out d_in"]:
    """W, of a convolution its flattened kernel."""
    return module.weight.flatten(1)


def inputs_of(module: nn.Module, x: Tensor) -> Float[Tensor, "*n d_in"]:
    """What a layer received, a row a token: pixels (B, d, h, w) that a convolution sees become (B, h, w, d)."""
    if not isinstance(module, nn.Conv2d):
        return x
    down, across = module.stride
    return x[..., ::down, ::across].movedim(-3, -1)


def outputs_of(module: nn.Module, y: Tensor) -> Float[Tensor, "*n d_out"]:
    """What a layer gave, or its gradient, a row a token."""
    return y.movedim(-3, -1) if isinstance(module, nn.Conv2d) else y


def adaptable_layers(body: nn.Module, target: str, qkv: str = "fused", option: str = "layers.target") -> list[Layer]:
    """The matrices of a body whose names match a regular expression, in the body's own order; networks of position
    biases aside.

    Args:
        target: regular expression, searched in module names such as layers.0.blocks.1.attn.qkv.
        qkv: "fused" takes a Linear called qkv, which holds q, k and v, as one (3d, d) layer; "separate" as three (d, d)
            layers named <module>.q, <module>.k and <module>.v.
        option: what `target` is called in messages.

    Raises:
        ValueError: for a bad expression or one that matches no layer, or another `qkv`.
    """
    if qkv not in ("fused", "separate"):
        name = "layers.qkv" if option == "layers.target" else "qkv"
        raise ValueError(f"{name} must be 'fused' or 'separate', received {qkv!r}")
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise ValueError(f"{option} is not a regular expression: {target!r} ({error})") from error
    found = {
        name: module
        for name, module in body.named_modules()
        if name and is_matrix(module) and not POSITIONS.search(name)
    }
    layers = []
    for name, module in found.items():
        if not pattern.search(name):
            continue
        d_out, d_in = weight_of(module).shape
        if qkv == "separate" and name.rpartition(".")[2] == "qkv" and isinstance(module, nn.Linear):
            layers += [Layer(f"{name}.{part}", d_in, d_out // 3) for part in "qkv"]
        else:
            layers.append(Layer(name, d_in, d_out))
    if not layers:
        raise ValueError(
            f"{option}={target!r} matches none of the body's {len(found)} Linear modules and 1 × 1 convolutions, for "
            f"example {', '.join(list(found)[:4])}"
        )
    return layers
