"""What was measured at the layers of a body: records that travel between measuring, ranking, adapting and reporting.

A record is typed from where it is measured to the rule that reads it; `to_dict` and `from_dict` stand at the file,
measure/layers.json, where None is what was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

# Every spectrum there is, in the order of layers.json.
SPECTRA = ("ot_map", "activation", "gradient", "whitened_gradient")
Json = dict[str, Any]


@dataclass(frozen=True)
class Gap:
    """A calibrated gap between source and target at one layer (`orca_rank.distances.calibrate`).

    Args:
        value: effect size, about 0 where nothing differs. low, high: its 95 % bootstrap interval.
        p: permutation p-value of this layer alone. p_family: the same for all layers together (max-T).
    """

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_family: float | None = None

    def to_dict(self) -> Json:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Gap:
        return cls(_number(record, "value"), *(_optional(record, key) for key in ("low", "high", "p", "p_family")))


@dataclass(frozen=True)
class Spectrum:
    """The change that a layer needs, or the inputs it sees, direction by direction.

    Args:
        singular_values: largest first. null: what the first would hardly exceed if nothing were there; None where there
            is no such model. energy: what the squares are measured against. rank: how many values stand above the null.
    """

    singular_values: tuple[float, ...]
    null: float | None
    energy: float
    rank: int | None

    def to_dict(self) -> Json:
        return asdict(self) | {"singular_values": list(self.singular_values)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Spectrum:
        values, null, rank = record.get("singular_values"), _optional(record, "null"), _optional(record, "rank")
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise ValueError(f"a spectrum needs a list of singular_values, got {values!r}")
        if rank is None and null is not None:
            rank = sum(value > null for value in values)
        return cls(
            tuple(float(value) for value in values),
            null,
            _number(record, "energy"),
            None if rank is None else int(rank),
        )


@dataclass(frozen=True)
class WeightRank:
    """Stable rank ‖W‖_F² / ‖W‖₂² and effective rank exp(H(s / Σ s)) of a pretrained weight."""

    stable_rank: float
    effective_rank: float

    def to_dict(self) -> Json:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> WeightRank:
        return cls(_number(record, "stable_rank"), _number(record, "effective_rank"))


@dataclass(frozen=True)
class Dimension:
    """Intrinsic dimension of the target's hidden states at the input and at the output of a layer's block."""

    input: float
    output: float

    def to_dict(self) -> Json:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Dimension:
        return cls(_number(record, "input"), _number(record, "output"))


@dataclass(frozen=True)
class Layer:
    """One adaptable linear map: a weight of shape (d_out, d_in) and what was measured there.

    Args:
        name: module name inside the body, e.g. `layers.0.blocks.1.attn.qkv`.
        d_in, d_out: its shape; one unit of rank costs `d_in + d_out` parameters.
        gap: metric -> calibrated gap at the layer's input.
        weight: of the pretrained weight. intrinsic_dimension: TwoNN. importance: mean |W ⊙ G| (GoRA).
        fisher: mean diagonal of the empirical Fisher information. spectra: by name, among `SPECTRA`.

    Raises:
        ValueError: if a width is not positive, or a spectrum has another name.
    """

    name: str
    d_in: int
    d_out: int
    gap: Mapping[str, Gap] = field(default_factory=dict)
    weight: WeightRank | None = None
    intrinsic_dimension: Dimension | None = None
    importance: float | None = None
    fisher: float | None = None
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_out < 1:
            raise ValueError(f"layer {self.name}: d_in and d_out must be positive, got {self.d_in} and {self.d_out}")
        if unknown := sorted(set(self.spectra) - set(SPECTRA)):
            raise ValueError(f"layer {self.name} has the spectra {', '.join(unknown)}; there are {', '.join(SPECTRA)}")

    @property
    def cost(self) -> int:
        """Parameters of one unit of rank: a row of A (d_in) and a column of B (d_out)."""
        return self.d_in + self.d_out

    @property
    def full_rank(self) -> int:
        """The rank at which BA can be any matrix of this shape."""
        return min(self.d_in, self.d_out)

    def to_dict(self) -> Json:
        """One entry of layers.json; what was not measured has no key."""
        found: Json = {"name": self.name, "d_in": self.d_in, "d_out": self.d_out}
        found["gap"] = {metric: gap.to_dict() for metric, gap in self.gap.items()}
        if self.weight is not None:
            found["weight"] = self.weight.to_dict()
        if self.intrinsic_dimension is not None:
            found["intrinsic_dimension"] = self.intrinsic_dimension.to_dict()
        numbers = {"importance": self.importance, "fisher": self.fisher}
        found |= {name: value for name, value in numbers.items() if value is not None}
        return found | {name: self.spectra[name].to_dict() for name in SPECTRA if name in self.spectra}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Layer:
        """Read one entry of layers.json; keys that are no measurement are left out.

        Raises:
            ValueError: if the shape or a number of a measurement is missing, naming layer and measurement.
        """
        if missing := [key for key in ("name", "d_in", "d_out") if key not in record]:
            raise ValueError(f"a layer needs name, d_in, d_out; {missing} missing in {sorted(record)}")
        name = str(record["name"])
        try:
            gaps, weight, dimension = (_object(record, key) for key in ("gap", "weight", "intrinsic_dimension"))
            gap = {metric: Gap.from_dict(one) for metric in gaps or () if (one := _object(gaps, metric)) is not None}
            spectra = {kind: Spectrum.from_dict(one) for kind in SPECTRA if (one := _object(record, kind)) is not None}
            weight_rank = None if weight is None else WeightRank.from_dict(weight)
            dimensions = None if dimension is None else Dimension.from_dict(dimension)
            importance, fisher = _optional(record, "importance"), _optional(record, "fisher")
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        shape = int(record["d_in"]), int(record["d_out"])
        return cls(name, *shape, gap, weight_rank, dimensions, importance, fisher, spectra)


LayerLike = Layer | Mapping[str, Any]


def as_layers(layers: Sequence[LayerLike]) -> list[Layer]:
    """Accept `Layer` records or dicts in the form of layers.json; refuse an empty list and repeated names."""
    records = [layer if isinstance(layer, Layer) else Layer.from_dict(layer) for layer in layers]
    names = [layer.name for layer in records]
    if not names:
        raise ValueError("no layers given: the target pattern matched nothing")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"layers are named twice: {some(repeated)}")
    return records


def _object(record: Mapping[str, Any] | None, key: str) -> Mapping[str, Any] | None:
    value = (record or {}).get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{key} must be an object, got {value!r}")
    return value


def _optional(record: Mapping[str, Any], key: str) -> float | None:
    return None if record.get(key) is None else _number(record, key)


def _number(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, got {value!r} among {sorted(record)}")
    return float(value)


def some(names: Sequence[str] | Mapping[str, Any], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    shown = list(names)[:limit]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
