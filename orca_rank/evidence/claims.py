"""Every claim that an evidence run can decide, from its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from orca_rank.evidence.curves import grows_with_gap, ranks_matter
from orca_rank.evidence.points import FROZEN, UNIFORM, Row
from orca_rank.evidence.protocol import Protocol, Waiting, best_rate
from orca_rank.evidence.verdicts import (
    Claim,
    any_of,
    gap_against_shuffled,
    parameters_at_equal_error,
    rules_against_uniform,
)


def claims(protocol: Protocol, rows: Sequence[Row], gaps: Mapping[str, float]) -> Iterator[Claim]:
    """Every verdict that the rows allow, tasks together before tasks apart.

    Args:
        gaps: task -> median calibrated gap over its layers.
    """
    yield from ranks_matter(protocol, rows)
    compared = [task for task in protocol.tasks if any(row.part == "rules" and row.task == task for row in rows)]
    groups = [compared] if len(compared) > 1 else []
    groups += [[task] for task in compared]
    for rank in protocol.budgets:
        for tasks in groups:
            for control in protocol.permuted:
                yield from gap_against_shuffled(rows, tasks, rank, control=control)
            yield from any_of(found := rules_against_uniform(rows, tasks, rank), "rule")
            yield from found
        for rule in protocol.rules:
            yield from parameters_at_equal_error(protocol, rows, compared, rank, rule)
    if protocol.own_rates is not None:
        also = [row for task in compared for row in _same_rate(protocol, rows, task, protocol.own_rates)]
        for tasks in groups:
            yield from rules_against_uniform([*rows, *also], tasks, protocol.own_rates, "own_rates")
    if protocol.arms:
        first, rank = protocol.arms[0], protocol.arms_rank
        tried = [task for task in protocol.tasks if any(row.part == "arms" and row.task == task for row in rows)]
        for tasks in ([tried] if len(tried) > 1 else []) + [[task] for task in tried]:
            yield from any_of(found := rules_against_uniform(rows, tasks, rank, "arms", first), "other arm")
            yield from found
    yield from grows_with_gap(protocol, rows, gaps)


def _same_rate(protocol: Protocol, rows: Sequence[Row], task: str, rank: int) -> Iterator[Row]:
    """The rows of rules whose own best rate is uniform's: what they did at that rate is what they do at their own."""
    try:
        head = best_rate(protocol, rows, task, FROZEN, 0, None)
        shared = best_rate(protocol, rows, task, UNIFORM, rank, head)
    except Waiting:
        return
    for rule in protocol.rules:
        try:
            own = best_rate(protocol, rows, task, rule, rank, head)
        except Waiting:
            continue
        if own == shared:
            mine = (row for row in rows if (row.part, row.task, row.rule, row.rank) == ("rules", task, rule, rank))
            yield from (replace(row, part="own_rates") for row in mine)
