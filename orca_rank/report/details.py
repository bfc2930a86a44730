"""The report's details, behind titles to click on: other metrics, spectra, agreement, parameters, layers, options."""

from __future__ import annotations

import json
from collections.abc import Mapping

from orca_rank.report.draw import words
from orca_rank.report.figures import parts_figure
from orca_rank.report.layer_figures import agreement_figure, gap_figure, spectra_figure
from orca_rank.report.page import Page
from orca_rank.report.results import PARTS
from orca_rank.report.run_folder import RunFolder
from orca_rank.report.sections import Record, like_main, main_metric
from orca_rank.report.values import estimate_text

_COUNTS = 20  # fine-tunes whose parameters are drawn
_SPECTRA = {
    "ot_map": "What the optimal-transport map asks of the weight: singular values of W(T − I)Σ^½",
    "gradient": "The target loss's gradient at the start: singular values",
    "whitened_gradient": "The same gradient in whitened coordinates, Σ_δ^-½ G Σ_x^-½: singular values",
    "activation": "The target's inputs: singular values",
}


def details(page: Page, run: RunFolder) -> None:
    """The last section, everything in it folded."""
    if not (run.tunes or run.measured or run.align or run.plan):
        return
    page.section("details", "Details")
    with page.fold("Trainable parameters by part"):
        _parameters(page, run)
    with page.fold("Gaps in other metrics"):
        _other_metrics(page, run)
    with page.fold("Spectra of every layer"):
        _spectra(page, run)
    with page.fold("Which measurements agree"):
        _agreement(page, run)
    if rows := _layer_rows(run):
        page.table(rows, folded="All layers as a table")
    _options(page, run)


def _other_metrics(page: Page, run: RunFolder) -> None:
    for metric, rho in like_main(run, main := main_metric(run)).items():
        assert run.measured is not None
        rows = [
            {"layer": layer.name, **layer.gap[metric].to_dict()} for layer in run.measured.layers if metric in layer.gap
        ]
        page.figure(
            f"gaps_{metric}",
            gap_figure({words(metric): run.measured.layers}, metric, {}, None),
            f"Calibrated {words(metric)} distance of the run's own target. Spearman's rank correlation with the "
            f"{words(main)} gap over layers: ρ = {rho:.2f}.",
            rows,
        )


def _spectra(page: Page, run: RunFolder) -> None:
    layers = run.measured.layers if run.measured else []
    for kind, title in _SPECTRA.items():
        found = {layer.name: layer.spectra[kind] for layer in layers if kind in layer.spectra}
        if not found:
            continue
        counts = [one.rank for one in found.values() if one.rank is not None]
        line = (
            f" Dashed: what noise alone reaches. Between {min(counts)} and {max(counts)} values a layer lie above it."
            if counts
            else ""
        )
        rows = [
            {"layer": name, "null": one.null, "place": place, "value": f"{value:.5g}"}
            for name, one in found.items()
            for place, value in enumerate(one.singular_values, 1)
        ]
        page.figure(
            f"spectra_{kind}",
            spectra_figure(found),
            f"{title}, per layer; each panel from 0 to its largest value (upper right).{line}",
            rows,
        )


def _agreement(page: Page, run: RunFolder) -> None:
    if run.measured is None or len(run.measured.agreement) <= 2:
        return
    page.figure(
        "agreement",
        agreement_figure(run.measured.agreement),
        f"Rank correlation between depth and the measurements, over {len(run.measured.layers)} layers of the "
        f"run's own target. Neighbouring layers resemble each other, so these are descriptions, not tests.",
        [{"": name, **row} for name, row in run.measured.agreement.items()],
    )


def _parameters(page: Page, run: RunFolder) -> None:
    counts = {tune.tag: tune.counts for tune in run.tunes[:_COUNTS]}
    if run.plan:
        counts = {"plan.json": run.plan.counts, **counts}
    if not counts:
        return
    more = len(run.tunes) - _COUNTS
    rows = [
        {"": name, **{part: count.parts[part] for part in PARTS}, "total": count.trained}
        for name, count in counts.items()
    ]
    page.figure(
        "parameters",
        parts_figure({name: count.parts for name, count in counts.items()}),
        f"Parameters that are trained, by part, those of the adapter on an axis of their own; the whole model has "
        f"{list(counts.values())[-1].model:,}."
        + (f" {more} more {'fine-tune is' if more == 1 else 'fine-tunes are'} in summary.csv." if more > 0 else ""),
        rows,
    )
    page.table(rows)


def _layer_rows(run: RunFolder) -> list[Record]:
    chosen: Mapping[str, int] = run.plan.plan.ranks if run.plan and run.plan.plan else {}
    rows = []
    for layer in run.measured.layers if run.measured else []:
        row: Record = {"layer": layer.name, "d_in × d_out": f"{layer.d_in} × {layer.d_out}"}
        for metric, gap in layer.gap.items():
            p = gap.p if gap.p_family is None else gap.p_family
            row |= {f"{words(metric)} gap": estimate_text(gap), f"p ({words(metric)})": p}
        rows.append(row | ({"rank": chosen[layer.name]} if layer.name in chosen else {}))
    return rows


def _options(page: Page, run: RunFolder) -> None:
    if run.tunes:
        page.folded(f"Every option of {run.tunes[0].tag}", json.dumps(run.tunes[0].config, indent=1))
    elif one := next((one for one in (run.measured, run.align, run.plan) if one is not None), None):
        page.folded("Every option", json.dumps(one.config, indent=1))
