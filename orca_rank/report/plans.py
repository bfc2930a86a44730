"""The report's part on rank plans: those that were made or used, beside the gap and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orca_rank.ranks import RankPlan
from orca_rank.report.draw import Number, words
from orca_rank.report.layer_figures import table_figure
from orca_rank.report.page import Page
from orca_rank.report.results import Counts, budget_text
from orca_rank.report.run_folder import RunFolder
from orca_rank.report.values import budget_words, gaps_of, spearman

Row = dict[str, Any]
_PLANS = 6  # rank plans drawn; the table has all


def even_rank(run: RunFolder, ranks: Mapping[str, int]) -> float | None:
    costs = {layer.name: layer.cost for layer in run.measured.layers} if run.measured else {}
    if not all(name in costs for name in ranks) or len(set(ranks.values())) < 2:
        return None
    return sum(rank * costs[name] for name, rank in ranks.items()) / sum(costs[name] for name in ranks)


def plans_of(run: RunFolder) -> dict[str, dict[str, int]]:
    """Title -> ranks: the plan, those of other rules at its budget, then those that fine-tunes used; equal ones and,
    after the first, plans of one rank for all layers are left out."""
    found: list[tuple[str, Mapping[str, int]]] = []
    if run.plan and run.plan.plan:
        found.append((_title(run.plan.plan), run.plan.plan.ranks))
        found += [(f"{rule}, same budget", ranks) for rule, ranks in run.plan.rules.items()]
    found += [(_title(tune.plan), tune.plan.ranks) for tune in run.tunes if tune.plan]
    plans: dict[str, dict[str, int]] = {}
    for title, ranks in found:
        if dict(ranks) in plans.values() or (plans and len(set(ranks.values())) == 1):
            continue  # one rank for all layers is said by a line of the table
        number = 1 + sum(other == title or other.startswith(f"{title} (") for other in plans)
        plans[title if number == 1 else f"{title} ({number})"] = dict(ranks)
    return plans


def _title(plan: RankPlan) -> str:
    return ", ".join(part for part in (plan.rule or "given", budget_words(budget_text(plan))) if part)


def ranks(page: Page, run: RunFolder, plans: Mapping[str, Mapping[str, int]], metric: str) -> None:
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
        f"Rank of every layer{beside}, blocks under each other and kinds of layers beside each other; all ranks share "
        f"one scale.{more}",
        [{"layer": name, **{title: values.get(name, "") for title, values in columns.items()}} for name in names],
    )
    page.table(
        _plan_rows(run, known), "ρ: Spearman's rank correlation between rank and gap; empty where one is constant"
    )


def _plan_rows(run: RunFolder, known: Mapping[str, float]) -> list[Row]:
    """A row a plan that was made or used, equal ones together."""
    planned = [("plan.json", run.plan.plan, run.plan.counts)] if run.plan and run.plan.plan else []
    used = [(tune.tag, tune.plan, tune.counts) for tune in run.tunes if tune.plan]
    groups: dict[tuple[Any, ...], list[str]] = {}
    first: dict[tuple[Any, ...], tuple[RankPlan, Counts]] = {}
    for title, plan, counts in (*planned, *used):
        key = (plan.rule, budget_text(plan), counts.parts["adapter"], *plan.ranks.items())
        groups.setdefault(key, []).append(title)
        first.setdefault(key, (plan, counts))
    rows: list[Row] = []
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


def _titles(titles: Sequence[str]) -> str:
    return ", ".join(titles[:3]) + (f" and {len(titles) - 3} more" if len(titles) > 3 else "")
