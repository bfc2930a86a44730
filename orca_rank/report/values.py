"""Numbers of a run as text and in relation: intervals in brackets, budgets in words, Spearman's ρ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from orca_rank.measuring.records import Gap
from orca_rank.report.draw import Number, words
from orca_rank.report.page import cell
from orca_rank.report.results import Interval, Measurement

_NAMES = {"r": "rank"}


def counted(number: int, thing: str) -> str:
    """1 epoch, 2 epochs."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def spearman(x: Sequence[Number], y: Sequence[Number]) -> float | str:
    """Spearman's ρ, ties at their mean rank; "" where one side is constant. (scipy.stats takes seconds to import.)"""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return ""
    return float(np.corrcoef(_mean_ranks(x), _mean_ranks(y))[0, 1])


def _mean_ranks(values: Sequence[Number]) -> np.ndarray:
    _, place, count = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def gaps_of(measured: Measurement, metric: str) -> dict[str, Gap]:
    return {layer.name: layer.gap[metric] for layer in measured.layers if metric in layer.gap}


def p_note(gaps: Mapping[str, Gap]) -> str:
    known = all(gap.p_family is not None for gap in gaps.values())
    return "permutation test for all layers together" if known else "each layer tested by itself"


def estimate_text(estimate: Interval | Gap) -> str:
    return cell(estimate.value) + interval_text(estimate.low, estimate.high)


def interval_text(low: float | None, high: float | None) -> str:
    """The ends of an interval in brackets; "" where they are not known."""
    return "" if low is None or high is None else f" [{cell(low)}, {cell(high)}]"


def budget_words(text: str) -> str:
    """A budget as a reader writes it: parameters=32256 -> 32,256 parameters."""
    said = []
    for part in text.split():
        name, _, value = part.partition("=")
        said.append(
            f"{int(value):,} parameters" if name == "parameters" else f"{_NAMES.get(name, words(name))} {value}"
        )
    return ", ".join(said)
