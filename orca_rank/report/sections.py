"""The report's sections: each draws what the run folder holds and says in words what the numbers say, no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from orca_rank.measuring.records import Gap
from orca_rank.ranks import RankPlan
from orca_rank.report.canvas import Number, words
from orca_rank.report.figures import alignment_figure, parts_figure
from orca_rank.report.layer_figures import agreement_figure, gap_figure, rank_figure, significant, spectra_figure
from orca_rank.report.page import Page, cell
from orca_rank.report.results import PARTS, Counts, Interval, Measurement, Options, budget_text, flat
from orca_rank.report.run_folder import RunFolder

Record = dict[str, Any]
_PLANS = 6  # rank plans drawn; the table has all
_COUNTS = 20  # fine-tunes whose parameters are drawn
_NOTES = 5  # sentences of one kind at the top
_DISTANCES = {"otdd": "OTDD, full squared cost", "mmd": "MMD², unbiased", "sliced": "d · sliced W₂²"}
_SPECTRA = {
    "ot_map": "What the optimal-transport map asks of the weight: singular values of W(T − I)Σ^½",
    "gradient": "The target loss's gradient at the start: singular values",
    "whitened_gradient": "The same gradient in whitened coordinates, Σ_δ^-½ G Σ_x^-½: singular values",
    "activation": "The target's inputs: singular values",
}


def lead(run: RunFolder) -> str:
    """Backbone, source and target of the run in one line."""
    found = (run.measured, run.align, *run.tunes)
    options = flat(next((one.config for one in found if one is not None and one.config), {}))
    source = " ".join(part for part in (class_name(options, "source"), str(options.get("source.file") or "")) if part)
    target = class_name(options, "data")
    parts = [str(options.get("backbone.name") or "")]
    parts += [f"source {source}"] if source else []
    parts += [f"target {target}"] if target else []
    return ", ".join(part for part in parts if part)


def class_name(options: Options, section: str) -> str:
    """The class that a section of the options names, without its module; "" where it names none."""
    return str(options.get(f"{section}._target_") or "").rpartition(".")[2]


def overview(page: Page, run: RunFolder) -> None:
    """A few numbers, what is missing, and files made from others that changed since."""
    cards = []
    if run.tunes:
        best = run.tunes[0]
        cards.append((f"test {words(best.metric)}, fine-tune of the best validation", cell(best.test), best.tag))
        cards.append(("parameters trained by it", cell(best.counts.trained), f"of {best.counts.model:,}"))
    if run.align:
        for name, (before, after) in list(run.align.distances.items())[:1]:
            change = f"{cell(before.value)} → {cell(after.value)}"
            cards.append((f"{words(name)} to the source, held-out data", change, "before and after alignment"))
    if run.measured and run.measured.metrics:
        metric = run.measured.metrics[0]
        gaps = _gaps(run.measured, metric)
        found = sum(significant(gap) for gap in gaps.values())
        cards.append((f"layers whose {words(metric)} gap has p < 0.05", f"{found} of {len(gaps)}", _p_note(gaps)))
    page.cards(cards)
    if run.missing:
        page.missing(run.missing[:_NOTES], len(run.missing[_NOTES:]))
    for sentence in run.stale[:_NOTES]:
        page.note(sentence)
    if more := len(run.stale[_NOTES:]):
        page.note(f"{more} more files were made from others that changed since.")


def alignment(page: Page, run: RunFolder) -> None:
    """The objective in training, and distances on held-out data."""
    if run.align is None:
        return
    page.section("alignment", "Alignment of the embedder")
    labels = {_DISTANCES.get(name, name): pair for name, pair in run.align.distances.items()}
    changes = [
        f"{words(name)} {_estimate(before)} before, {_estimate(after)} after"
        for name, (before, after) in run.align.distances.items()
    ]
    objective = words(run.align.objective)
    page.figure(
        "alignment",
        alignment_figure(run.align.curve, labels, f"{objective} (training)"),
        f"Objective {objective}, {run.align.epochs} epochs. Distance between source features and features of held-out "
        f"target images (in brackets: 90 % interval from half-samples): {'; '.join(changes)}. The panels have "
        f"different scales.",
    )


def gaps(page: Page, run: RunFolder) -> None:
    """The gap of every layer, of the run's target and of others beside it."""
    if run.measured is None or not run.measured.metrics:
        return
    page.section("gaps", "Gap of every layer")
    name = class_name(flat(run.measured.config), "data")
    targets = {f"target ({name})" if name else "target": run.measured, **run.compare}
    page.figure(
        "gaps",
        gap_figure({name: found.layers for name, found in targets.items()}),
        f"Calibrated distance between what the source and a target send into every layer; 0 is what two halves of the "
        f"same data would give. Bars are 95 % bootstrap intervals; filled marks have p < 0.05 "
        f"({_p_note(_gaps(run.measured, run.measured.metrics[0]))}). Layers that read the same input share a mark.",
    )
    rows: list[Record] = []
    for name, found in targets.items():
        for metric in found.metrics:
            gap = _gaps(found, metric)
            values = [one.value for one in gap.values()]
            rows.append(
                {
                    "target": name,
                    "metric": words(metric),
                    "layers": len(gap),
                    "p < 0.05": sum(significant(one) for one in gap.values()),
                    "median gap": float(median(values)),
                    "largest gap": max(values),
                    "in layer": max(gap, key=lambda layer: gap[layer].value),
                    "ρ with depth": spearman(range(len(values)), values),
                }
            )
    page.table(rows, "ρ: Spearman's rank correlation of the gap with the layer's place in the network")
    if run.compare and flat(run.measured.config).get("embedder.aligned"):
        page.text(
            f"The run's own target passes through the aligned embedder; {', '.join(run.compare)} through an embedder "
            f"as it was initialised, without alignment. Their gaps differ for that reason too."
        )
    if len(run.measured.agreement) > 2:
        page.figure(
            "agreement",
            agreement_figure(run.measured.agreement),
            f"Rank correlation between depth and the measurements, over {len(run.measured.layers)} layers of the "
            f"run's own target. Neighbouring layers resemble each other, so these are descriptions, not tests.",
        )
    page.table(_layer_rows(run), folded="All layers as a table")


def ranks(page: Page, run: RunFolder) -> None:
    """Every rank plan that was made or used, equal ones together."""
    planned = [("plan.json", run.plan.plan, run.plan.counts)] if run.plan and run.plan.plan else []
    used = [(tune.tag, tune.plan, tune.counts) for tune in run.tunes if tune.plan]
    if not planned and not used:
        return
    page.section("ranks", "Rank of every layer")
    groups: dict[tuple[Any, ...], list[str]] = {}
    first: dict[tuple[Any, ...], tuple[RankPlan, Counts]] = {}
    for title, plan, counts in (*planned, *used):
        key = (plan.rule, budget_text(plan), counts.parts["adapter"], *plan.ranks.items())
        groups.setdefault(key, []).append(title)
        first.setdefault(key, (plan, counts))
    metric = next((str(plan.options["metric"]) for plan, _ in first.values() if "metric" in plan.options), "")
    if run.measured and metric not in run.measured.metrics:
        metric = next(iter(run.measured.metrics), "")
    known = {name: gap.value for name, gap in _gaps(run.measured, metric).items()} if run.measured else {}
    rows: list[Record] = []
    for key, titles in groups.items():
        plan, counts = first[key]
        chosen = plan.ranks
        row = {
            "plan": _titles(titles),
            "rule": plan.rule or "given",
            "budget": budget_text(plan),
            "mean rank": plan.total_rank / len(chosen),
            "least": min(chosen.values()),
            "most": max(chosen.values()),
            "layers with rank 0": sum(rank == 0 for rank in chosen.values()),
            "adapter parameters": counts.parts["adapter"],
        }
        if known:
            both = [name for name in chosen if name in known]
            row["ρ with the gap"] = spearman([chosen[name] for name in both], [known[name] for name in both])
        rows.append(row)
    shown = {_plan_title(titles, first[key][0]): first[key][0].ranks for key, titles in list(groups.items())[:_PLANS]}
    over = f" The line is the calibrated {words(metric)} gap." if known else ""
    left = len(groups) - _PLANS
    more = f" {left} more {'plan is' if left == 1 else 'plans are'} in the table only." if left > 0 else ""
    page.figure("ranks", rank_figure(shown, known, metric), f"Rank per layer of every plan in this run.{over}{more}")
    page.table(rows, "ρ: Spearman's rank correlation between rank and gap; empty where one of them is constant")


def spectra(page: Page, run: RunFolder) -> None:
    """Singular values per layer of whatever was measured."""
    layers = run.measured.layers if run.measured else []
    kinds = [kind for kind in _SPECTRA if any(kind in layer.spectra for layer in layers)]
    if not kinds:
        return
    page.section("spectra", "Spectra")
    for kind in kinds:
        found = {layer.name: layer.spectra[kind] for layer in layers if kind in layer.spectra}
        counts = [one.rank for one in found.values() if one.rank is not None]
        line = (
            f" Dashed: what noise alone reaches. Between {min(counts)} and {max(counts)} values a layer lie above it."
            if counts
            else ""
        )
        page.figure(f"spectra_{kind}", spectra_figure(found, _SPECTRA[kind]), f"{_SPECTRA[kind]}, per layer.{line}")


def parameters(page: Page, run: RunFolder) -> None:
    """How many parameters are planned and were trained."""
    counts = {tune.tag: tune.counts for tune in run.tunes[:_COUNTS]}
    if run.plan:
        counts = {"plan.json": run.plan.counts, **counts}
    if not counts:
        return
    page.section("parameters", "Trainable parameters")
    more = len(run.tunes) - _COUNTS
    page.figure(
        "parameters",
        parts_figure({name: count.parts for name, count in counts.items()}),
        f"Parameters that are trained, by part; the whole model has {list(counts.values())[-1].model:,}."
        + (f" {more} more {'fine-tune is' if more == 1 else 'fine-tunes are'} in summary.csv." if more > 0 else ""),
    )
    page.table(
        [
            {"": name, **{part: count.parts[part] for part in PARTS}, "total": count.trained}
            for name, count in counts.items()
        ]
    )


def spearman(x: Sequence[Number], y: Sequence[Number]) -> float | str:
    """Spearman's ρ, ties at their mean rank; "" where one side is constant. (scipy.stats takes seconds to import.)"""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return ""
    return float(np.corrcoef(_mean_ranks(x), _mean_ranks(y))[0, 1])


def _mean_ranks(values: Sequence[Number]) -> np.ndarray:
    _, place, count = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _plan_title(titles: Sequence[str], plan: RankPlan) -> str:
    rule = " ".join(part for part in (plan.rule or "given", budget_text(plan)) if part)
    return f"{rule}: {_titles(titles)}"


def _titles(titles: Sequence[str]) -> str:
    return ", ".join(titles[:3]) + (f" and {len(titles) - 3} more" if len(titles) > 3 else "")


def _layer_rows(run: RunFolder) -> list[Record]:
    chosen: Mapping[str, int] = run.plan.plan.ranks if run.plan and run.plan.plan else {}
    rows = []
    for layer in run.measured.layers if run.measured else []:
        row: Record = {"layer": layer.name, "d_in × d_out": f"{layer.d_in} × {layer.d_out}"}
        for metric, gap in layer.gap.items():
            p = gap.p if gap.p_family is None else gap.p_family
            row |= {f"{words(metric)} gap": _estimate(gap), f"p ({words(metric)})": p}
        rows.append(row | ({"rank": chosen[layer.name]} if layer.name in chosen else {}))
    return rows


def _gaps(measured: Measurement, metric: str) -> dict[str, Gap]:
    return {layer.name: layer.gap[metric] for layer in measured.layers if metric in layer.gap}


def _p_note(gaps: Mapping[str, Gap]) -> str:
    known = all(gap.p_family is not None for gap in gaps.values())
    return "permutation test for all layers together" if known else "each layer tested by itself"


def _estimate(estimate: Interval | Gap) -> str:
    return cell(estimate.value) + interval_text(estimate.low, estimate.high)


def interval_text(low: float | None, high: float | None) -> str:
    """The ends of an interval in brackets; "" where they are not known."""
    return "" if low is None or high is None else f" [{cell(low)}, {cell(high)}]"
