"""stage=evidence: many fine-tunes at equal budgets, and the verdicts that they support."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from orca_rank.artifacts.damaged import reading
from orca_rank.artifacts.files import read_json, write_csv, write_json
from orca_rank.artifacts.lock import locked
from orca_rank.artifacts.provenance import differences, select
from orca_rank.evidence.points import Point, Row
from orca_rank.evidence.protocol import Protocol, most, pending
from orca_rank.stages import align, finetune
from orca_rank.stages.evidence_donors import is_donor, make_read
from orca_rank.stages.evidence_points import check_arms, check_rules, configured, cost_of_one_rank, task_options
from orca_rank.stages.evidence_words import CHECK, announce, conclude, gaps_of
from orca_rank.stages.setup import stage_folder
from orca_rank.stages.tracking import show
from orca_rank.tracking.pages import evidence_page
from orca_rank.words import duration

console = Console(highlight=False, markup=False)
PAUSE = 5.0  # seconds between looks at what other processes have ended


def run(config: DictConfig) -> None:
    """Run what the protocol asks for, point by point, and write evidence/: evidence.csv, claims.json, README.md and
    rank_curve.png.

    Every point is a fine-tune in evidence/<task>/finetune/; one that is there is not run again, so that the same
    command goes on where it stopped. Several processes share the points of one folder, each taking what no other is at.

    Raises:
        ValueError: an option out of range, adapters whose scale depends on their rank, or rows of other options.
    """
    protocol = protocol_of(config.evidence)
    scaling = (config.adapter.get("module") or {}).get("scaling")
    if scaling not in ("constant", "rslora"):
        raise ValueError(
            f"stage=evidence compares plans at one scale, received adapter={config.adapter.name} "
            f"adapter.module.scaling={scaling}: under α/r a plan also gives every layer its own learning rate; set "
            f"adapter=lora adapter.module.scaling=constant (or, as a check beside it, rslora)"
        )
    folder = stage_folder(config, "evidence")
    announce(protocol)
    known: dict[Path, Row] = {}
    _run(config, folder, protocol, known)
    with locked(folder, wait=True):
        rows = read_rows(config, folder, protocol, known)
        _collect(folder, rows)
        conclude(folder, protocol, rows, str(config.evidence.metric), () if scaling == "constant" else (CHECK,))
    show(config, "evidence", folder, select(config, "evidence"), lambda: evidence_page(folder.parent))


def _run(config: DictConfig, folder: Path, protocol: Protocol, known: dict[Path, Row]) -> None:
    costs = {task: cost_of_one_rank(config, task) for task in protocol.tasks}
    check_rules(config, folder, protocol, costs)
    check_arms(config, folder, protocol, costs)
    started, begun, own = time.monotonic(), len(read_rows(config, folder, protocol, known)), 0
    while points := pending(protocol, rows := read_rows(config, folder, protocol, known)):
        if config.evidence.most_points is not None and own >= config.evidence.most_points:
            console.print(f"stopped after {own} fine-tunes (evidence.most_points={own}); {len(points)} can run now")
            return
        done = len(rows) - begun
        left = max(most(protocol) - len(rows), len(points)) * (time.monotonic() - started) / max(done, 1)
        time_left = f", at most {duration(left)} left" if done else ""
        with _claimed(folder, points) as point:
            if point is None:
                time.sleep(PAUSE)
            elif not _row_of(folder, point).exists():  # or another process has ended it since the rows were read
                console.print(f"{len(rows)} done{time_left}: {point.task} {point.name}", soft_wrap=True)
                donor = None
                if point.rule in protocol.rules:
                    with locked(_at_work(folder, point.task, "measure"), wait=True):
                        donor = make_read(config, folder, point.task, costs[point.task], protocol, rows)
                _run_point(config, folder, point, costs[point.task], protocol, donor)
                own += 1
                with locked(folder, wait=True):
                    _collect(folder, read_rows(config, folder, protocol, known))
    allowed = config.evidence.most_points is None or own < config.evidence.most_points
    if allowed and protocol.gate and len(protocol.tasks) > 1:  # the gaps of tasks that no rule was compared on
        for task in set(protocol.tasks) - gaps_of(folder, protocol, str(config.evidence.metric)).keys():
            with locked(_at_work(folder, task, "measure"), wait=True):
                make_read(config, folder, task, costs[task], protocol, rows, rules=False)


@contextlib.contextmanager
def _claimed(folder: Path, points: Sequence[Point]) -> Iterator[Point | None]:
    """The first point that no other process is at, held while the block runs; None where there is none."""
    with contextlib.ExitStack() as held:
        for point in points:
            try:
                held.enter_context(locked(_at_work(folder, point.task, point.name), wait=False))
            except BlockingIOError:
                continue
            yield point
            return
        yield None


def _at_work(folder: Path, task: str, name: str) -> Path:
    """A folder that whoever makes something of a task holds meanwhile."""
    return folder / ".working" / task / name


def _row_of(folder: Path, point: Point) -> Path:
    return folder / point.task / "rows" / f"{point.name}.json"


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


def read_rows(config: DictConfig, folder: Path, protocol: Protocol, known: dict[Path, Row]) -> list[Row]:
    """The rows of the points that are done, in an order that does not depend on when they were.

    Args:
        known: those that were read before, by file; what is new is added.

    Raises:
        ValueError: if a row was made with other options than the task has now.
    """
    options = cache(lambda task, rule: task_options(config, task, rule))
    for task in protocol.tasks:
        for path in sorted((folder / task / "rows").glob("*.json")):
            if path in known:
                continue
            stored = read_json(path, "stage=evidence")
            with reading(path, "remove it, and the same command makes it again"):
                row = Row.from_dict({name: str(value) for name, value in stored["row"].items()})
                wanted = options(task, row.rule)
                made_with = {name: value for name, value in stored["config"].items() if name in wanted}
            if changed := sorted(differences(made_with, wanted)):
                raise ValueError(
                    f"{path} was made with other options ({'; '.join(changed[:4])}): choose another run=<name>, or "
                    f"remove {folder / task}"
                )
            known[path] = row
    tasks, rules = list(protocol.tasks), ["", *protocol.rules, *protocol.arms]
    return sorted(
        known.values(),
        key=lambda row: (
            tasks.index(row.task),
            row.part,
            rules.index(row.rule) if row.rule in rules else 0,
            row.rule,
            row.rank,
            row.permutation,
            row.seed,
            row.lr,
        ),
    )


def _run_point(
    config: DictConfig, folder: Path, point: Point, cost: int, protocol: Protocol, donor: Point | None
) -> None:
    run = configured(config, folder, point, cost, is_donor(protocol, point), donor)
    if run.embedder.aligned:
        with locked(_at_work(folder, run.run, "align"), wait=True):
            align.run(run)
    own, started = stage_folder(run, "finetune") / point.name, time.monotonic()
    try:
        finetune.run(run)
        row = _row(point, read_json(own / "metrics.json", "stage=evidence"))
    except FloatingPointError as error:  # a result too: of a rate that is too high, or of a rule
        console.print(f"{point.task} {point.name} diverged: {error}", soft_wrap=True)
        row = Row(**vars(point), val=math.inf, test=math.inf, parameters=0, seconds=time.monotonic() - started)
        shutil.rmtree(own, ignore_errors=True)
    write_json(_row_of(folder, point), {"row": row.to_dict()}, config=task_options(config, point.task, point.rule))


def _row(point: Point, metrics: Mapping[str, Any]) -> Row:
    cross_entropy = metrics.get("test/cross_entropy", metrics.get("test/binary_cross_entropy", math.nan))
    return Row(
        **vars(point),
        val=float(metrics[f"val/{metrics['metric']}"]),
        test=float(metrics[f"test/{metrics['metric']}"]),
        parameters=int(metrics["trainable_parameters"]["total"]),
        seconds=float(metrics["seconds"]),
        cross_entropy=float(cross_entropy),
    )


def _collect(folder: Path, rows: Sequence[Row]) -> None:
    write_csv(folder / "evidence.csv", [row.to_dict() for row in rows])
