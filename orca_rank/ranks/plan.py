"""Budgets and rank plans."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from orca_rank.artifacts.files import SCHEMA
from orca_rank.measuring.records import LayerLike, as_layers, some
from orca_rank.ranks.peft import lora_arguments
from orca_rank.ranks.text import plan_text


@dataclass(frozen=True)
class Budget:
    """What a plan may spend: exactly one of three limits, and bounds on every layer's rank.

    Args:
        mean_rank: Σ r_i <= mean_rank · (number of layers); a number.
        total_rank: Σ r_i <= total_rank, a whole number.
        parameters: Σ r_i (d_in + d_out) <= parameters, a whole number.
        r_min, r_max: bounds for every layer, whole numbers; a layer's own full rank min(d_in, d_out) bounds it as well.

    Raises:
        ValueError: if not exactly one limit is given, or one is no finite number, no whole number of ranks or
            parameters, negative or out of order.
    """

    # Checked below, and made Python's own int or float: what is given may come from a command line or from numpy.
    mean_rank: Any = None
    total_rank: Any = None
    parameters: Any = None
    r_min: Any = 0
    r_max: Any = None

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in ("mean_rank", "total_rank", "parameters")}
        given = {name: value for name, value in limits.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"a budget takes exactly one of mean_rank, total_rank, parameters; got {given or 'none'}: "
                "set the others to null, e.g. budget.mean_rank=null budget.parameters=200000"
            )
        for name in (*given, "r_min", "r_max"):
            if (value := getattr(self, name)) is not None or name == "r_min":
                object.__setattr__(self, name, _amount(name, value, whole=name != "mean_rank"))
        if self.r_max is not None and self.r_max < self.r_min:
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

    def narrowed(self, low: int, high: int | None = None) -> Budget:
        """With no rank below `low` or above `high` either, as far as its own bounds leave room."""
        r_min = max(low, self.r_min) if self.r_max is None else min(max(low, self.r_min), self.r_max)
        ends = [end for end in (high, self.r_max) if end is not None]
        return replace(self, r_min=r_min, r_max=max(min(ends), r_min) if ends else None)

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

    @classmethod
    def from_dict(cls, record: Any) -> Budget:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: for another form, or as for a new budget.
        """
        known = [item.name for item in fields(cls)]
        if not isinstance(record, Mapping) or not set(record) <= set(known):
            raise ValueError(f"a budget is an object with keys among {', '.join(known)}; got {record!r}")
        return cls(**record)


@dataclass(frozen=True, repr=False)
class RankPlan:
    """Layer name -> rank, with where it came from. Rank 0 means: no adapter here. It prints itself as a table.

    Args:
        ranks: a non-negative integer per layer.
        rule, budget, options: the rule that made it, the budget it obeyed and the rule's options.
        allow_above_full: let a rank exceed min(d_in, d_out); otherwise `check` refuses it.
        measurement: hash of the measurement it was made from.
        shapes: (d_in, d_out) of every layer, where they are known: what parameters are counted from in the table.

    Raises:
        TypeError: if a rank is not an integer. ValueError: if it is negative or a name is empty.
    """

    ranks: Mapping[str, Any]
    rule: str = ""
    budget: Budget | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    allow_above_full: bool = False
    measurement: str = ""
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict, compare=False)

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
            raise KeyError(f"the rank plan has no layer {name!r}; it has {some(list(self.ranks))}")
        return self.ranks[name]

    def __len__(self) -> int:
        return len(self.ranks)

    def __repr__(self) -> str:
        return plan_text(self.ranks, self.shapes, self.rule)

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
            raise ValueError(f"the rank plan names unknown layers: {some(unknown)}; the model has {some(records)}")
        if missing := sorted(set(records) - set(self.ranks)):
            raise ValueError(f"the rank plan says nothing of {some(missing)}: give every layer a rank (0 for none)")
        full = {name: layer.full_rank for name, layer in records.items()}
        above = [f"{name} ({rank} > {full[name]})" for name, rank in self.ranks.items() if rank > full[name]]
        if above and not self.allow_above_full:
            raise ValueError(
                f"rank above min(d_in, d_out): {some(above)}: lower it, or set allow_above_full=true on purpose"
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
        """Read what `to_dict` wrote, or the content of a plan/plan.json, whose `layers` have a name and a rank each.

        Raises:
            ValueError: if it has no ranks or another schema version.
        """
        if record.get("schema", SCHEMA) != SCHEMA:
            raise ValueError(f"this rank plan has schema {record['schema']}, expected {SCHEMA}: make it again")
        ranks, shapes = record.get("ranks"), {}
        if not isinstance(ranks, Mapping):
            rows = record.get("layers")
            if not isinstance(rows, list):
                raise ValueError(
                    f'a rank plan needs "ranks": {{layer: rank}} or "layers", got the keys {sorted(record)}'
                )
            if not all(isinstance(row, Mapping) and {"name", "rank"} <= set(row) for row in rows):
                raise ValueError(
                    'its "layers" need a name and a rank each, as stage=plan writes them to plan/plan.json'
                )
            ranks = {row["name"]: row["rank"] for row in rows}
            shapes = {row["name"]: (int(row["d_in"]), int(row["d_out"])) for row in rows if {"d_in", "d_out"} <= {*row}}
        budget, options = record.get("budget"), dict(record.get("options") or {})
        return cls(
            ranks=dict(ranks),
            rule=str(record.get("rule") or ""),
            budget=None if budget is None else Budget.from_dict(budget),
            options=options,
            # plan.json says it among the options of the rule
            allow_above_full=bool(record.get("allow_above_full", options.get("allow_above_full", False))),
            measurement=str(record.get("measurement") or ""),
            shapes=shapes,
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> RankPlan:
        """Read what `to_json` wrote; ValueError if it is no JSON object, and as in `from_dict`."""
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a rank plan is a JSON object, got {text[:40]!r}: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"a rank plan is a JSON object, got {text[:40]!r}")
        return cls.from_dict(record)

    @classmethod
    def load(cls, path: str | Path) -> RankPlan:
        """The plan in a file: what stage=plan (plan/plan.json), stage=finetune (finetune/<tag>/ranks.json) or `to_json`
        wrote, or a plain {layer: rank}.

        Raises:
            FileNotFoundError: if there is no such file. ValueError: if it is no plan.
        """
        source = Path(path)
        if not source.is_file():
            raise FileNotFoundError(
                f"no rank plan at {source}: stage=plan writes plan/plan.json, stage=finetune finetune/<tag>/ranks.json"
            )
        try:
            content = json.loads(source.read_text())
        except ValueError as error:
            raise ValueError(f"{source} is not JSON: {error}") from error
        try:
            if not isinstance(content, dict):
                raise ValueError(f"expected an object {{layer: rank}}, got a {type(content).__name__}")
            named = isinstance(content.get("ranks"), dict) or isinstance(content.get("layers"), list)
            return cls.from_dict(content) if named else cls(content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source} is no rank plan: {error}") from error

    def to_peft(self, alpha: float | None = None) -> dict[str, Any]:
        """The arguments of a PEFT `LoraConfig` that give every layer its own rank, and adapt nothing else.

        PEFT must be given the module that the names are relative to. Every pattern is an escaped full name, because
        PEFT reads plain names as suffixes and a dot as any character.

        The parts `….qkv.q`, `.k` and `.v` of a fused matrix become one adapter of that matrix, of the sum of their
        ranks and the same scale. It can express what the parts can (A stacked, B block-diagonal, as `save_peft` writes
        them) and more, for PEFT trains a full B, at twice their parameters.

        Args:
            alpha: the same `lora_alpha` for every layer; by default its rank, so that the scale alpha/r is 1.

        Raises:
            ValueError: if every rank is 0, a matrix stands in the plan both whole and in parts, or `alpha` is given
                for parts of unequal ranks, whose scales then differ.
        """
        return lora_arguments(self.ranks, alpha)


def _amount(name: str, value: Any, whole: bool) -> int | float:
    """A number of a budget as Python's own int or float."""
    finite = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not finite or value < 0 or (whole and value != int(value)):
        raise ValueError(f"budget.{name} must be a {'whole' if whole else 'finite'} number >= 0, got {value!r}")
    return int(value) if whole or isinstance(value, Integral) else float(value)
