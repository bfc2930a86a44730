"""Layers: the plain values that travel between measuring, ranking and adapting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SHAPE_KEYS = ("name", "d_in", "d_out", "gap")


@dataclass(frozen=True)
class Layer:
    """One adaptable linear map: a weight of shape (d_out, d_in) and what was measured at its input.

    Args:
        name: module name inside the body, e.g. `layers.0.blocks.1.attn.qkv`.
        d_in, d_out: its shape; one unit of rank costs `d_in + d_out` parameters.
        gap: metric -> {"value", "low", "high", "p"}, calibrated (`orca_rank.distances.null`).
        measured: every other measurement under its own name (`ot_map`, `gradient`, `weight`, ...).
    """

    name: str
    d_in: int
    d_out: int
    gap: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_out < 1:
            raise ValueError(f"layer {self.name}: d_in and d_out must be positive, got {self.d_in} and {self.d_out}")

    @property
    def cost(self) -> int:
        """Parameters of one unit of rank: a row of A (d_in) and a column of B (d_out)."""
        return self.d_in + self.d_out

    @property
    def full_rank(self) -> int:
        """The rank at which BA can be any matrix of this shape."""
        return min(self.d_in, self.d_out)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Layer:
        """Read one entry of `layers.json`; keys that are not shape or gap are measurements."""
        if missing := [key for key in SHAPE_KEYS[:3] if key not in record]:
            raise ValueError(f"a layer needs {', '.join(SHAPE_KEYS[:3])}; {missing} missing in {sorted(record)}")
        return cls(
            name=str(record["name"]),
            d_in=int(record["d_in"]),
            d_out=int(record["d_out"]),
            gap=dict(record.get("gap") or {}),
            measured={key: value for key, value in record.items() if key not in SHAPE_KEYS},
        )

    def to_dict(self) -> dict[str, Any]:
        """One entry of `layers.json`."""
        return {"name": self.name, "d_in": self.d_in, "d_out": self.d_out, "gap": dict(self.gap), **self.measured}


LayerLike = Layer | Mapping[str, Any]


def as_layers(layers: Sequence[LayerLike]) -> list[Layer]:
    """Accept `Layer` records or dicts in the form of `layers.json`; refuse an empty list and repeated names."""
    records = [layer if isinstance(layer, Layer) else Layer.from_dict(layer) for layer in layers]
    names = [layer.name for layer in records]
    if not names:
        raise ValueError("no layers given: the target pattern matched nothing")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"layers are named twice: {some(repeated)}")
    return records


def some(names: Sequence[str] | Mapping[str, Any], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    shown = list(names)[:limit]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
