"""stage=report: everything in a run folder as one HTML file, its figures as SVG and CSV beside it, and tables."""

from __future__ import annotations

import contextlib
import glob
import importlib
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from orca_rank.artifacts.damaged import DamagedFile, reading
from orca_rank.artifacts.files import atomic, file_hash, read_record, write_json
from orca_rank.artifacts.lock import locked
from orca_rank.artifacts.provenance import key, plain
from orca_rank.build import targets
from orca_rank.report import sections
from orca_rank.report.answer import answer
from orca_rank.report.details import details
from orca_rank.report.draw import words
from orca_rank.report.page import Page, cell
from orca_rank.report.posterior import posteriors
from orca_rank.report.prediction_figures import Gallery
from orca_rank.report.rank_curve import nested_curves
from orca_rank.report.results import Tune
from orca_rank.report.run_folder import RunFolder, read_run, read_tunes
from orca_rank.report.tune_sections import finetunes, predictions
from orca_rank.stages.sweep import write_tables
from orca_rank.stages.tracking import show
from orca_rank.tracking.pages import report_page

console = Console(markup=False)
_PRINTED = 40  # fine-tunes printed; the files have all


def run(config: DictConfig) -> None:
    """Write runs/<run>/report.html, report/*.svg and *.csv, summary.csv and means.csv from what the other stages left.

    `report.runs` names further runs, whose fine-tunes stand in the same tables.

    Raises:
        FileNotFoundError: no stage has left anything. ValueError: a damaged or incomplete file; both name the command.
            ValueError: a name in report.runs that is no run with fine-tunes.
    """
    path = Path(config.paths.runs) / str(config.run)
    with locked(path / "report", wait=True):
        _report(config, path)


def check_options(config: DictConfig) -> None:
    """Raise a ValueError for a name in report.runs that is no run with fine-tunes."""
    runs = Path(config.paths.runs)
    other_runs(runs / str(config.run), runs, plain(config.report.runs))


def _report(config: DictConfig, path: Path) -> None:
    runs = Path(config.paths.runs)
    others = [RunFolder(other, _chosen(runs, other)) for other in other_runs(path, runs, plain(config.report.runs))]
    found = read_run(path, _chosen(runs, path))
    for other in others:
        found.add(read_tunes(other))
    if found.empty:
        raise FileNotFoundError(
            f"{path} has nothing to report: run `{found.command('all')}` for every stage, or one of them first, "
            f"such as `{found.command('measure')}`"
        )
    drawn = (tune for tune in found.tunes if tune.task.kind != "classification" and tune.folder.parent.parent == path)
    best = next(drawn, None)
    gallery, baselines = (None, {}) if best is None else _from_data(config, path, best)

    claims = _claims(found)
    page = Page(f"orca_rank: {config.run}", sections.lead(found))
    page.answer(*answer(found, baselines, claims.answers if claims else []))
    sections.notes(page, found)
    finetunes(page, found.tunes, baselines)
    sections.measurement(page, found)
    sections.alignment(page, found)
    if best is not None and gallery is not None:
        predictions(page, best, gallery)
    if claims:
        claims.section(page)
    nested_curves(page, found.tunes)
    posteriors(page, found.tunes)
    details(page, found)
    _write(page, path)
    write_tables(path, found.tunes)
    show(config, "report", path / "report", {}, lambda: report_page(path))
    _print(found.tunes, baselines)
    for what, command in found.missing:
        console.print(f"not there yet: {what}: `{command}`", soft_wrap=True)
    console.print(f"{page.figures} figures; open {path / 'report.html'}", soft_wrap=True)


def other_runs(own: Path, runs: Path, named: str | Sequence[str]) -> list[Path]:
    """The run folders that report.runs names, by name or pattern below paths.runs, without the run's own.

    Raises:
        ValueError: for a name or pattern without a fine-tune.
    """
    folders: dict[Path, None] = {}
    for pattern in [named] if isinstance(named, str) else named:
        fitting = sorted(Path(path) for path in glob.glob(str(runs / str(pattern))))
        fitting = [path for path in fitting if (path / "finetune").is_dir()]
        if not fitting:
            there = sorted(path.parent.name for path in runs.glob("*/finetune"))
            raise ValueError(
                f"report.runs={pattern}: no run with fine-tunes in {runs} has this name; there are "
                f"{', '.join(there) or 'none'}"
            )
        folders |= dict.fromkeys(fitting)
    return [path for path in folders if path != own]


def _chosen(runs: Path, path: Path) -> str:
    """The arguments that choose a run folder."""
    name = f"run={os.path.relpath(path, runs)}"
    return shlex.join([name] if str(runs) == "runs" else [name, f"paths.runs={runs}"])


def _from_data(config: DictConfig, path: Path, tune: Tune) -> tuple[Gallery | None, dict[str, float]]:
    """What needs the data that a fine-tune was trained on, with this run's folders: predictions on test samples, and
    classical solvers to compare with. Both are made once and kept; None or empty, and said so, where they cannot be."""
    node, now = dict(tune.config["data"]), plain(config.data)
    node |= {name: now[name] for name in ("root", "cache") if name in node and name in now}
    kept = path / "report" / "predictions.npz"
    state = file_hash(tune.folder / "metrics.json")
    sampled = {name: value for name, value in node.items() if name not in ("seed", "batch_size")}
    known = Path(config.paths.cache) / "baselines" / f"{key(sampled)}.json"
    gallery = None if config.force else _kept_gallery(kept, state)
    baselines = None
    if known.exists() and not config.force:
        baselines = read_record(known, "stage=report", lambda payload: dict(payload["relative_l2"]))
    if gallery is not None and baselines is not None:
        return gallery, baselines
    try:
        # Lightning and timm take seconds to import.
        heavy = importlib.import_module("orca_rank.stages.gallery")
        data = heavy.test_data(node, targets(config), str(tune.folder / "metrics.json"))
        if baselines is None:
            baselines = heavy.baselines(data)
            write_json(known, {"relative_l2": baselines}, config=node)
        if gallery is None:
            gallery = heavy.predictions(path, tune.tag, data, targets(config))
            with atomic(kept) as temporary, open(temporary, "wb") as stream:
                np.savez(stream, state=state, **gallery._asdict())
    except (ValueError, OSError, RuntimeError) as error:
        console.print(f"no gallery of predictions: {error}", soft_wrap=True)
    return gallery, baselines or {}


def _kept_gallery(path: Path, state: str) -> Gallery | None:
    """What an earlier report kept, if it is of the same fine-tune."""
    if not path.exists():
        return None
    with contextlib.suppress(DamagedFile), reading(path, "it is made again"), np.load(path) as kept:
        if str(kept["state"]) == state:
            fields = (kept["inputs"], kept["targets"], kept["predictions"])
            kind = str(kept["kind"]) if "kind" in kept.files else "dense"
            return Gallery(*fields, kept["metric"].tolist(), str(kept["input_label"]), kind)
    return None


def _claims(found: RunFolder) -> Any:
    """The verdicts of stage=evidence, where it has left any."""
    if not found.has_evidence:
        return None
    # Its statistics take a second to import.
    claims = importlib.import_module("orca_rank.report.claims")
    return claims.Evidence(*claims.read_evidence(found.path / "evidence", f"stage=evidence {found.made_by}"))


def _write(page: Page, path: Path) -> None:
    folder = path / "report"
    for name, text in page.files.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for old in (path for ending in ("svg", "csv", "png") for path in folder.glob(f"*.{ending}")):
        if old.name not in page.files:
            old.unlink()
    with atomic(path / "report.html") as temporary:
        temporary.write_text(page.html(), encoding="utf-8")


def _print(tunes: Sequence[Tune], baselines: Mapping[str, float]) -> None:
    if not tunes:
        return
    several = ["metric"] if len({tune.metric for tune in tunes}) > 1 else []
    table = Table(title="" if several else words(tunes[0].metric), title_justify="left")
    for name in ("fine-tune", "trained", *several, "val", "test", "seconds"):
        table.add_column(name, justify="left" if name in ("fine-tune", "metric") else "right", overflow="fold")
    for tune in tunes[:_PRINTED]:
        metric = [tune.metric] if several else []
        table.add_row(tune.tag, *map(cell, (tune.counts.trained, *metric, tune.val, tune.test, tune.seconds)))
    console.print(table)
    if len(tunes) > _PRINTED:
        console.print(f"the best {_PRINTED} of {len(tunes)}; all are in summary.csv")
    for name, value in baselines.items():
        console.print(f"for comparison, {name}: relative L2 {cell(value)}", soft_wrap=True)
