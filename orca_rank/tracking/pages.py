"""The page of every stage, read from the files that it has written: files are the interface here too."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orca_rank.artifacts.files import read_json, read_record
from orca_rank.measuring.records import Layer
from orca_rank.ranks import RankPlan
from orca_rank.report.results import PARTS, Alignment, Counts, Interval, budget_text, flat
from orca_rank.tracking.page import Chart, Files, Page, Row


def align_page(run: Path) -> Page:
    """Distances on held-out data before and after, and the embedder."""
    found = read_record(run / "align/metrics.json", "stage=align", lambda payload: Alignment.from_dict(payload, []))
    rows: list[Row] = []
    for name, (before, after) in found.distances.items():
        rows.append({"distance": name, **_interval("before", before), **_interval("after", after)})
    return Page(
        config={"objective": found.objective},
        summary={
            "epochs": found.epochs,
            **{f"distance/{name}": pair[1].value for name, pair in found.distances.items()},
            **{f"distance_before/{name}": pair[0].value for name, pair in found.distances.items()},
        },
        tables={"distances": rows},
        charts={"after": Chart("bar", "distances", "distance", "after", "distance to the source after alignment")},
        made=_embedder(run),
    )


def measure_page(run: Path, used: Sequence[str]) -> Page:
    """Gap, interval and p-value of every layer.

    Args:
        used: the inputs that layers.json was made from, as it names them.
    """
    layers = _layers(run)
    tables = {"layers": layer_rows(layers, None)}
    for path in sorted((run / "measure/compare").glob("*.json")):
        other = read_record(path, "stage=measure", lambda payload: [Layer.from_dict(one) for one in payload["layers"]])
        tables[f"compare/{path.stem}"] = layer_rows(other, None)
    metrics = list(layers[0].gap)
    means = {f"gap/{metric}": sum(layer.gap[metric].value for layer in layers) / len(layers) for metric in metrics}
    return Page(
        config={"layers": len(layers)},
        summary=means,
        tables=tables,
        charts={
            f"gap_{metric}": Chart("bar", "layers", "layer", f"{metric}_gap", f"{metric} gap of every layer")
            for metric in metrics
        },
        used=_embedder(run) if any("align/" in name for name in used) else (),
        made=_measurement(run),
    )


def plan_page(run: Path) -> Page:
    """Rank and parameters of every layer."""
    payload = read_json(run / "plan/plan.json", "stage=plan")
    ranks = {layer["name"]: int(layer["rank"]) for layer in payload["layers"]}
    counts = Counts.from_dict(payload)
    plan = RankPlan.from_dict({**payload, "ranks": ranks}) if payload.get("rule") else None
    layers = [Layer(layer["name"], int(layer["d_in"]), int(layer["d_out"])) for layer in payload["layers"]]
    measured = {layer.name: layer for layer in _layers(run)} if payload.get("measurement") else {}
    return Page(
        config=_plan_words(plan),
        summary=_count_words(counts),
        tables={"layers": layer_rows([measured.get(layer.name, layer) for layer in layers], ranks)},
        charts={"ranks": Chart("bar", "layers", "layer", "rank", "rank of every layer")},
        used=_measurement(run) if measured else (),
        made=[] if plan is None else [_plan_files(run, plan)],
    )


def finetune_page(folder: Path, layers: Sequence[Layer], pictures: Mapping[str, bytes]) -> Page:
    """Results, the layers with gap and rank, predictions, and what was trained.

    Args:
        folder: <run>/finetune/<tag>. layers: those that adapters may be in, with what was measured there.
    """
    run, tag = folder.parent.parent, folder.name
    payload = read_json(folder / "metrics.json", "stage=finetune")
    counts, metric = Counts.from_dict(payload), str(payload["metric"])
    plan = None
    if (folder / "ranks.json").exists():
        plan = read_record(folder / "ranks.json", "stage=finetune", RankPlan.from_dict)
    options = flat(payload["config"])
    charts = {}
    if plan is not None:
        charts["ranks"] = Chart("bar", "layers", "layer", "rank", "rank of every layer")
        for gap in layers[0].gap if layers else ():
            charts[f"rank_against_{gap}"] = Chart("scatter", "layers", f"{gap}_gap", "rank", f"rank against {gap} gap")
    used = []
    if any("align/" in name for name in payload["inputs"]):
        used += _embedder(run)
    if plan is not None:
        used += _measurement(run) if plan.measurement else []
        used.append(_plan_files(run, plan))
    files = {path.relative_to(folder).as_posix(): path for path in _trained(folder)}
    return Page(
        config={
            "adapter": options.get("adapter.name"),
            "lr": options.get("finetune.optimizer.lr"),
            "metric": metric,
            **_plan_words(plan),
        },
        summary={
            "val": payload[f"val/{metric}"],
            "test": payload[f"test/{metric}"],
            "seconds": payload["seconds"],
            "epochs": payload["epochs"],
            **_count_words(counts),
        },
        tables={"layers": layer_rows(layers, plan.ranks)} if plan is not None else {},
        charts=charts,
        pictures=pictures,
        used=used,
        made=[Files(f"{run.name}-{tag}", "adapter", files)],
    )


def rank_curve_page(folder: Path) -> Page:
    """The metric of one nested fine-tune, <run>/finetune/<tag>, at every rank."""
    run, tag = folder.parent.parent, folder.name
    rows = _numbers(folder / "rank_curve.csv")
    best = min(rows, key=lambda row: row["val"])
    files = {path.relative_to(folder).as_posix(): path for path in _trained(folder)}
    return Page(
        config={"tag": tag},
        summary={"best_rank": best["rank"], "val": best["val"], "test": best["test"]},
        tables={"rank_curve": rows},
        charts={"curve": Chart("line", "rank_curve", "rank", "test", "test error against rank")},
        pictures={"rank_curve": (folder / "rank_curve.png").read_bytes()},
        used=[Files(f"{run.name}-{tag}", "adapter", files)],
    )


def evidence_page(run: Path) -> Page:
    """Every fine-tune of the evidence, the verdicts, and the error against the rank."""
    folder = run / "evidence"
    payload = read_json(folder / "claims.json", "stage=evidence")
    rows = _numbers(folder / "evidence.csv")
    curve = [row for row in rows if row["part"] == "gate"]
    verdicts: dict[str, int] = {}
    for claim in payload["claims"]:
        verdicts[f"claims/{claim['verdict']}"] = verdicts.get(f"claims/{claim['verdict']}", 0) + 1
    picture = folder / "rank_curve.png"
    return Page(
        summary={"runs": payload["runs"], "seconds": payload["seconds"], **verdicts},
        tables={"evidence": rows, "claims": payload["claims"], "rank_curve": curve},
        charts={"curve": Chart("scatter", "rank_curve", "rank", "test", "test error against rank")},
        pictures={"rank_curve": picture.read_bytes()} if picture.exists() else {},
        made=[Files(f"{run.name}-evidence", "evidence", {name: folder / name for name in _EVIDENCE})],
    )


_EVIDENCE = ("evidence.csv", "claims.json", "README.md")


def report_page(run: Path) -> Page:
    """The tables of report.html, and the page itself as a file."""
    tables = {name: _numbers(run / f"{name}.csv") for name in ("summary", "means") if (run / f"{name}.csv").exists()}
    charts = {}
    if "summary" in tables:
        charts["test_against_parameters"] = Chart(
            "scatter", "summary", "trainable_total", "test", "test error against parameters"
        )
    return Page(
        tables=tables,
        charts=charts,
        made=[Files(f"{run.name}-report", "report", {"report.html": run / "report.html"})],
    )


# Column -> part of a gap; p as it counts for all layers together is p_family.
_GAP = {"gap": "value", "low": "low", "high": "high", "p": "p", "p_family": "p_family"}


def layer_rows(layers: Sequence[Layer], ranks: Mapping[str, int] | None) -> list[Row]:
    """One row a layer: its place and shape, gap, interval and p-value of every metric, rank and parameters."""
    metrics = list(dict.fromkeys(metric for layer in layers for metric in layer.gap))
    rows: list[Row] = []
    for place, layer in enumerate(layers):
        row: dict[str, Any] = {"layer": layer.name, "depth": place, "d_in": layer.d_in, "d_out": layer.d_out}
        for metric in metrics:
            gap = layer.gap.get(metric)
            for column, part in _GAP.items():
                row[f"{metric}_{column}"] = None if gap is None else getattr(gap, part)
        if ranks is not None:
            row |= {"rank": ranks[layer.name], "parameters": ranks[layer.name] * layer.cost}
        rows.append(row)
    return rows


def _layers(run: Path) -> list[Layer]:
    return read_record(
        run / "measure/layers.json",
        "stage=measure",
        lambda payload: [Layer.from_dict(one) for one in payload["layers"]],
    )


def _plan_words(plan: RankPlan | None) -> Row:
    if plan is None:
        return {}
    ranks = list(plan.ranks.values())
    return {"rule": plan.rule, "budget": budget_text(plan), "mean_rank": round(sum(ranks) / len(ranks), 4)}


def _count_words(counts: Counts) -> Row:
    parts = {f"trainable/{part}": counts.parts[part] for part in PARTS}
    return {"trainable/total": counts.trained, **parts, "total_parameters": counts.model}


def _interval(name: str, found: Interval) -> Row:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _embedder(run: Path) -> list[Files]:
    return [Files(f"{run.name}-embedder", "embedder", {"embedder.safetensors": run / "align/embedder.safetensors"})]


def _measurement(run: Path) -> list[Files]:
    return [Files(f"{run.name}-measurement", "measurement", {"layers.json": run / "measure/layers.json"})]


def _plan_files(run: Path, plan: RankPlan) -> Files:
    """A plan by its contents alone, so that a fine-tune names the very plan that stage=plan left, if it used that."""
    return Files(f"{run.name}-plan", "plan", {"ranks.json": json.dumps(plan.to_dict(), indent=1, sort_keys=True)})


def _trained(folder: Path) -> list[Path]:
    """What a fine-tune leaves to be used: its model, plan and adapter."""
    files = [folder / name for name in ("metrics.json", "ranks.json", "model.safetensors")]
    return [path for path in (*files, *sorted((folder / "adapter").glob("*"))) if path.is_file()]


def _numbers(path: Path) -> list[Row]:
    """The rows of a CSV, numbers as such and empty cells as None."""

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text or None

    with open(path, newline="") as stream:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(stream)]
