"""stage=report: everything in a run folder as one HTML file, PNGs and a CSV."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from orca_rank.artifacts.files import atomic, read_json, write_csv, write_json
from orca_rank.artifacts.provenance import differences, plain
from orca_rank.data.darcy import Darcy, classical_baseline
from orca_rank.data.module import InMemory
from orca_rank.fitted import load
from orca_rank.report import sections
from orca_rank.report.figures import gallery_figure, words
from orca_rank.report.page import Page, cell
from orca_rank.report.run_folder import RunFolder, Tune, made_by, read_run, summary
from orca_rank.stages.setup import ready, stage_folder

console = Console()
_SAMPLES = 4


class Gallery(NamedTuple):
    """Test samples of a dense task: inputs (n, h, w), targets and predictions (n, h', w'), metric (n,), a title."""

    inputs: np.ndarray
    targets: np.ndarray
    predictions: np.ndarray
    metric: list[float]
    input_label: str


def run(config: DictConfig) -> None:
    """Write runs/<run>/report.html, report/*.png and summary.csv from what the other stages left there.

    Raises:
        FileNotFoundError: no stage has left anything. ValueError: a damaged or incomplete file; both name the command.
    """
    found = read_run(config)
    folder = stage_folder(config, "report")
    best = next((tune for tune in found.tunes if tune.task.kind == "dense"), None)
    data = _test_data(config, best) if best is not None else None
    baselines = _baselines(config, folder / "baseline.json", data) if isinstance(data, Darcy) else {}

    page = Page(f"orca_rank: {config.run}", _lead(found))
    sections.overview(page, found)
    sections.alignment(page, found)
    sections.gaps(page, found)
    sections.spectra(page, found)
    sections.ranks(page, found)
    sections.parameters(page, found)
    sections.finetunes(page, found, baselines)
    if best is not None and data is not None:
        _predictions(page, found, best, data)
    _options(page, found)
    _write(page, found.path, folder)
    rows = summary(found.tunes)
    if rows:
        write_csv(found.path / "summary.csv", rows)
        _print(rows, baselines)
    for what, command in found.missing:
        console.print(f"not there yet: {what}: `{command}`", soft_wrap=True)
    console.print(f"{len(page.images)} figures; open {found.path / 'report.html'}", soft_wrap=True)


def _lead(found: RunFolder) -> str:
    config = next((x["config"] for x in (found.layers, found.align, *(t.metrics for t in found.tunes)) if x), {})
    names = {part: config.get(part) or {} for part in ("data", "source", "backbone")}
    words = [str(names["backbone"].get("name", ""))]
    words += [f"{part} {str(names[part].get('_target_', '')).rpartition('.')[2]}" for part in ("source", "data")]
    words[1] += f" {names['source']['file']}" if "file" in names["source"] else ""
    return ", ".join(word for word in words if word.strip() and not word.endswith(" ")).replace("data ", "target ")


def _test_data(config: DictConfig, tune: Tune) -> L.LightningDataModule | None:
    """The data that the fine-tune was trained on, with this run's folders; None, and said so, if it cannot be had."""
    node = dict(tune.metrics["config"]["data"])
    now = plain(config.data)
    node |= {name: now[name] for name in ("root", "cache") if name in node and name in now}
    try:
        return ready(node, "test")
    except (ValueError, OSError) as error:
        console.print(f"no gallery of predictions: {error}", soft_wrap=True)
        return None


def _baselines(config: DictConfig, path: Path, data: Darcy) -> dict[str, float]:
    """Relative L2 of a classical solver that sees what the network sees; computed once."""
    made_from = {name: getattr(data, name) for name in ("source", "mode", "grid", "stride", "test", "test_limit")}
    made_from |= {"data_seed": data.data_seed, "files": list(data.files)}
    if path.exists() and not config.force:
        stored = read_json(path, made_by(config, "report"))
        if not differences(stored["config"], made_from):
            return stored["relative_l2"]
    values = {"solver on the coarse grid": classical_baseline(data)}
    if data.stride > 1 and data.mode == "fno":
        values["solver on the input repeated to the fine grid"] = classical_baseline(data, True)
    write_json(path, {"relative_l2": values}, config=made_from)
    return values


def _predictions(page: Page, found: RunFolder, best: Tune, data: L.LightningDataModule) -> None:
    try:
        gallery = _gallery(found.path, best, data)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        console.print(f"no gallery of predictions: {error}", soft_wrap=True)
        return
    page.section("predictions", "Predictions")
    page.figure(
        "predictions",
        gallery_figure(*gallery),
        f"The first {len(gallery.metric)} test samples, predicted by {best.tag} (the best on validation). Target and "
        f"prediction share a colour scale in each row; relative L2 errors: {', '.join(map(cell, gallery.metric))}.",
    )


@torch.inference_mode()
def _gallery(run_folder: Path, tune: Tune, data: L.LightningDataModule) -> Gallery:
    fitted = load(run_folder, tune.tag)
    x, y = next(iter(data.test_dataloader()))
    x, y = x[:_SAMPLES], y[:_SAMPLES]
    raw = fitted.model(x)
    shown, label = x, "input, channel 1 (normalised)"
    if isinstance(data, InMemory):
        shown, label = data.parts.test[0][: len(x)], "input, channel 1" if x.shape[1] > 1 else "input"
    if isinstance(data, Darcy):
        label = "coefficient a"
    metric = fitted.task.metric(raw, y).tolist()
    fields = (shown, y, fitted.task.decode(raw))
    return Gallery(*(field[:, 0].float().numpy() for field in fields), metric, label)


def _options(page: Page, found: RunFolder) -> None:
    page.section("options", "Options")
    if found.tunes:
        text = json.dumps(found.tunes[0].metrics["config"], indent=1)
        page.folded(f"Every option of {found.tunes[0].tag}", text)
    elif config := (found.layers or found.align or found.plan or {}).get("config"):
        page.folded("Every option", json.dumps(config, indent=1))


def _write(page: Page, run_folder: Path, folder: Path) -> None:
    for name, data in page.images.items():
        with atomic(folder / f"{name}.png") as temporary:
            temporary.write_bytes(data)
    for old in folder.glob("*.png"):
        if old.stem not in page.images:
            old.unlink()
    with atomic(run_folder / "report.html") as temporary:
        temporary.write_text(page.html(), encoding="utf-8")


def _print(rows: Sequence[dict[str, Any]], baselines: dict[str, float]) -> None:
    metrics = {row["metric"] for row in rows}
    several = ["metric"] if len(metrics) > 1 else []
    table = Table(title="" if several else words(next(iter(metrics))), title_justify="left")
    for name in ("fine-tune", "trained", *several, "val", "test", "seconds"):
        table.add_column(name, justify="left" if name in ("fine-tune", "metric") else "right", overflow="fold")
    for row in rows:
        table.add_row(
            row["tag"], *(cell(row[name]) for name in ("trainable_total", *several, "val", "test", "seconds"))
        )
    console.print(table)
    for name, value in baselines.items():
        console.print(f"for comparison, {name}: relative L2 {cell(value)}", soft_wrap=True)
