"""The report's sections on what was measured, planned and aligned: drawn, and said in words, no more than the numbers say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from orca_rank.measuring.records import Gap
from orca_rank.ranks import RankPlan
from orca_rank.report.draw import Number, words
from orca_rank.report.figures import alignment_figure
from orca_rank.report.layer_figures import gap_figure, significant, table_figure
from orca_rank.report.page import Page, cell
from orca_rank.report.results import Counts, Interval, Measurement, Options, budget_text, flat
from orca_rank.report.run_folder import RunFolder

Record = dict[str, Any]
_PLANS = 6  # rank plans drawn; the table has all
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
        f"Objective {objective}, {run.align.epochs} epochs. Distance between source features and features of held-out "
        f"target images (in brackets: 90 % interval from half-samples): {'; '.join(changes)}. The panels have "
        f"different scales.",
        rows,
    )


def measurement(page: Page, run: RunFolder) -> None:
    """The gap of every layer, of the run's target and of others beside it, above the ranks; plans as tables of blocks."""
    plans = _plans(run)
    measured = run.measured if run.measured and run.measured.metrics else None
    if measured is None and not plans:
        return
    page.section("layers", "Gap and rank of every layer" if measured else "Rank of every layer")
    targets = _targets(run)
    metric = main_metric(run)
    first = dict([next(iter(plans.items()))]) if plans else {}
    even = _even(run, next(iter(first.values()))) if first else None
    page.figure("layers", _layers(targets, metric, first, even), _layers_caption(run, metric, first, even), _rows(run))
    if measured:
        page.table(
            _gap_rows(targets), "ρ: Spearman's rank correlation of the gap with the layer's place in the network"
        )
        if run.compare and flat(measured.config).get("embedder.aligned"):
            page.text(
                f"The run's own target passes through the aligned embedder; {', '.join(map(words, run.compare))} through "
                f"an embedder as it was initialised, without alignment. Their gaps differ for that reason too."
            )
    if plans:
        _ranks(page, run, plans, metric)


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
            f"Calibrated {words(metric)} distance between what the source and a target send into every layer; 0 is what "
            f"two halves of the same data would give. Upright lines are 95 % bootstrap intervals; filled marks have "
            f"p < 0.05 ({p_note(gaps_of(run.measured, metric))}). Layers that read the same input share a mark."
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


def _even(run: RunFolder, ranks: Mapping[str, int]) -> float | None:
    costs = {layer.name: layer.cost for layer in run.measured.layers} if run.measured else {}
    if not all(name in costs for name in ranks) or len(set(ranks.values())) < 2:
        return None
    return sum(rank * costs[name] for name, rank in ranks.items()) / sum(costs[name] for name in ranks)


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


def _plans(run: RunFolder) -> dict[str, dict[str, int]]:
    """Title -> ranks: the plan, those of other rules at its budget, then those that fine-tunes used; equal ones once."""
    found: list[tuple[str, Mapping[str, int]]] = []
    if run.plan and run.plan.plan:
        found.append((_title(run.plan.plan), run.plan.plan.ranks))
        found += [(f"{rule}, same budget", ranks) for rule, ranks in run.plan.rules.items()]
    found += [(_title(tune.plan), tune.plan.ranks) for tune in run.tunes if tune.plan]
    plans: dict[str, dict[str, int]] = {}
    for title, ranks in found:
        if dict(ranks) in plans.values():
            continue
        number = 1 + sum(other == title or other.startswith(f"{title} (") for other in plans)
        plans[title if number == 1 else f"{title} ({number})"] = dict(ranks)
    return plans


def _title(plan: RankPlan) -> str:
    return ", ".join(part for part in (plan.rule or "given", budget_words(budget_text(plan))) if part)


def budget_words(text: str) -> str:
    """A budget as a reader writes it: parameters=32256 -> 32,256 parameters."""
    said = []
    for part in text.split():
        name, _, value = part.partition("=")
        said.append(f"{int(value):,} parameters" if name == "parameters" else f"{words(name)} {value}")
    return ", ".join(said)


def _ranks(page: Page, run: RunFolder, plans: Mapping[str, Mapping[str, int]], metric: str) -> None:
    known = {name: gap.value for name, gap in gaps_of(run.measured, metric).items()} if run.measured else {}
    shown = dict(list(plans.items())[:_PLANS])
    columns: dict[str, Mapping[str, Number]] = {f"{words(metric)} gap": known, **shown} if known else dict(shown)
    colours = {title: "rank" if title in shown else "gap" for title in columns}
    left = len(plans) - _PLANS
    more = f" {left} more {'plan is' if left == 1 else 'plans are'} in the table only." if left > 0 else ""
    beside = f" beside its {words(metric)} gap" if known else ""
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    page.figure(
        "ranks",
        table_figure(columns, colours),
        f"Rank of every layer{beside}, blocks under each other and kinds of layers beside each other; all ranks share one "
        f"scale.{more}",
        [{"layer": name, **{title: values.get(name, "") for title, values in columns.items()}} for name in names],
    )
    page.table(
        _plan_rows(run, known), "ρ: Spearman's rank correlation between rank and gap; empty where one is constant"
    )


def _plan_rows(run: RunFolder, known: Mapping[str, float]) -> list[Record]:
    """A row a plan that was made or used, equal ones together."""
    planned = [("plan.json", run.plan.plan, run.plan.counts)] if run.plan and run.plan.plan else []
    used = [(tune.tag, tune.plan, tune.counts) for tune in run.tunes if tune.plan]
    groups: dict[tuple[Any, ...], list[str]] = {}
    first: dict[tuple[Any, ...], tuple[RankPlan, Counts]] = {}
    for title, plan, counts in (*planned, *used):
        key = (plan.rule, budget_text(plan), counts.parts["adapter"], *plan.ranks.items())
        groups.setdefault(key, []).append(title)
        first.setdefault(key, (plan, counts))
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
    return rows


def _rows(run: RunFolder) -> list[Record]:
    """The figure of layers as data: a row a target, layer and metric, with the planned rank."""
    chosen = run.plan.plan.ranks if run.plan and run.plan.plan else {}
    if not _targets(run):
        return [{"layer": name, "rank": rank} for name, rank in next(iter(_plans(run).values())).items()]
    return [
        {"target": target, "layer": layer.name, "metric": metric, **gap.to_dict(), "rank": chosen.get(layer.name, "")}
        for target, found in _targets(run).items()
        for layer in found.layers
        for metric, gap in layer.gap.items()
    ]


def spearman(x: Sequence[Number], y: Sequence[Number]) -> float | str:
    """Spearman's ρ, ties at their mean rank; "" where one side is constant. (scipy.stats takes seconds to import.)"""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return ""
    return float(np.corrcoef(_mean_ranks(x), _mean_ranks(y))[0, 1])


def _mean_ranks(values: Sequence[Number]) -> np.ndarray:
    _, place, count = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _titles(titles: Sequence[str]) -> str:
    return ", ".join(titles[:3]) + (f" and {len(titles) - 3} more" if len(titles) > 3 else "")


def gaps_of(measured: Measurement, metric: str) -> dict[str, Gap]:
    return {layer.name: layer.gap[metric] for layer in measured.layers if metric in layer.gap}


def p_note(gaps: Mapping[str, Gap]) -> str:
    known = all(gap.p_family is not None for gap in gaps.values())
    return "permutation test for all layers together" if known else "each layer tested by itself"


def estimate_text(estimate: Interval | Gap) -> str:
    return cell(estimate.value) + interval_text(estimate.low, estimate.high)


def interval_text(low: float | None, high: float | None) -> str:
    """The ends of an interval in brackets; "" where they are not known."""
    return "" if low is None or high is None else f" [{cell(low)}, {cell(high)}]"
