"""The report's sections on what was measured, planned and aligned: drawn, and said in no more words than numbers."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from orca_rank.report.draw import words
from orca_rank.report.figures import alignment_figure
from orca_rank.report.layer_figures import gap_figure, significant
from orca_rank.report.page import Page
from orca_rank.report.plans import even_rank, plans_of, ranks
from orca_rank.report.results import Measurement, Options, flat
from orca_rank.report.run_folder import RunFolder
from orca_rank.report.values import counted, estimate_text, gaps_of, p_note, spearman

Record = dict[str, Any]
_NOTES = 5  # sentences of one kind at the top
ALIKE = 0.95  # Spearman's ρ from which two metrics say the same of the layers
_DISTANCES = {"otdd": "OTDD, full cost", "mmd": "MMD², unbiased", "sliced": "d · sliced W₂²"}


def options_of(run: RunFolder) -> Options:
    """The options that the run's measurement, alignment or best fine-tune was made with; empty where there is none."""
    found = (run.measured, run.align, *run.tunes)
    return flat(next((one.config for one in found if one is not None and one.config), {}))


def backbone_name(options: Options) -> str:
    """What ran: the weights that come with the package have a name of their own."""
    shipped = options.get("backbone.shipped") if options.get("backbone.pretrained") == "shipped" else None
    return str(shipped or options.get("backbone.name") or "")


def lead(run: RunFolder) -> str:
    """Backbone, source and target of the run in one line."""
    options = options_of(run)
    source = " ".join(part for part in (class_name(options, "source"), str(options.get("source.file") or "")) if part)
    target = class_name(options, "data")
    parts = [backbone_name(options)]
    parts += [f"source {source}"] if source else []
    parts += [f"target {target}"] if target else []
    return ", ".join(part for part in parts if part)


def class_name(options: Options, section: str) -> str:
    """The class that a section of the options names, without its module; "" where it names none."""
    return str(options.get(f"{section}._target_") or "").rpartition(".")[2]


def notes(page: Page, run: RunFolder) -> None:
    """What is missing, and files made from others that changed since."""
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
    labels = {_DISTANCES.get(name, words(name)): pair for name, pair in run.align.distances.items()}
    changes = [
        f"{words(name)} {estimate_text(before)} before, {estimate_text(after)} after"
        for name, (before, after) in run.align.distances.items()
    ]
    objective = words(run.align.objective)
    rows = [{"what": "objective", **row} for row in run.align.curve]
    rows += [
        {"what": name, "when": when, "value": one.value, "low": one.low, "high": one.high}
        for name, pair in run.align.distances.items()
        for when, one in zip(("before", "after"), pair, strict=True)
    ]
    page.figure(
        "alignment",
        alignment_figure(run.align.curve, labels, f"{objective} (training)"),
        f"Objective {objective}, {counted(run.align.epochs, 'epoch')}. Distance between source features and features "
        f"of held-out target images (in brackets: 90 % interval from half-samples): {'; '.join(changes)}. The panels "
        f"have different scales.",
        rows,
    )


def measurement(page: Page, run: RunFolder) -> None:
    """The gap of every layer, of the run's target and of others beside it, above its rank; then the plans."""
    plans = plans_of(run)
    measured = run.measured if run.measured and run.measured.metrics else None
    if measured is None and not plans:
        return
    page.section("layers", "Gap and rank of every layer" if measured else "Rank of every layer")
    targets = _targets(run)
    metric = main_metric(run)
    first = dict([next(iter(plans.items()))]) if plans else {}
    even = even_rank(run, next(iter(first.values()))) if first else None
    page.figure("layers", _layers(targets, metric, first, even), _layers_caption(run, metric, first, even), _rows(run))
    if measured:
        page.table(
            _gap_rows(targets), "ρ: Spearman's rank correlation of the gap with the layer's place in the network"
        )
        if run.compare and flat(measured.config).get("embedder.aligned"):
            page.text(
                f"The run's own target passes through the aligned embedder; {', '.join(map(words, run.compare))} "
                f"through an embedder as it was initialised, without alignment. Their gaps differ for that reason too."
            )
    if plans:
        ranks(page, run, plans, metric)


def main_metric(run: RunFolder) -> str:
    """The gap that the rules of this run read, else the first that was measured."""
    known = run.measured.metrics if run.measured else []
    planned = [run.plan.plan] if run.plan and run.plan.plan else []
    asked = [str(one.options.get("metric")) for one in (*planned, *(tune.plan for tune in run.tunes if tune.plan))]
    return next((name for name in asked if name in known), next(iter(known), ""))


def like_main(run: RunFolder, metric: str) -> dict[str, float]:
    """The other metrics of the run's target -> Spearman's ρ of their gaps with those of `metric`."""
    if run.measured is None:
        return {}
    first = gaps_of(run.measured, metric)
    found = {}
    for other in run.measured.metrics:
        both = [(first[name].value, gap.value) for name, gap in gaps_of(run.measured, other).items() if name in first]
        rho = spearman(*zip(*both, strict=True)) if other != metric and both else ""
        if isinstance(rho, float):
            found[other] = rho
    return found


def _targets(run: RunFolder) -> dict[str, Measurement]:
    if run.measured is None or not run.measured.metrics:
        return {}
    name = class_name(flat(run.measured.config), "data")
    return {f"target ({name})" if name else "target": run.measured} | {
        words(one): run.compare[one] for one in run.compare
    }


def _layers(
    targets: Mapping[str, Measurement], metric: str, plans: Mapping[str, Mapping[str, int]], even: float | None
) -> Any:
    return gap_figure({name: found.layers for name, found in targets.items()}, metric, plans, even)


def _layers_caption(run: RunFolder, metric: str, plans: Mapping[str, Any], even: float | None) -> str:
    said = []
    if run.measured and run.measured.metrics:
        said.append(
            f"Calibrated {words(metric)} distance between what the source and a target send into every layer; 0 is "
            f"what two halves of the same data would give. Upright lines are 95 % bootstrap intervals; filled marks "
            f"have p < 0.05 ({p_note(gaps_of(run.measured, metric))})."
        )
        others = like_main(run, metric)
        same = [f"{words(name)} (ρ = {rho:.2f})" for name, rho in others.items() if rho >= ALIKE]
        said += [f"Not drawn, because it orders the layers alike: {', '.join(same)}."] if same else []
    if plans:
        below = "Below: the rank of every layer" if said else "The rank of every layer"
        said.append(f"{below} in one plan." + ("" if even is None else _even_text(even)))
    return " ".join(said)


def _even_text(even: float) -> str:
    return f" Dashed: the rank that costs as many parameters where all layers have it, {even:.2f}."


def _gap_rows(targets: Mapping[str, Measurement]) -> list[Record]:
    rows: list[Record] = []
    for name, found in targets.items():
        for metric in found.metrics:
            gap = gaps_of(found, metric)
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
    return rows


def _rows(run: RunFolder) -> list[Record]:
    """The figure of layers as data: a row a target, layer and metric, with the planned rank."""
    chosen = run.plan.plan.ranks if run.plan and run.plan.plan else {}
    if not _targets(run):
        return [{"layer": name, "rank": rank} for name, rank in next(iter(plans_of(run).values())).items()]
    return [
        {"target": target, "layer": layer.name, "metric": metric, **gap.to_dict(), "rank": chosen.get(layer.name, "")}
        for target, found in _targets(run).items()
        for layer in found.layers
        for metric, gap in layer.gap.items()
    ]
