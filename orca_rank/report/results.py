"""What the stages' files say, typed: one record a file, made from its payload by `from_dict`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from orca_rank.measuring.records import Layer
from orca_rank.ranks import RankPlan
from orca_rank.task import Task

_PLAIN = (str, int, float, type(None))

Rows = list[dict[str, float]]
Config = Mapping[str, Any]  # the options that a file was made with, nested
Options = dict[str, str | int | float | bool | None]  # by dotted name, e.g. "finetune.optimizer.lr"
PARTS = ("adapter", "embedder", "predictor", "other")


@dataclass(frozen=True)
class Interval:
    """A value and, where they are known, the ends of its interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Counts:
    """How many parameters are trained, in all and by part of `PARTS`, and how many the model has."""

    trained: int
    parts: dict[str, int]
    model: int

    @classmethod
    def from_dict(cls, payload: Mapping[str, Any]) -> Counts:
        """From a plan.json or metrics.json."""
        counts = payload["trainable_parameters"]
        return cls(
            int(counts["total"]),
            {part: int(counts.get(part, 0)) for part in PARTS},
            int(payload["total_parameters"]),
        )


@dataclass(frozen=True)
class Alignment:
    """align/metrics.json and curve.csv. distances: on held-out data, name -> (before, after)."""

    objective: str
    epochs: int
    distances: dict[str, tuple[Interval, Interval]]
    curve: Rows
    config: Config

    @classmethod
    def from_dict(cls, payload: Mapping[str, Any], curve: Rows) -> Alignment:
        distances = {
            name: (_interval(pair["before"]), _interval(pair["after"])) for name, pair in payload["distances"].items()
        }
        epochs = int(payload.get("epochs", len(curve)))
        return cls(str(payload["objective"]), epochs, distances, curve, payload["config"])


@dataclass(frozen=True)
class Measurement:
    """measure/layers.json, or a measure/compare/<name>.json. agreement: name -> name -> Spearman's ρ over layers."""

    layers: list[Layer]
    agreement: dict[str, dict[str, float]]
    config: Config

    @classmethod
    def from_dict(cls, payload: Mapping[str, Any]) -> Measurement:
        layers = [Layer.from_dict(record) for record in payload["layers"]]
        return cls(layers, payload.get("agreement") or {}, payload["config"])

    @property
    def metrics(self) -> list[str]:
        """The metrics of the gaps, in the order of the file."""
        return list(dict.fromkeys(metric for layer in self.layers for metric in layer.gap))


@dataclass(frozen=True)
class Planned:
    """plan/plan.json: the plan of the configured rule (None where nothing gets a rank) and its parameter counts.

    rules: the ranks of other rules at the same budget.
    """

    plan: RankPlan | None
    counts: Counts
    config: Config
    rules: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, payload: Mapping[str, Any]) -> Planned:
        layers = payload["layers"]
        known = {name: payload[name] for name in ("rule", "budget", "options") if payload.get(name) is not None}
        ranks = {layer["name"]: layer["rank"] for layer in layers}
        plan = RankPlan.from_dict({**known, "ranks": ranks}) if known.get("rule") else None
        rules = {
            name: {layer: int(r) for layer, r in one.items()} for name, one in (payload.get("rules") or {}).items()
        }
        return cls(plan, Counts.from_dict(payload), payload["config"], rules)


@dataclass(frozen=True, eq=False)
class Tune:
    """A finished fine-tune: what metrics.json says, the plan it used (None without adapters) and its curve. Each is one
    of its own.

    folder: <run>/finetune/<tag>. val, test: of `metric`, lower is better. scale: of the adapters' updates, or its range
    over layers; "" without adapters, or where an older result does not say.
    """

    folder: Path
    task: Task
    metric: str
    val: float
    test: float
    seconds: float
    epochs: int
    counts: Counts
    plan: RankPlan | None
    curve: Rows
    config: Config
    options: Options
    scale: str = ""

    @classmethod
    def from_dict(cls, folder: Path, payload: Mapping[str, Any], plan: RankPlan | None, curve: Rows) -> Tune:
        metric = str(payload["metric"])
        return cls(
            folder=folder,
            task=Task.from_dict(payload["task"]),
            metric=metric,
            val=float(payload[f"val/{metric}"]),
            test=float(payload[f"test/{metric}"]),
            seconds=float(payload["seconds"]),
            epochs=int(payload["epochs"]),
            counts=Counts.from_dict(payload),
            plan=plan,
            curve=curve,
            config=payload["config"],
            options=flat(payload["config"]),
            scale=_scale_text(payload.get("adapter_scale")),
        )

    @property
    def tag(self) -> str:
        return self.folder.name

    @property
    def run(self) -> str:
        """The name of its run folder."""
        return self.folder.parent.parent.name

    def option(self, name: str) -> str | int | float | bool:
        """An option by its dotted name; "" where there is none."""
        value = self.options.get(name)
        return "" if value is None else value

    @property
    def rule(self) -> str:
        return self.plan.rule if self.plan is not None else ""

    @cached_property
    def budget(self) -> str:
        return budget_text(self.plan) if self.plan is not None else ""


def budget_text(plan: RankPlan) -> str:
    """What the rule could spend, as the option that said so; a uniform rank says itself."""
    if plan.options.get("r") is not None:
        return f"r={plan.options['r']}"
    limits = plan.budget.to_dict() if plan.budget is not None else {}
    return " ".join(
        f"{name}={limits[name]}" for name in ("mean_rank", "total_rank", "parameters") if limits.get(name) is not None
    )


def _scale_text(scale: float | Mapping[str, float] | None) -> str:
    if scale is None:
        return ""
    ends = (scale["min"], scale["max"]) if isinstance(scale, Mapping) else (scale,)
    return " to ".join(f"{float(end):.4g}" for end in ends)


def flat(config: Mapping[str, Any], prefix: str = "") -> Options:
    """Nested options by their dotted names; lists as text."""
    found: Options = {}
    for name, value in config.items():
        if isinstance(value, _PLAIN):
            found[prefix + name] = value
        elif isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = str(value)
    return found


def _interval(record: Mapping[str, Any]) -> Interval:
    low, high = (None if record.get(end) is None else float(record[end]) for end in ("low", "high"))
    return Interval(float(record["value"]), low, high)
