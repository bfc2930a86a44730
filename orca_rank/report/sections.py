"""The report's sections: each draws what the run folder holds and says in words what the numbers say, no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from scipy.stats import spearmanr

from orca_rank.report.figures import Number, alignment_figure, comparison_figure, learning_curves, parts_figure, words
from orca_rank.report.layer_figures import agreement_figure, gap_figure, rank_figure, significant, spectra_figure
from orca_rank.report.page import Page, cell
from orca_rank.report.run_folder import PARTS, Record, RunFolder, Tune, budget_text, summary

_PLANS = 6  # rank plans drawn; the table has all
_DISTANCES = {"otdd": "OTDD, full squared cost", "mmd": "MMD², unbiased", "sliced": "d · sliced W₂²"}
_SPECTRA = {
    "ot_map": "What the optimal-transport map asks of the weight: singular values of W(T − I)Σ^½",
    "gradient": "The target loss's gradient at the start: singular values",
    "activation": "The target's inputs: singular values",
}


def overview(page: Page, run: RunFolder) -> None:
    """A few numbers, what is missing, and files made from others that changed since."""
    cards = []
    if run.tunes:
        best = run.tunes[0]
        cards.append((f"test {words(best.metric)}, fine-tune of the best validation", cell(best.test), best.tag))
        cards.append(
            (
                "parameters trained by it",
                cell(best.metrics["trainable_parameters"]["total"]),
                f"of {best.metrics['total_parameters']:,}",
            )
        )
    if run.align:
        for name, pair in list(run.align["distances"].items())[:1]:
            change = f"{cell(pair['before']['value'])} → {cell(pair['after']['value'])}"
            cards.append((f"{words(name)} to the source, held-out data", change, "before and after alignment"))
    if run.layers and (metric := _first_metric(run.layers)):
        gaps = _gaps(run.layers, metric)
        found = sum(significant(gap) for gap in gaps.values())
        cards.append(
            (f"layers whose {words(metric)} gap has p < 0.05", f"{found} of {len(gaps)}", _p_note(gaps.values()))
        )
    page.cards(cards)
    if run.missing:
        page.missing(run.missing)
    for sentence in run.stale:
        page.note(sentence)


def alignment(page: Page, run: RunFolder) -> None:
    if run.align is None:
        return
    page.section("alignment", "Alignment of the embedder")
    distances = run.align["distances"]
    labels = {_DISTANCES.get(name, name): pair for name, pair in distances.items()}
    sentences = [
        f"{words(name)} {_estimate(pair['before'])} before, {_estimate(pair['after'])} after"
        for name, pair in distances.items()
    ]
    caption = (
        f"Objective {words(run.align['objective'])}, {run.align.get('epochs', len(run.alignment))} epochs. Distance "
        f"between source features and features of held-out target images (in brackets: 90 % interval from "
        f"half-samples): {'; '.join(sentences)}. The panels have different scales."
    )
    page.figure(
        "alignment", alignment_figure(run.alignment, labels, f"{words(run.align['objective'])} (training)"), caption
    )


def gaps(page: Page, run: RunFolder) -> None:
    if run.layers is None or (first := _first_metric(run.layers)) is None:
        return
    page.section("gaps", "Gap of every layer")
    targets = {_target_name(run): run.layers, **run.compare}
    page.figure(
        "gaps",
        gap_figure({name: payload["layers"] for name, payload in targets.items()}),
        f"Calibrated distance between what the source and a target send into every layer; 0 is what two halves of the "
        f"same data would give. Bars are 95 % bootstrap intervals; filled marks have p < 0.05 "
        f"({_p_note(_gaps(run.layers, first).values())}). Layers that read the same input share a mark.",
    )
    rows: list[Record] = []
    for name, payload in targets.items():
        for metric in _metrics(payload):
            gap = _gaps(payload, metric)
            values = [one["value"] for one in gap.values()]
            largest = max(gap, key=lambda layer: gap[layer]["value"])
            rows.append(
                {
                    "target": name,
                    "metric": words(metric),
                    "layers": len(gap),
                    "p < 0.05": sum(significant(one) for one in gap.values()),
                    "median gap": float(median(values)),
                    "largest gap": float(max(values)),
                    "in layer": largest,
                    "ρ with depth": _spearman(range(len(values)), values),
                }
            )
    page.table(rows, "ρ: Spearman's rank correlation of the gap with the layer's place in the network")
    embedder = run.layers.get("config", {}).get("embedder") or {}
    if run.compare and embedder.get("aligned"):
        page.text(
            f"The run's own target passes through the aligned embedder; {', '.join(run.compare)} through an embedder "
            f"as it was initialised, without alignment. Their gaps differ for that reason too."
        )
    agreement = run.layers.get("agreement") or {}
    if len(agreement) > 2:
        page.figure(
            "agreement",
            agreement_figure(agreement),
            f"Rank correlation between depth and the measurements, over {len(run.layers['layers'])} layers of the "
            f"run's own target. Neighbouring layers resemble each other, so these are descriptions, not tests.",
        )
    page.table(_layer_rows(run), folded="All layers as a table")


def ranks(page: Page, run: RunFolder) -> None:
    planned = _planned(run)
    plans: list[tuple[str, Record]] = [("plan.json", planned)] if planned else []
    plans += [(tune.tag, tune.plan) for tune in run.tunes if tune.plan]
    if not plans:
        return
    page.section("ranks", "Rank of every layer")
    metric = next((plan["options"]["metric"] for _, plan in plans if "metric" in (plan.get("options") or {})), None)
    if run.layers and metric not in _metrics(run.layers):
        metric = _first_metric(run.layers)
    known = {name: one["value"] for name, one in _gaps(run.layers, metric).items()} if run.layers and metric else {}
    costs = {
        layer["name"]: layer["d_in"] + layer["d_out"] for layer in (run.layers or run.plan or {}).get("layers", [])
    }
    groups: dict[tuple[tuple[str, int], ...], list[str]] = {}
    rows: list[Record] = []
    for title, plan in plans:
        chosen = plan["ranks"]
        groups.setdefault(tuple(chosen.items()), []).append(title)
        row = {
            "plan": title,
            "rule": plan["rule"],
            "budget": budget_text(plan),
            "mean rank": sum(chosen.values()) / len(chosen),
            "least": min(chosen.values()),
            "most": max(chosen.values()),
            "layers with rank 0": sum(rank == 0 for rank in chosen.values()),
        }
        if set(chosen) <= set(costs):
            row["adapter parameters (r · (d_in + d_out))"] = sum(rank * costs[name] for name, rank in chosen.items())
        if known:
            both = [name for name in chosen if name in known]
            row["ρ with the gap"] = _spearman([chosen[name] for name in both], [known[name] for name in both])
        rows.append(row)
    rules = dict(plans)
    shown = {_plan_title(titles, rules[titles[0]]): dict(chosen) for chosen, titles in list(groups.items())[:_PLANS]}
    over = f" The line is the calibrated {words(metric)} gap." if known and metric else ""
    more = f" {len(groups) - _PLANS} more plans are in the table only." if len(groups) > _PLANS else ""
    page.figure(
        "ranks", rank_figure(shown, known, metric or ""), f"Rank per layer of every plan in this run.{over}{more}"
    )
    page.table(rows, "ρ: Spearman's rank correlation between rank and gap; empty where one of them is constant")


def spectra(page: Page, run: RunFolder) -> None:
    layers = run.layers["layers"] if run.layers else []
    kinds = [kind for kind in _SPECTRA if any(layer.get(kind) for layer in layers)]
    if not kinds:
        return
    page.section("spectra", "Spectra")
    for kind in kinds:
        found = {layer["name"]: layer[kind] for layer in layers if layer.get(kind)}
        counts = [one["rank"] for one in found.values() if one.get("null") is not None]
        said = f" Between {min(counts)} and {max(counts)} values a layer lie above it." if counts else ""
        line = f" Dashed: what noise alone reaches.{said}" if counts else ""
        values = {name: (one["singular_values"], one.get("null")) for name, one in found.items()}
        page.figure(f"spectra_{kind}", spectra_figure(values, _SPECTRA[kind]), f"{_SPECTRA[kind]}, per layer.{line}")


def parameters(page: Page, run: RunFolder) -> None:
    counts = {tune.tag: tune.metrics["trainable_parameters"] for tune in run.tunes[:20]}
    if run.plan:
        counts = {"plan.json": run.plan["trainable_parameters"], **counts}
    if not counts:
        return
    page.section("parameters", "Trainable parameters")
    total = run.plan["total_parameters"] if run.plan else run.tunes[0].metrics["total_parameters"]
    page.figure(
        "parameters", parts_figure(counts), f"Parameters that are trained, by part; the whole model has {total:,}."
    )
    rows = [
        {"": name, **{part: count.get(part, 0) for part in PARTS}, "total": count["total"]}
        for name, count in counts.items()
    ]
    page.table(rows)


def finetunes(page: Page, run: RunFolder, baselines: Mapping[str, float]) -> None:
    if not run.tunes:
        return
    page.section("finetunes", "Fine-tunes")
    for metric in dict.fromkeys(tune.metric for tune in run.tunes):
        tunes = [tune for tune in run.tunes if tune.metric == metric]
        _finetunes(page, tunes, metric, baselines if metric == "relative_l2" else {})


def _finetunes(page: Page, tunes: Sequence[Tune], metric: str, baselines: Mapping[str, float]) -> None:
    rows, unit, called = summary(tunes), tunes[0].task.metric_unit, words(metric)
    best = tunes[0]
    table = [
        {
            "#": number,
            "tag": row["tag"],
            "adapter": row["adapter"],
            "rule": row["rule"],
            "budget": row["budget"],
            "seed": row["seed"],
            "trainable": row["trainable_total"],
            f"val {called}": row["val"],
            f"test {called}": row["test"],
            "epochs": row["epochs"],
            "seconds": row["seconds"],
        }
        for number, row in enumerate(rows, 1)
    ]
    page.table(table, f"Sorted by validation {called} ({unit}; lower is better)")
    lines = "".join(f" {name[0].upper()}{name[1:]}: {cell(value)}." for name, value in baselines.items())
    seeds = len({row["seed"] for row in rows})
    page.figure(
        f"comparison_{metric}",
        comparison_figure(rows, metric, unit, baselines),
        f"Test {called} against trainable parameters, numbered as in the table. The best validation {called}, "
        f"{cell(best.val)}, is {best.tag}'s; its test {called} is {cell(best.test)}.{lines} "
        f"{'One seed' if seeds == 1 else f'{seeds} seeds'}: the spread between seeds is "
        f"{'not known' if seeds == 1 else 'between points of one adapter and rule'}.",
    )
    curves = {tune.tag: tune.curve for tune in tunes if tune.curve}
    if curves:
        page.figure(
            f"curves_{metric}",
            learning_curves(curves, metric, unit),
            f"Training loss and validation {called} by epoch. Each fine-tune is tested at its best validation epoch.",
        )


def _planned(run: RunFolder) -> Record | None:
    """plan/plan.json in the form of a fine-tune's ranks.json; None where there is none, or no layer gets a rank."""
    if run.plan is None or run.plan.get("rule") is None:
        return None
    ranks = {layer["name"]: layer["rank"] for layer in run.plan["layers"]}
    return {**{name: run.plan.get(name) for name in ("rule", "budget", "options")}, "ranks": ranks}


def _plan_title(titles: Sequence[str], plan: Record) -> str:
    more = f" and {len(titles) - 3} more" if len(titles) > 3 else ""
    rule = " ".join(part for part in (plan["rule"] or "given", budget_text(plan)) if part)
    return f"{rule}: {', '.join(titles[:3])}{more}"


def _layer_rows(run: RunFolder) -> list[Record]:
    chosen = (_planned(run) or {}).get("ranks", {})
    rows = []
    for layer in run.layers["layers"] if run.layers else []:
        row = {"layer": layer["name"], "d_in × d_out": f"{layer['d_in']} × {layer['d_out']}"}
        for metric, gap in layer["gap"].items():
            row |= {f"{words(metric)} gap": _estimate(gap), f"p ({words(metric)})": gap.get("p_family", gap.get("p"))}
        rows.append(row | ({"rank": chosen[layer["name"]]} if layer["name"] in chosen else {}))
    return rows


def _target_name(run: RunFolder) -> str:
    node = (run.layers or {}).get("config", {}).get("data") or {}
    name = str(node.get("_target_", "")).rpartition(".")[2]
    return f"target ({name})" if name else "target"


def _metrics(payload: Record) -> list[str]:
    return list(dict.fromkeys(metric for layer in payload["layers"] for metric in layer["gap"]))


def _first_metric(payload: Record) -> str | None:
    return next(iter(_metrics(payload)), None)


def _gaps(payload: Record, metric: str) -> dict[str, Record]:
    return {layer["name"]: layer["gap"][metric] for layer in payload["layers"] if metric in layer["gap"]}


def _p_note(gaps: Any) -> str:
    known = all(gap.get("p_family") is not None for gap in gaps)
    return "permutation test for all layers together" if known else "each layer tested by itself"


def _estimate(estimate: Mapping[str, Any]) -> str:
    if estimate.get("low") is None or estimate.get("high") is None:
        return cell(estimate["value"])
    return f"{cell(estimate['value'])} [{cell(estimate['low'])}, {cell(estimate['high'])}]"


def _spearman(x: Sequence[Number], y: Sequence[Number]) -> float | str:
    if len(set(x)) < 2 or len(set(y)) < 2:
        return ""
    return float(spearmanr(list(x), list(y)).statistic)
