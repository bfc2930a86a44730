"""Estimates of differences between runs: paired by seed, crossed with permutations, pooled over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import optimize, special


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, on Student's t with `df` degrees of freedom.

    Args:
        mean: in the unit of what was averaged. se: its standard error, > 0 or inf where it is not known.
        df: degrees of freedom. runs: how many fine-tunes stand behind it.
    """

    mean: float
    se: float
    df: float
    runs: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The central interval; infinite where the standard error is not known."""
        half = self.se * float(special.stdtrit(self.df, 0.5 + level / 2)) if np.isfinite(self.se) else np.inf
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float:
        """Two-sided p-value of "the mean is 0"; 1 where the standard error is not known."""
        return 2 * float(special.stdtr(self.df, -abs(self.mean) / self.se)) if np.isfinite(self.se) else 1.0

    def p_outside(self, margin: float) -> float:
        """p-value of "the mean lies outside ±margin": the larger of two one-sided tests (TOST, Schuirmann 1987)."""
        if not np.isfinite(self.se):
            return 1.0
        below, above = (self.mean + margin) / self.se, (margin - self.mean) / self.se
        return float(special.stdtr(self.df, -min(below, above)))


def paired(differences: Sequence[float] | Float[np.ndarray, " runs"]) -> Estimate:
    """Mean of differences that were taken seed by seed; the standard error of one difference is not known.

    Raises:
        ValueError: for no differences, or ones that are not finite.
    """
    values = _finite(differences)
    if len(values) == 1:
        return Estimate(float(values[0]), np.inf, 1, 1)
    return Estimate(
        float(values.mean()), _positive(values.std(ddof=1) / len(values) ** 0.5), len(values) - 1, len(values)
    )


def crossed(differences: Float[np.ndarray, "seeds permutations"]) -> Estimate:
    """Mean of a two-way layout in which seeds and permutations are both random.

    With mean squares of the rows, the columns and the rest, Var(mean) = (MS_seed + MS_perm − MS_rest) / (S P), never
    taken below what either factor alone gives; the degrees of freedom are Satterthwaite's.

    Raises:
        ValueError: for fewer than 2 seeds or 2 permutations, or values that are not finite.
    """
    s, p = differences.shape
    if s < 2 or p < 2:
        raise ValueError(f"a crossed comparison needs at least 2 seeds and 2 permutations, got {s} and {p}")
    x = _finite(differences.ravel()).reshape(s, p)
    centre, rows, columns = x.mean(), x.mean(1), x.mean(0)
    ms = np.array(
        [
            p * np.square(rows - centre).sum() / (s - 1),
            s * np.square(columns - centre).sum() / (p - 1),
            np.square(x - rows[:, None] - columns + centre).sum() / ((s - 1) * (p - 1)),
        ]
    )
    df = np.array([s - 1, p - 1, (s - 1) * (p - 1)])
    variance = ms[0] + ms[1] - ms[2]
    if variance <= max(ms[0], ms[1]):
        largest = int(np.argmax(ms[:2]))
        return Estimate(float(centre), _positive((ms[largest] / (s * p)) ** 0.5), float(df[largest]), s * p)
    freedom = variance**2 / (np.square(ms) / df).sum()
    return Estimate(float(centre), _positive((variance / (s * p)) ** 0.5), float(freedom), s * p)


def pooled(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over tasks, the task a random effect: Paule–Mandel's τ² and Hartung–Knapp's interval, whose factor is
    not taken below 1 (Röver, Knapp and Friede 2015). One task stays what it is.

    Raises:
        ValueError: for no estimates.
    """
    if not estimates:
        raise ValueError("there is nothing to pool: no task has both sides of the comparison")
    known = [estimate for estimate in estimates if np.isfinite(estimate.se)]
    runs = sum(estimate.runs for estimate in estimates)
    if len(estimates) == 1:
        return estimates[0]
    if len(known) < len(estimates):
        return Estimate(float(np.mean([estimate.mean for estimate in estimates])), np.inf, 1, runs)
    y, v = (np.array([getattr(e, name) for e in known]) for name in ("mean", "se"))
    v, k = v**2, len(known)

    def excess(tau2: float) -> float:
        w = 1 / (v + tau2)
        return float((w * (y - (w * y).sum() / w.sum()) ** 2).sum() - (k - 1))

    tau2 = 0.0
    if excess(0.0) > 0:
        top = float(k * np.square(y - y.mean()).sum())
        tau2 = float(optimize.brentq(excess, 0.0, top, xtol=1e-12 * top))
    w = 1 / (v + tau2)
    mean = float((w * y).sum() / w.sum())
    q = float((w * (y - mean) ** 2).sum()) / (k - 1)
    return Estimate(mean, float((max(1.0, q) / w.sum()) ** 0.5), k - 1, runs)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: sorted, p_(i) (m − i + 1), running maximum, at most 1."""
    adjusted, running = {}, 0.0
    order = sorted(p_values, key=lambda name: p_values[name])
    for place, name in enumerate(order):
        running = max(running, min(1.0, p_values[name] * (len(order) - place)))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def half_width(spread: float, seeds: int, level: float = 0.95) -> float:
    """What half the interval of a paired mean will be: t √(spread² / seeds), before anything has run."""
    return float(special.stdtrit(seeds - 1, 0.5 + level / 2)) * spread / seeds**0.5 if seeds > 1 else np.inf


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    found = np.asarray(values, dtype=float)
    if not found.size or not np.isfinite(found).all():
        raise ValueError(f"a comparison needs finite differences, at least one; received {found.tolist()}")
    return found


def _positive(se: float) -> float:
    """Identical differences say nothing of their spread but that it is below what floating point can hold."""
    return float(max(se, 1e-100))
