"""Layers that a model never calls: it reads their ``weight`` and multiplies by itself.

timm's SwinV2, BEiT and EVA-02 do so with ``attn.qkv``, to give it a bias put together from parts. A module in its place
would never run, and neither would a hook.
"""

import inspect
import re
from collections.abc import Iterable

from torch import nn

# What is asked of a weight without multiplying by it.
ASIDE = r"(?!\w|\.(?:dtype|device|shape|size|ndim|dim|numel|requires_grad|is_\w+)\b)"


def read_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The layers of which a module above reads ``self.<path to the layer>.weight`` in the code of a forward pass."""
    code: dict[type[nn.Module], str] = {}
    found = []
    for name in names:
        steps = name.split(".")
        for depth in range(len(steps)):
            kind = type(model.get_submodule(".".join(steps[:depth])))
            path = re.escape(".".join(steps[depth:]))
            if kind not in code:
                code[kind] = _code(kind)
            if re.search(rf"\bself\.{path}\.weight{ASIDE}", code[kind]):
                found.append(name)
                break
    return found


def _code(kind: type[nn.Module]) -> str:
    """The source of a class's methods, without those that make and reset it; empty where there is none."""
    found = []
    for ancestor in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for method, function in vars(ancestor).items():
            if inspect.isfunction(function) and "init" not in method and "reset" not in method:
                try:
                    found.append(inspect.getsource(function))
                except (OSError, TypeError):
                    continue
    return "\n".join(found)
