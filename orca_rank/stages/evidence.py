"""stage=evidence: many fine-tunes at equal budgets, and the verdicts that they support."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orca_rank.artifacts.damaged import reading
from orca_rank.artifacts.files import atomic, read_json, write_csv, write_json
from orca_rank.artifacts.lock import locked
from orca_rank.artifacts.provenance import differences
from orca_rank.evidence.compare import half_width
from orca_rank.evidence.points import FROZEN, UNIFORM, Point, Row
from orca_rank.evidence.protocol import Protocol, most, pending, rank_matters
from orca_rank.evidence.verdicts import (
    MARGIN,
    Claim,
    gap_against_shuffled,
    parameters_at_equal_error,
    rank_grows_with_gap,
    ranks_matter,
    recommended,
    rules_against_uniform,
)
from orca_rank.report.canvas import png
from orca_rank.report.claims import curve_figure, markdown, rank_curves
from orca_rank.stages import align, finetune, measure
from orca_rank.stages.evidence_points import configured, cost_of_one_rank, for_task, task_options
from orca_rank.stages.planning import read_layers
from orca_rank.stages.setup import stage_folder

console = Console(highlight=False)
SPREAD = 2.1  # per cent of the error: the paired spread over seeds in runs of this size, before this one has its own


def run(config: DictConfig) -> None:
    """Run what the protocol asks for, point by point, and write evidence/: evidence.csv, claims.json, README.md and
    rank_curve.png.

    Every point is a fine-tune in evidence/<task>/finetune/; one that is there is not run again, so that the same
    command goes on where it stopped.

    Raises:
        ValueError: an option out of range, adapters whose scale depends on their rank, or rows of other options.
            BlockingIOError: another process is at work in the folder.
    """
    protocol = protocol_of(config.evidence)
    if config.adapter.module.get("scaling") != "constant":
        raise ValueError(
            f"stage=evidence compares plans at one scale, received adapter.module.scaling="
            f"{config.adapter.module.get('scaling')}: under α/r a plan also gives every layer its own learning rate; "
            f"set adapter.module.scaling=constant"
        )
    folder = stage_folder(config, "evidence")
    _announce(protocol)
    with locked(folder):
        _run(config, folder, protocol)


def _run(config: DictConfig, folder: Path, protocol: Protocol) -> None:
    costs = {task: cost_of_one_rank(config, task) for task in protocol.tasks}
    rows = read_rows(config, folder, protocol)
    if rows:
        _collect(folder, rows)
    started, begun = time.monotonic(), len(rows)
    while points := pending(protocol, rows):
        done = len(rows) - begun
        if config.evidence.most_points is not None and done >= config.evidence.most_points:
            console.print(f"stopped after {done} fine-tunes (evidence.most_points={done}); {len(points)} can run now")
            break
        left = max(most(protocol) - len(rows), len(points)) * (time.monotonic() - started) / max(done, 1)
        time_left = f", at most {left / 3600:.1f} h left" if done else ""
        console.print(f"{len(rows)} done{time_left}: {points[0].task} {points[0].name}", soft_wrap=True)
        if points[0].rule in protocol.rules:
            _measured(config, folder, points[0].task, costs[points[0].task], protocol, rows)
        rows.append(_run_point(config, folder, points[0], costs[points[0].task], protocol))
        _collect(folder, rows)
    _conclude(folder, protocol, rows, str(config.evidence.metric))


def protocol_of(given: DictConfig) -> Protocol:
    """The options of config.evidence as they travel.

    Raises:
        ValueError: for an option out of range.
    """
    return Protocol(
        tasks=tuple(given.tasks),
        rules=tuple(given.rules),
        budgets=tuple(given.budgets),
        gate=tuple(given.gate),
        seeds=given.seeds,
        gate_seeds=given.gate_seeds,
        rate_seeds=given.rate_seeds,
        many=dict(given.many),
        permuted=tuple(given.permuted),
        permutations=given.permutations,
        rates=tuple(given.rates),
        steps=given.steps,
        own_rates=given.own_rates,
        arms=_arms(given),
        arms_rank=given.arms_rank,
    )


def _arms(given: DictConfig) -> tuple[str, ...]:
    """The names of the arms, the one that all others are compared with first."""
    names = [str(name) for name in given.arms]
    if names and given.baseline not in names:
        raise ValueError(
            f"evidence.baseline={given.baseline}: must be the arm that the others are compared with, one of "
            f"{', '.join(names)}"
        )
    return tuple(sorted(names, key=lambda name: name != given.baseline))


def read_rows(config: DictConfig, folder: Path, protocol: Protocol) -> list[Row]:
    """The rows of the points that are done.

    Raises:
        ValueError: if a row was made with other options than the task has now.
    """
    rows = []
    known = cache(lambda task, rule: task_options(config, task, rule))
    for task in protocol.tasks:
        for path in sorted((folder / task / "rows").glob("*.json")):
            stored = read_json(path, "stage=evidence")
            with reading(path, "remove it, and the same command makes it again"):
                row = Row.from_dict({name: str(value) for name, value in stored["row"].items()})
                made_with = dict(stored["config"])
            if changed := sorted(differences(made_with, known(task, row.rule))):
                raise ValueError(
                    f"{path} was made with other options ({'; '.join(changed[:4])}): choose another run=<name>, or "
                    f"remove {folder / task}"
                )
            rows.append(row)
    return rows


def _run_point(config: DictConfig, folder: Path, point: Point, cost: int, protocol: Protocol) -> Row:
    run = configured(config, folder, point, cost, keep_update=_is_donor(protocol, point))
    if run.embedder.aligned:
        align.run(run)
    finetune.run(run)
    path = stage_folder(run, "finetune") / point.name / "metrics.json"
    metrics = read_json(path, "stage=evidence")
    row = Row(
        **vars(point),
        val=float(metrics[f"val/{metrics['metric']}"]),
        test=float(metrics[f"test/{metrics['metric']}"]),
        parameters=int(metrics["trainable_parameters"]["total"]),
        seconds=float(metrics["seconds"]),
    )
    write_json(
        folder / point.task / "rows" / f"{point.name}.json",
        {"row": row.to_dict()},
        config=task_options(config, point.task, point.rule),
    )
    return row


def _is_donor(protocol: Protocol, point: Point) -> bool:
    """Whether rank=trained reads what this point learns: the first run of the curve's largest uniform rank."""
    return (point.part, point.rule, point.rank, point.seed) == ("gate", UNIFORM, max(protocol.gate, default=0), 0)


def _measured(config: DictConfig, folder: Path, task: str, cost: int, protocol: Protocol, rows: Sequence[Row]) -> None:
    """What the rules read, once a task: the update that the largest uniform rank learned, and gaps and spectra with the
    predictor of the frozen body's first run (through a random predictor gradients see noise).

    Rows may have come without their fine-tunes, as those of the repository do: the two are then run again.
    """
    gate = [row.point for row in rows if (row.part, row.task, row.seed) == ("gate", task, 0)]
    frozen = next(point for point in gate if point.rule == FROZEN)
    donor = next(point for point in gate if _is_donor(protocol, point))
    for point, result in ((frozen, "metrics.json"), (donor, "update.safetensors")):
        if not (folder / task / "finetune" / point.name / result).exists():
            finetune.run(configured(config, folder, point, cost, keep_update=point == donor))
    if not (folder / task / "measure" / "layers.json").exists():
        fitted = folder / task / "finetune" / frozen.name
        measure.run(for_task(config, folder, task, {"measure": {"fitted": str(fitted)}}))


def _collect(folder: Path, rows: Sequence[Row]) -> None:
    order = sorted(rows, key=lambda row: (row.task, row.part, row.rule, row.rank, row.permutation, row.seed, row.lr))
    write_csv(folder / "evidence.csv", [row.to_dict() for row in order])


def _announce(protocol: Protocol) -> None:
    """What the run can tell apart, before any work: half the 95 % interval of a paired difference."""
    seeds = sorted({protocol.seeds_of(rule) for rule in (UNIFORM, *protocol.rules)})
    widths = ", ".join(f"±{half_width(SPREAD, count):.1f} % with {count} seeds" for count in seeds)
    console.print(
        f"{len(protocol.tasks)} tasks, {len(protocol.rules)} rules, {len(protocol.arms)} arms, at most "
        f"{most(protocol)} fine-tunes; on one task a difference will be known to {widths} if seeds spread by "
        f"{SPREAD} % (equivalence is asked within ±{MARGIN:g} %)"
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
            yield from rules_against_uniform(rows, tasks, rank)
        for rule in protocol.rules:
            yield from parameters_at_equal_error(protocol, rows, compared, rank, rule)
    if protocol.own_rates is not None:
        for tasks in groups:
            yield from rules_against_uniform(rows, tasks, protocol.own_rates, "own_rates")
    if protocol.arms:
        first, rank = protocol.arms[0], protocol.arms_rank
        tried = [task for task in protocol.tasks if any(row.part == "arms" and row.task == task for row in rows)]
        for tasks in ([tried] if len(tried) > 1 else []) + [[task] for task in tried]:
            yield from rules_against_uniform(rows, tasks, rank, "arms", first)
    yield from rank_grows_with_gap(protocol, rows, gaps)


def _conclude(folder: Path, protocol: Protocol, rows: Sequence[Row], metric: str) -> None:
    gaps = {}
    for task in protocol.tasks:
        path = folder / task / "measure" / "layers.json"
        if path.exists():
            gaps[task] = median(layer.gap[metric].value for layer in read_layers(path))
    found = list(claims(protocol, rows, gaps))
    answers = []
    for task in protocol.tasks:
        try:
            rank_matters(protocol, rows, task)
        except ValueError:
            continue  # its curve has not been run yet
        answers.append(recommended(protocol, rows, task))
    payload: dict[str, Any] = {
        "claims": [claim.to_dict() for claim in found],
        "recommended": answers,
        "gaps": gaps,
        "runs": len(rows),
        "seconds": sum(row.seconds for row in rows),
    }
    write_json(folder / "claims.json", payload)
    with atomic(folder / "README.md") as temporary:
        temporary.write_text(markdown(found, rows, answers))
    if curves := rank_curves(rows):
        with atomic(folder / "rank_curve.png") as temporary:
            temporary.write_bytes(png(curve_figure(curves)))
    table = Table("claim", "verdict", "figure", "95 % interval", "runs")
    for claim in found:
        table.add_row(
            escape(claim.claim),
            claim.verdict,
            f"{claim.estimate:+.2f} {claim.unit}",
            f"{claim.low:+.2f} to {claim.high:+.2f}",
            str(claim.runs),
        )
    console.print(table)
    for answer in answers:
        console.print(answer, soft_wrap=True, markup=False)
    console.print(f"written to {folder / 'evidence.csv'} and {folder / 'claims.json'}", soft_wrap=True)
