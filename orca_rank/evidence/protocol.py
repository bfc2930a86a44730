"""What to run: an adaptive list of fine-tunes, worked out anew from the rows that are there, so that it may stop.

The scale of every adapter is constant over ranks, layers and rules, so that a plan differs from another in its ranks
alone (under α/r a layer's rank would also be its learning rate). Rates are chosen on validation, with seeds of their
own; what is compared runs at one rate for a task and budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orca_rank.evidence.points import FROZEN, FULL, UNIFORM, Point, Row, finite


@dataclass(frozen=True)
class Protocol:
    """The options of an evidence run.

    Args:
        tasks: names, near to far. rules: names of rank rules; "uniform" is always run.
        budgets: uniform ranks at which rules are compared; none: the rank curve alone.
        gate: ranks of the rank curve, beside frozen and full.
        seeds: of a comparison; many: names of rules -> more seeds; gate_seeds: of the rank curve.
        permutations: of every rule named in `permuted`, each a plan of its own.
        rates: the grid, which extends itself where its edge wins.
        rate_seeds: how many seeds, other than those of the comparisons, choose a rate.
        steps: how often an edge may be extended.
        own_rates: the one of the budgets at which every rule also chooses its own rate, or None.
        arms: names of other changes of the config, the first the one that all others are compared with, each at its own
            rate at the parameters of uniform rank arms_rank.

    Raises:
        ValueError: an option out of range, with its name and value.
    """

    tasks: tuple[str, ...]
    rules: tuple[str, ...]
    budgets: tuple[int, ...] = (2, 4)
    gate: tuple[int, ...] = (1, 4, 16)
    seeds: int = 8
    gate_seeds: int = 3
    rate_seeds: int = 1
    many: Mapping[str, int] | None = None
    permuted: tuple[str, ...] = ()
    permutations: int = 4
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    steps: int = 3
    own_rates: int | None = None
    arms: tuple[str, ...] = ()
    arms_rank: int = 4

    def __post_init__(self) -> None:
        at_least = {"seeds": 2, "gate_seeds": 2, "rate_seeds": 1, "permutations": 2, "steps": 0}
        for name, least in at_least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"evidence.{name} must be an integer of at least {least}, received {value!r}")
        if not self.tasks:
            raise ValueError("evidence.tasks is empty: name at least one task")
        curve_alone = bool(self.gate) and not self.rules
        for name in ("budgets", "gate"):
            ranks = getattr(self, name)
            needed = not self.arms and not (name == "budgets" and curve_alone)
            if (needed and not ranks) or any(not isinstance(rank, int) or rank < 1 for rank in ranks):
                raise ValueError(f"evidence.{name} must be ranks of at least 1, received {list(ranks)}")
        if len(self.arms) == 1:
            raise ValueError(f"evidence.arms compares its first with the others: there is only {self.arms[0]}")
        if both := sorted({*self.arms} & {*self.rules, UNIFORM, FROZEN, FULL}):
            raise ValueError(f"evidence.arms has names of rules: {', '.join(both)}")
        if len(self.rates) < 2 or list(self.rates) != sorted(set(self.rates)) or not self.rates[0] > 0:
            raise ValueError(f"evidence.rates must be at least 2 rising rates above 0, received {list(self.rates)}")
        for name in ("many", "permuted"):
            if unknown := sorted({*(getattr(self, name) or ())} - {*self.rules}):
                raise ValueError(f"evidence.{name} names {', '.join(unknown)}, which evidence.rules does not have")
        if self.own_rates is not None and self.own_rates not in self.budgets:
            raise ValueError(
                f"evidence.own_rates={self.own_rates} must be one of evidence.budgets={list(self.budgets)}, or null"
            )

    def seeds_of(self, rule: str) -> int:
        """How many seeds a rule has; uniform has as many as the rule that has most."""
        counts = dict(self.many or {})
        return max([self.seeds, *counts.values()]) if rule == UNIFORM else counts.get(rule, self.seeds)


class Waiting(Exception):
    """What follows is not known before these points have run."""

    def __init__(self, points: Sequence[Point]) -> None:
        super().__init__(f"{len(points)} fine-tunes first")
        self.points = list(points)


def pending(protocol: Protocol, rows: Sequence[Row]) -> list[Point]:
    """The points that can run now and have not; none when the evidence is complete."""
    done = {row.point for row in rows}
    return [point for point in _known(protocol, rows, done) if point not in done]


def asked_for(protocol: Protocol, rows: Sequence[Row]) -> list[Row]:
    """The rows of the protocol as it is now; those at learning rates that are no longer the best, since a grid has
    grown, or of seeds that it no longer has, are left out."""
    wanted = {*_known(protocol, rows, {row.point for row in rows})}
    return [row for row in rows if row.part == "rates" or row.point in wanted]


def _known(protocol: Protocol, rows: Sequence[Row], done: set[Point]) -> Iterator[Point]:
    """The points of all tasks, done or not, as far as they are known from these rows."""
    for task in protocol.tasks:
        try:
            for points in _of_task(protocol, task, rows, done):
                yield from points
        except Waiting as waiting:
            yield from waiting.points


def _of_task(protocol: Protocol, task: str, rows: Sequence[Row], done: set[Point]) -> Iterator[list[Point]]:
    head = best_rate(protocol, rows, task, FROZEN, 0, None)
    waiting: list[Point] = []
    for group in (_curve_and_rules, _arms):
        try:
            yield from group(protocol, task, rows, done, head)
        except Waiting as first:
            waiting += first.points
    if waiting:
        raise Waiting(waiting)


def _curve_and_rules(
    protocol: Protocol, task: str, rows: Sequence[Row], done: set[Point], head: float
) -> Iterator[list[Point]]:
    if not protocol.gate:
        return
    rates, missing = _rates(
        protocol,
        rows,
        task,
        [*((UNIFORM, rank) for rank in sorted({*protocol.gate, *protocol.budgets})), (FULL, 0)],
        head,
    )
    curve = [(FROZEN, 0, head), *((UNIFORM, rank, rates.get((UNIFORM, rank))) for rank in protocol.gate)]
    curve.append((FULL, 0, rates.get((FULL, 0))))
    gate = [
        Point("gate", task, rule, rank, seed, 0, lr, head)
        for rule, rank, lr in curve
        if lr is not None
        for seed in range(protocol.gate_seeds)
    ]
    yield gate
    if missing:
        raise Waiting(missing)
    if any(point not in done for point in gate) or not _opens(protocol, rows, task):
        return
    for rank in protocol.budgets:
        yield [
            Point("rules", task, rule, rank, seed, permutation, rates[UNIFORM, rank], head)
            for seed in range(protocol.seeds_of(UNIFORM))  # so that every rule has its pairs wherever a run stops
            for rule in dict.fromkeys((UNIFORM, *protocol.rules))
            if seed < protocol.seeds_of(rule)
            for permutation in range(protocol.permutations if rule in protocol.permuted else 1)
        ]
    if (own_rates := protocol.own_rates) is not None:
        own, missing = _rates(protocol, rows, task, [(rule, own_rates) for rule in protocol.rules], head)
        yield [
            Point("own_rates", task, rule, own_rates, seed, 0, lr, head)
            for (rule, _), lr in own.items()
            if lr != rates[UNIFORM, own_rates]
            for seed in range(protocol.seeds)
        ]
        if missing:
            raise Waiting(missing)


def _opens(protocol: Protocol, rows: Sequence[Row], task: str) -> bool:
    try:
        return rank_matters(protocol, rows, task).matters
    except ValueError:  # all but one of its seeds diverged
        return False


def _arms(protocol: Protocol, task: str, rows: Sequence[Row], done: set[Point], head: float) -> Iterator[list[Point]]:
    rank = protocol.arms_rank
    rates, missing = _rates(protocol, rows, task, [(arm, rank) for arm in protocol.arms], head)
    if missing:
        raise Waiting(missing)
    yield [
        Point("arms", task, arm, rank, seed, 0, lr, head)
        for seed in range(protocol.seeds)
        for (arm, _), lr in rates.items()
    ]


def _rates(
    protocol: Protocol, rows: Sequence[Row], task: str, wanted: Sequence[tuple[str, int]], head: float
) -> tuple[dict[tuple[str, int], float], list[Point]]:
    """The rates that are known, of (rule, rank), and the points that the others wait for."""
    rates: dict[tuple[str, int], float] = {}
    missing: list[Point] = []
    for rule, rank in wanted:
        try:
            rates[rule, rank] = best_rate(protocol, rows, task, rule, rank, head)
        except Waiting as waiting:
            missing += waiting.points
    return rates, missing


def best_rate(
    protocol: Protocol, rows: Sequence[Row], task: str, rule: str, rank: int, predictor_lr: float | None
) -> float:
    """The learning rate of the lowest mean validation metric, on a grid that grows while its edge wins.

    Args:
        predictor_lr: that of embedder and predictor; None: it is this rate that is looked for (a frozen body).

    Raises:
        Waiting: with the points that have to run first.
    """
    grid = list(protocol.rates)
    ratio = grid[1] / grid[0]
    tried = {
        (row.lr, row.seed): row.val
        for row in rows
        if (row.part, row.task, row.rule, row.rank) == ("rates", task, rule, rank)
        and (predictor_lr is None or row.predictor_lr == predictor_lr)
    }
    seeds = [1000 + seed for seed in range(protocol.rate_seeds)]
    for step in range(protocol.steps + 1):
        lacking = [(lr, seed) for lr in grid for seed in seeds if (lr, seed) not in tried]
        if lacking:
            raise Waiting(
                [
                    Point("rates", task, rule, rank, seed, 0, lr, lr if predictor_lr is None else predictor_lr)
                    for lr, seed in lacking
                ]
            )
        means = [math.fsum(tried[lr, seed] for seed in seeds) / len(seeds) for lr in grid]
        best = _least(means)
        if 0 < best < len(grid) - 1 or step == protocol.steps:
            break
        grid = [_rounded(grid[0] / ratio), *grid] if best == 0 else [*grid, _rounded(grid[-1] * ratio)]
    if not math.isfinite(means[best]):
        raise ValueError(f"every learning rate of {task}, {rule}, rank {rank} diverged: lower evidence.rates")
    return grid[best]


def _least(means: Sequence[float]) -> int:
    """The place of the least mean; of several that tie, as errors of few images do, the one in their middle that is no
    edge, so that a grid does not grow for a tie."""
    least = min((mean for mean in means if math.isfinite(mean)), default=math.nan)
    places = [place for place, mean in enumerate(means) if mean == least] or [0]
    inner = [place for place in places if 0 < place < len(means) - 1] or places
    return inner[len(inner) // 2]


@dataclass(frozen=True)
class Gate:
    """Whether rank matters on a task: test errors at the smallest and the largest rank of the curve.

    Args:
        low, high: mean errors at the smallest and the largest rank. spread: the standard deviation of a run in what the
            two ranks of a seed do not share: that of their difference over √2. What a seed does to both (a teacher, a
            split) says nothing of ranks, so this is not the standard deviation over seeds of either.
    """

    low: float
    high: float
    spread: float

    @property
    def matters(self) -> bool:
        """Whether the two lie more than three of these standard deviations apart."""
        return abs(self.low - self.high) > 3 * self.spread


def rank_matters(protocol: Protocol, rows: Sequence[Row], task: str, part: str = "test") -> Gate:
    """The gate of a task, from those seeds of its rank curve that did not diverge; part: "test" or "val".

    Raises:
        ValueError: if the curve is not there, or fewer than 2 seeds of it.
    """
    if not protocol.gate:
        raise ValueError(f"there is no rank curve of {task}: evidence.gate is empty")
    errors = [
        {row.seed: getattr(row, part) for row in finite(rows, "gate", task, UNIFORM, rank)}
        for rank in (min(protocol.gate), max(protocol.gate))
    ]
    seeds = sorted(errors[0].keys() & errors[1].keys())
    if len(seeds) < 2:
        raise ValueError(
            f"the gate of {task} needs at least 2 seeds of its smallest and largest rank, has {len(seeds)}"
        )
    low, high = (math.fsum(each[seed] for seed in seeds) / len(seeds) for each in errors)
    apart = math.fsum((errors[0][seed] - errors[1][seed] - (low - high)) ** 2 for seed in seeds) / (len(seeds) - 1)
    return Gate(low, high, math.sqrt(apart / 2))


def most(protocol: Protocol) -> int:
    """How many fine-tunes the protocol needs at most where every gate opens and no grid grows."""
    curve = 2 + len(protocol.gate) if protocol.gate else 0
    tuned = 2 + len({*protocol.gate, *protocol.budgets}) if protocol.gate else 1
    rules = dict.fromkeys((UNIFORM, *protocol.rules))
    compared = sum(
        protocol.seeds_of(rule) * (protocol.permutations if rule in protocol.permuted else 1) for rule in rules
    )
    each = tuned * len(protocol.rates) * protocol.rate_seeds + curve * protocol.gate_seeds
    each += compared * len(protocol.budgets) if protocol.gate else 0
    if protocol.own_rates is not None:
        each += len(protocol.rules) * (len(protocol.rates) * protocol.rate_seeds + protocol.seeds)
    each += len(protocol.arms) * (len(protocol.rates) * protocol.rate_seeds + protocol.seeds)
    return each * len(protocol.tasks)


def _rounded(rate: float) -> float:
    return float(f"{rate:.6g}")
