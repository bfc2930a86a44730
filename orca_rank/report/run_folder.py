"""Everything that the earlier stages left in a run folder, read once for the report."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from orca_rank.artifacts.command import command, left
from orca_rank.artifacts.files import read_json
from orca_rank.artifacts.provenance import check_inputs
from orca_rank.ranks import RankPlan
from orca_rank.report.kept import Kept
from orca_rank.report.results import Alignment, Measurement, Planned, Rows, Tune

T = TypeVar("T")


@dataclass
class RunFolder:
    """What a run folder holds; None or empty where a stage has not run.

    Attributes:
        made_by: the arguments that choose this folder on the command line, e.g. "run=mine".
        compare: measure/compare/<name>.json by name.
        tunes: the finished fine-tunes, best validation metric first within each metric.
        missing: (what is missing, the command that makes it). stale: one sentence per file whose inputs changed.
        kept: what the files of fine-tunes held before, while they are read.
    """

    path: Path
    made_by: str
    align: Alignment | None = None
    measured: Measurement | None = None
    compare: dict[str, Measurement] = field(default_factory=dict)
    plan: Planned | None = None
    tunes: list[Tune] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    kept: Kept | None = None

    @property
    def empty(self) -> bool:
        return not (self.align or self.measured or self.plan or self.tunes or self.has_evidence)

    @property
    def has_evidence(self) -> bool:
        """Whether stage=evidence has ended here; its fine-tunes lie in its own folder."""
        return (self.path / "evidence" / "claims.json").exists()

    def add(self, other: RunFolder) -> None:
        """Take the fine-tunes of another run folder, with what is missing and stale there."""
        self.tunes = sorted([*self.tunes, *other.tunes], key=_rank)
        self.missing += other.missing
        self.stale += other.stale

    def command(self, stage: str, *options: str, of: Path | None = None) -> str:
        """The command that runs a stage in this run folder, with the options that made what is there.

        Args:
            of: the folder of a stage or fine-tune whose options it keeps; where none are known, those of another.
        """
        folders = [self.path / name for name in ("measure", "plan", "align")]
        tunes = sorted((self.path / "finetune").glob("*"))
        found = (left(folder) for folder in chain([] if of is None else [of], folders, tunes))
        given = next((words for words in found if words), None)
        ours = of is None or of.is_relative_to(self.path) or given is None
        return command(f"stage={stage} {self.made_by if ours else ''}", *options, of=given)


def read_run(path: Path, made_by: str) -> RunFolder:
    """Read a run folder.

    Args:
        path: of the folder. made_by: the arguments that choose it on the command line, for the commands that mend it.

    Raises:
        ValueError: if a file is damaged or lacks a part.
    """
    run = RunFolder(path, made_by)
    curve = _curve(run, "align/curve.csv", "align", ("epoch", "loss"))
    run.align = _read(
        run, "align/metrics.json", "align", "the alignment", lambda found: Alignment.from_dict(found, curve)
    )
    run.measured = _read(run, "measure/layers.json", "measure", "the gap of every layer", Measurement.from_dict)
    for file in sorted((path / "measure/compare").glob("*.json")):
        other = _read(run, f"measure/compare/{file.name}", "measure", file.stem, Measurement.from_dict)
        run.compare |= {file.stem: other} if other is not None else {}
    what = "the rank plan and the parameter counts"
    run.plan = _read(run, "plan/plan.json", "plan", what, Planned.from_dict)
    read_tunes(run)
    if run.has_evidence and not (run.align or run.measured or run.plan or run.tunes):
        run.missing = []
    elif not run.tunes:
        run.missing.append(("a finished fine-tune", run.command("finetune")))
    return run


def read_tunes(run: RunFolder) -> RunFolder:
    """Read finetune/*/ into `tunes`, what is unfinished into `missing`; errors as in `read_run`."""
    run.kept = Kept(run.path)
    for folder in sorted(path for path in (run.path / "finetune").glob("*") if path.is_dir()):
        name = f"finetune/{folder.name}"
        plan = None
        if (folder / "ranks.json").exists():
            plan = _read(run, f"{name}/ranks.json", "finetune", "its rank plan", RankPlan.from_dict)
        make = partial(
            Tune.from_dict, folder, plan=plan, curve=_curve(run, f"{name}/curve.csv", "finetune", ("epoch",))
        )
        what = f"the result of the fine-tune {folder.name}, started but not finished"
        if not left(folder):
            what += " (give the command the options it had)"
        tune = _read(run, f"{name}/metrics.json", "finetune", what, make)
        run.tunes += [tune] if tune is not None else []
    run.tunes.sort(key=_rank)
    if run.tunes:
        run.kept.save()
    run.kept = None
    return run


def _rank(tune: Tune) -> tuple[str, float]:
    return tune.metric, tune.val


def _read(run: RunFolder, name: str, stage: str, what: str, make: Callable[[Mapping[str, Any]], T]) -> T | None:
    path, made = run.path / name, f"stage={stage} {run.made_by}"
    if not path.exists():
        run.missing.append((what, run.command(stage, of=path.parent)))
        return None
    payload = read_json(path, made) if run.kept is None else run.kept.get(path, lambda: read_json(path, made))
    try:
        value = make({"config": {}, **payload})
    except KeyError as error:
        raise ValueError(
            f"{path} lacks {error.args[0]}: run `{run.command(stage, 'force=true', of=path.parent)}`"
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): run `{run.command(stage, 'force=true', of=path.parent)}`"
        ) from error
    try:
        check_inputs(path, {"inputs": payload.get("inputs", {})}, made)
    except (FileNotFoundError, ValueError) as error:
        run.stale.append(str(error))
    return value


def _curve(run: RunFolder, name: str, stage: str, columns: Sequence[str]) -> Rows:
    """Rows of a curve.csv as numbers, without empty cells; no rows where there is no file."""
    path = run.path / name
    if not path.exists():
        return []

    def read() -> Rows:
        with open(path, newline="") as stream:
            return [{column: float(cell) for column, cell in row.items() if cell} for row in csv.DictReader(stream)]

    try:
        rows: Rows = read() if run.kept is None else run.kept.get(path, read)
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(
            f"{path} is damaged ({error}): run `{run.command(stage, 'force=true', of=path.parent)}`"
        ) from error
    for row in rows:
        if lacking := [column for column in columns if column not in row]:
            raise ValueError(
                f"{path} lacks {', '.join(lacking)}: run `{run.command(stage, 'force=true', of=path.parent)}`"
            )
    return rows
