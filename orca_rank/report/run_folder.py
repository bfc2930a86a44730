"""Everything that the earlier stages left in a run folder, read once for the report."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from orca_rank.artifacts.command import command as same_command
from orca_rank.artifacts.files import read_json
from orca_rank.artifacts.provenance import check_inputs
from orca_rank.task import Task

Record = dict[str, Any]
Rows = list[dict[str, float]]
PARTS = ("adapter", "embedder", "predictor", "other")


@dataclass
class Tune:
    """One finished fine-tune: its metrics.json, the plan it used (None without adapters) and its curve."""

    tag: str
    metrics: Record
    plan: Record | None
    curve: Rows

    @property
    def task(self) -> Task:
        return Task.from_dict(self.metrics["task"])

    @property
    def metric(self) -> str:
        return self.metrics["metric"]

    @property
    def val(self) -> float:
        return float(self.metrics[f"val/{self.metric}"])

    @property
    def test(self) -> float:
        return float(self.metrics[f"test/{self.metric}"])


@dataclass
class RunFolder:
    """What a run folder holds; None or empty where a stage has not run.

    Attributes:
        align, layers, plan: the payloads of align/metrics.json, measure/layers.json and plan/plan.json.
        alignment: rows of align/curve.csv. compare: name -> measure/compare/<name>.json.
        tunes: the finished fine-tunes, best validation metric first within each metric.
        missing: (what is missing, the command that makes it). stale: one sentence per file whose inputs changed.
    """

    path: Path
    align: Record | None = None
    alignment: Rows = field(default_factory=list)
    layers: Record | None = None
    compare: dict[str, Record] = field(default_factory=dict)
    plan: Record | None = None
    tunes: list[Tune] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not (self.align or self.layers or self.plan or self.tunes)


def read_run(config: DictConfig) -> RunFolder:
    """Read runs/<run>/.

    Raises:
        FileNotFoundError: if no stage has left anything there. ValueError: if a file is damaged or lacks a part.
    """
    run = RunFolder(Path(config.paths.runs) / str(config.run))
    run.align = _read(run, config, "align/metrics.json", "align", "the alignment", ("distances", "objective"))
    run.alignment = _curve(run.path / "align/curve.csv", made_by(config, "align"), ("epoch", "loss"))
    run.layers = _read(run, config, "measure/layers.json", "measure", "the gap of every layer", ("layers",))
    for path in sorted((run.path / "measure/compare").glob("*.json")):
        name = f"measure/compare/{path.name}"
        run.compare[path.stem] = _read(run, config, name, "measure", path.stem, ("layers",)) or {}
    parts = ("trainable_parameters", "total_parameters", "layers")
    run.plan = _read(run, config, "plan/plan.json", "plan", "the rank plan and the parameter counts", parts)
    for folder in sorted(path for path in (run.path / "finetune").glob("*") if path.is_dir()):
        run.tunes += _tune(run, config, folder)
    run.tunes.sort(key=lambda tune: (tune.metric, tune.val))
    if not run.tunes:
        run.missing.append(("a finished fine-tune", command(config, "finetune")))
    if run.empty:
        raise FileNotFoundError(
            f"{run.path} has nothing to report: run `{command(config, 'all')}` for every stage, or one of them first, "
            f"such as `{command(config, 'measure')}`"
        )
    return run


def made_by(config: DictConfig, stage: str) -> str:
    """The arguments of the command that runs a stage in this run folder."""
    runs = f" {shlex.quote(f'paths.runs={config.paths.runs}')}" if str(config.paths.runs) != "runs" else ""
    return f"stage={stage} {shlex.quote(f'run={config.run}')}{runs}"


def command(config: DictConfig, stage: str) -> str:
    """The command that runs a stage in this run folder."""
    return same_command(made_by(config, stage))


def summary(tunes: Sequence[Tune]) -> list[Record]:
    """The rows of summary.csv, one a fine-tune."""
    rows = []
    for tune in tunes:
        config, plan, counts = tune.metrics["config"], tune.plan or {}, tune.metrics["trainable_parameters"]
        ranks = list(plan.get("ranks", {}).values())
        rows.append(
            {
                "tag": tune.tag,
                "adapter": config.get("adapter", {}).get("name", ""),
                "rule": plan.get("rule", ""),
                "budget": budget_text(plan),
                "mean_rank": round(sum(ranks) / len(ranks), 4) if ranks else "",
                "seed": config.get("seed", ""),
                "trainable_total": counts["total"],
                **{f"trainable_{part}": counts.get(part, 0) for part in PARTS},
                "total_parameters": tune.metrics["total_parameters"],
                "metric": tune.metric,
                "val": tune.val,
                "test": tune.test,
                "seconds": tune.metrics["seconds"],
                "epochs": tune.metrics["epochs"],
                "data": config.get("data", {}).get("_target_", ""),
                "backbone": config.get("backbone", {}).get("name", ""),
            }
        )
    return rows


def budget_text(plan: Mapping[str, Any]) -> str:
    """What the rule could spend, as the option that said so; a uniform rank says itself."""
    budget, options = plan.get("budget") or {}, plan.get("options") or {}
    if options.get("r") is not None:
        return f"r={options['r']}"
    return " ".join(
        f"{name}={budget[name]}" for name in ("mean_rank", "total_rank", "parameters") if budget.get(name) is not None
    )


def _tune(run: RunFolder, config: DictConfig, folder: Path) -> list[Tune]:
    tag, name = folder.name, f"finetune/{folder.name}"
    what = f"the result of the fine-tune {tag}, started but not finished (give the command the options it had)"
    keys = ("metric", "task", "trainable_parameters", "total_parameters", "seconds", "epochs")
    metrics = _read(run, config, f"{name}/metrics.json", "finetune", what, keys)
    if metrics is None:
        return []
    for split in ("val", "test"):
        _require(folder / "metrics.json", metrics, (f"{split}/{metrics['metric']}",), made_by(config, "finetune"))
    plan = None
    if (folder / "ranks.json").exists():
        plan = _read(run, config, f"{name}/ranks.json", "finetune", "its rank plan", ("rule", "ranks"))
    return [Tune(tag, metrics, plan, _curve(folder / "curve.csv", made_by(config, "finetune"), ("epoch",)))]


def _read(run: RunFolder, config: DictConfig, name: str, stage: str, what: str, keys: Sequence[str]) -> Record | None:
    path = run.path / name
    if not path.exists():
        run.missing.append((what, command(config, stage)))
        return None
    payload = read_json(path, made_by(config, stage))
    _require(path, payload, keys, made_by(config, stage))
    try:
        check_inputs(path, {"inputs": payload.get("inputs", {})}, made_by(config, stage))
    except (FileNotFoundError, ValueError) as error:
        run.stale.append(str(error))
    return payload


def _require(path: Path, payload: Mapping[str, Any], keys: Sequence[str], made: str) -> None:
    if lacking := [key for key in keys if key not in payload]:
        raise ValueError(f"{path} lacks {', '.join(lacking)}: run `{same_command(made, 'force=true')}`")


def _curve(path: Path, made: str, columns: Sequence[str]) -> Rows:
    """Rows of a curve.csv as numbers, without empty cells; no rows where there is no file."""
    if not path.exists():
        return []
    try:
        with open(path, newline="") as stream:
            rows = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(stream)]
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error}): run `{same_command(made, 'force=true')}`") from error
    for row in rows:
        _require(path, row, columns, made)
    return rows
