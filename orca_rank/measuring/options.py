"""What stage=measure is asked for, checked once before any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from orca_rank.distances.calibrate import standardise, whiten
from orca_rank.distances.scores import Metric, check_metric, has_fast_route, reads_labels

VARIANTS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "standardised": standardise,
    "whitened": whiten,
}
GRADIENTS = ("gradient", "whitened_gradient", "importance", "fisher", "mean_gradient")  # of the loss of the target
SIGNED = ("gradient", "whitened_gradient")  # with a null of random signs
MEASUREMENTS = ("weight", "ot_map", "activation", "intrinsic_dimension", *GRADIENTS)


@dataclass(frozen=True)
class Draws:
    """How often images are drawn again: bootstrap for the 95 % intervals, permutations for the p-values; 0 for none."""

    bootstrap: int
    permutations: int


@dataclass(frozen=True)
class GapOptions:
    """The options of the config group `gap`, by the same names and with the same defaults.

    Args:
        metrics: name -> a function (x (n, d), y (m, d)) -> number. samples: images of each side.
        batch_size: images of a forward pass, None as the data have it. splits: random halvings that are averaged.
        bootstrap, permutations: draws for metrics with a fast route; slow: the draws of all others.
        variants: of `VARIANTS`, features on which every metric is taken too. measurements: of `MEASUREMENTS`.
        tokens: kept of each side at every layer for spectra. null_splits, sign_draws: draws behind the nulls of the
            transport map and of the gradient. components: wider inputs are projected on so many for the transport map.
        directions: singular vectors kept for adapters to start from.

    Raises:
        ValueError: for a value that cannot be used, naming the option, what it holds and what it may hold.
    """

    metrics: Mapping[str, Metric]
    samples: int = 256
    batch_size: int | None = 32
    splits: int = 8
    bootstrap: int = 100
    permutations: int = 199
    slow: Draws = Draws(20, 39)
    variants: tuple[str, ...] = ()
    measurements: frozenset[str] = frozenset({"weight"})
    tokens: int = 2048
    null_splits: int = 10
    sign_draws: int = 8
    components: int = 128
    directions: int = 16

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.variants) - set(VARIANTS)):
            raise ValueError(f"gap.variants has {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
        if unknown := sorted(self.measurements - set(MEASUREMENTS)):
            raise ValueError(f"gap.measurements has {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}")
        if not self.metrics:
            raise ValueError("gap.metrics is empty: name at least one metric, such as mmd in gap=default")
        for name, metric in self.metrics.items():
            check_metric(name, metric)
        numbers = {name: getattr(self, name) for name in _least(self.measurements) if "." not in name}
        slow = {f"slow.{name}": getattr(self.slow, name) for name in ("bootstrap", "permutations")}
        _check_numbers(numbers | slow, self.measurements)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], metrics: Mapping[str, Metric]) -> GapOptions:
        """The config group as plain values, and the metrics that it names, built."""
        names = [item.name for item in fields(cls)]
        if unknown := sorted(set(record) - set(names)):
            raise ValueError(f"gap has no option {', '.join(unknown)}; there are {', '.join(names)}")
        options = {name: value for name, value in record.items() if name != "metrics"}
        if "measurements" in options:
            flags = _object("measurements", options["measurements"])
            for name, wanted in flags.items():
                if not isinstance(wanted, bool):
                    raise ValueError(f"gap.measurements.{name} must be true or false, received {wanted!r}")
            options["measurements"] = frozenset(name for name, wanted in flags.items() if wanted)
        wanted = options.get("measurements", cls.measurements)
        if "slow" in options:
            slow = _object("slow", options["slow"])
            if set(slow) != {"bootstrap", "permutations"}:
                raise ValueError(f"gap.slow must hold bootstrap and permutations, received {dict(slow)}")
            _check_numbers({f"slow.{name}": value for name, value in slow.items()}, wanted)
            options["slow"] = Draws(**slow)
        if "variants" in options:
            variants = options["variants"]
            if not isinstance(variants, list | tuple) or not all(isinstance(name, str) for name in variants):
                raise ValueError(f"gap.variants must be a list among {', '.join(VARIANTS)}, received {variants!r}")
            options["variants"] = tuple(variants)
        _check_numbers({name: options[name] for name in _least(wanted) if name in options}, wanted)
        return cls(metrics, **options)

    def asks(self, *measurements: str) -> bool:
        """Whether one of these measurements is wanted."""
        return not self.measurements.isdisjoint(measurements)

    def check_unlabelled(self, sides: Sequence[str]) -> None:
        """Refuse what cannot be measured without labels.

        Args:
            sides: of the data that have no labels: "source", "target", or a further target.

        Raises:
            ValueError: naming what is asked for.
        """
        asked = [f"gap.metrics.{name}" for name, metric in self.metrics.items() if sides and reads_labels(metric)]
        if "target" in sides:
            asked += [f"gap.measurements.{name}" for name in GRADIENTS if name in self.measurements]
        if asked:
            raise ValueError(
                f"{', '.join(asked)} need labels, which the {' and the '.join(sides)} data do not have: leave them "
                f"out, or give labels"
            )

    def draws(self, metric: Metric) -> Draws:
        """How often images are drawn again for this metric."""
        return Draws(self.bootstrap, self.permutations) if has_fast_route(metric) else self.slow


def _least(measurements: frozenset[str]) -> dict[str, int]:
    """The smallest value of every option that is a number, given what is measured."""
    carried = not measurements.isdisjoint({"ot_map", "activation"})
    least = {"samples": 8, "batch_size": 1, "splits": 1, "bootstrap": 0, "permutations": 0}
    least |= {"slow.bootstrap": 0, "slow.permutations": 0, "directions": 0, "tokens": 2 if carried else 0}
    least |= {"components": int("ot_map" in measurements), "null_splits": 2 if "ot_map" in measurements else 0}
    return least | {"sign_draws": 0 if measurements.isdisjoint(SIGNED) else 2}


def _check_numbers(values: Mapping[str, object], measurements: frozenset[str]) -> None:
    least = _least(measurements)
    for name, value in values.items():
        if name == "batch_size" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least[name]:
            raise ValueError(f"gap.{name} must be an integer of at least {least[name]}, received {value!r}")


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"gap.{name} must be an object of options, received {value!r}")
    return value
