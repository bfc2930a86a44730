"""Layers, budgets and rank plans: the plain values that travel between measuring and adapting."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import Any

import numpy as np

SCHEMA = 1
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
        raise ValueError(f"layers are named twice: {_some(repeated)}")
    return records


@dataclass(frozen=True)
class Budget:
    """What a plan may spend: exactly one of three limits, and bounds on every layer's rank.

    Args:
        mean_rank: Σ r_i <= mean_rank · (number of layers).
        total_rank: Σ r_i <= total_rank.
        parameters: Σ r_i (d_in + d_out) <= parameters.
        r_min, r_max: bounds for every layer; a layer's own full rank min(d_in, d_out) bounds it as well.

    Raises:
        ValueError: if not exactly one limit is given, or a number is negative or out of order.
    """

    mean_rank: float | int | None = None
    total_rank: int | None = None
    parameters: int | None = None
    r_min: int = 0
    r_max: int | None = None

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in ("mean_rank", "total_rank", "parameters")}
        given = {name: value for name, value in limits.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"a budget takes exactly one of mean_rank, total_rank, parameters; got {given or 'none'}: "
                "set the others to null, e.g. budget.mean_rank=null budget.parameters=200000"
            )
        name, value = next(iter(given.items()))
        if not value >= 0:
            raise ValueError(f"budget.{name} must not be negative, got {value}")
        if self.r_min < 0 or (self.r_max is not None and self.r_max < self.r_min):
            raise ValueError(f"a budget needs 0 <= r_min <= r_max, got r_min={self.r_min}, r_max={self.r_max}")

    def unit_costs(self, layers: Sequence[LayerLike]) -> list[int]:
        """What one unit of rank costs in each layer: d_in + d_out, or 1 if the budget counts ranks."""
        return [layer.cost if self.parameters is not None else 1 for layer in as_layers(layers)]

    def allowed(self, layers: Sequence[LayerLike]) -> int:
        """The limit in parameters, or in total rank if the budget counts ranks."""
        if self.parameters is not None:
            return int(self.parameters)
        if self.total_rank is not None:
            return int(self.total_rank)
        return int(np.floor((self.mean_rank or 0) * len(as_layers(layers)) + 1e-9))

    def used(self, plan: RankPlan, layers: Sequence[LayerLike]) -> int:
        """What `plan` spends, in the unit of `allowed`."""
        records = as_layers(layers)
        return sum(plan[layer.name] * cost for layer, cost in zip(records, self.unit_costs(records), strict=True))

    def bounds(self, layers: Sequence[LayerLike]) -> tuple[list[int], list[int]]:
        """Lowest and highest rank of each layer.

        Raises:
            ValueError: if r_min alone is more than the budget allows.
        """
        records = as_layers(layers)
        high = [min(layer.full_rank, layer.full_rank if self.r_max is None else self.r_max) for layer in records]
        low = [min(self.r_min, top) for top in high]
        floor = sum(rank * cost for rank, cost in zip(low, self.unit_costs(records), strict=True))
        if floor > self.allowed(records):
            raise ValueError(
                f"r_min={self.r_min} alone spends {floor}, more than the budget of {self.allowed(records)}: "
                "raise the budget or lower budget.r_min"
            )
        return low, high

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RankPlan:
    """Layer name -> rank, with where it came from. Rank 0 means: no adapter here.

    Args:
        ranks: a non-negative integer per layer.
        rule, budget, options: the rule that made it, the budget it obeyed and the rule's options.
        allow_above_full: let a rank exceed min(d_in, d_out); otherwise `check` refuses it.
        measurement: hash of the measurement it was made from.

    Raises:
        TypeError: if a rank is not an integer. ValueError: if it is negative or a name is empty.
    """

    ranks: Mapping[str, Any]
    rule: str = ""
    budget: Budget | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    allow_above_full: bool = False
    measurement: str = ""

    def __post_init__(self) -> None:
        for name, rank in self.ranks.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"a rank plan's keys are layer names, got {name!r}")
            if isinstance(rank, bool) or not isinstance(rank, Integral):
                raise TypeError(f"the rank of {name} must be an integer, got {rank!r}")
            if rank < 0:
                raise ValueError(f"the rank of {name} must not be negative, got {rank}")
        object.__setattr__(self, "ranks", {name: int(rank) for name, rank in self.ranks.items()})

    def __getitem__(self, name: str) -> int:
        if name not in self.ranks:
            raise KeyError(f"the rank plan has no layer {name!r}; it has {_some(list(self.ranks))}")
        return self.ranks[name]

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def total_rank(self) -> int:
        return sum(self.ranks.values())

    def parameters(self, layers: Sequence[LayerLike]) -> int:
        """Adapter parameters Σ r_i (d_in + d_out)."""
        return sum(self[layer.name] * layer.cost for layer in as_layers(layers))

    def check(self, layers: Sequence[LayerLike]) -> RankPlan:
        """Return the plan if it names exactly these layers and no rank exceeds its layer's full rank.

        Raises:
            ValueError: if a layer is unknown or missing, or a rank is above min(d_in, d_out).
        """
        records = {layer.name: layer for layer in as_layers(layers)}
        if unknown := sorted(set(self.ranks) - set(records)):
            raise ValueError(f"the rank plan names unknown layers: {_some(unknown)}; the model has {_some(records)}")
        if missing := sorted(set(records) - set(self.ranks)):
            raise ValueError(f"the rank plan says nothing of {_some(missing)}: give every layer a rank (0 for none)")
        full = {name: layer.full_rank for name, layer in records.items()}
        above = [f"{name} ({rank} > {full[name]})" for name, rank in self.ranks.items() if rank > full[name]]
        if above and not self.allow_above_full:
            raise ValueError(
                f"rank above min(d_in, d_out): {_some(above)}: lower it, or set allow_above_full=true on purpose"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "rule": self.rule,
            "budget": None if self.budget is None else self.budget.to_dict(),
            "options": dict(self.options),
            "allow_above_full": self.allow_above_full,
            "measurement": self.measurement,
            "ranks": dict(self.ranks),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> RankPlan:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: if it has no ranks or another schema version.
        """
        if not isinstance(record.get("ranks"), Mapping):
            raise ValueError(f'a rank plan needs "ranks": {{layer: rank}}, got the keys {sorted(record)}')
        if record.get("schema", SCHEMA) != SCHEMA:
            raise ValueError(f"this rank plan has schema {record['schema']}, expected {SCHEMA}: make it again")
        budget = record.get("budget")
        return cls(
            ranks=dict(record["ranks"]),
            rule=str(record.get("rule", "")),
            budget=None if budget is None else Budget(**budget),
            options=dict(record.get("options") or {}),
            allow_above_full=bool(record.get("allow_above_full", False)),
            measurement=str(record.get("measurement", "")),
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> RankPlan:
        """Read what `to_json` wrote; errors as in `from_dict`."""
        return cls.from_dict(json.loads(text))

    def to_peft(self, alpha: float | int | None = None) -> dict[str, Any]:
        """The arguments of a PEFT `LoraConfig` that give every layer its own rank.

        PEFT matches a pattern key by `(.*\\.)?(key)$`, first entry first: keys are escaped, so that a dot is a dot, and
        sorted from long to short, so that `a.b` is not taken by the key `b`. Layers of rank 0 are not targets.

        Args:
            alpha: the same `lora_alpha` for every layer; by default its rank, so that the scale alpha/r is 1.
        """
        kept = [
            (name, self.ranks[name]) for name in sorted(self.ranks, key=lambda name: (-len(name), name)) if self[name]
        ]
        if not kept:
            raise ValueError("every rank is 0: PEFT has no adapter without a layer")
        return {
            "r": max(rank for _, rank in kept),
            "lora_alpha": max(rank for _, rank in kept) if alpha is None else alpha,
            "target_modules": [name for name, _ in kept],
            "rank_pattern": {re.escape(name): rank for name, rank in kept},
            "alpha_pattern": {re.escape(name): rank if alpha is None else alpha for name, rank in kept},
        }


def _some(names: Sequence[str] | Mapping[str, Any], limit: int = 4) -> str:
    shown = list(names)[:limit]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
