"""The evidence as a section: what every claim comes to, in a table and a forest plot."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from orca_rank.artifacts.command import command
from orca_rank.artifacts.files import read_json
from orca_rank.evidence.points import FROZEN, FULL, Row
from orca_rank.evidence.verdicts import MARGIN, PARAMETERS, Claim
from orca_rank.report.canvas import BLUE, GREEN, GREY, INK, LETTER, PAGE, VERMILLION, grid, styled
from orca_rank.report.page import Page, cell
from orca_rank.report.sections import interval_text

PER_CENT = "% of the error"  # the unit of a claim about a difference of errors
_COLOURS = {"supported": GREEN, "refuted": VERMILLION, "equivalent": BLUE, "undecided": GREY}
_LONGEST = 70  # letters of a claim beside the plot; the table has all


def read_evidence(folder: Path, made_by: str) -> tuple[list[Claim], list[Row], list[str]]:
    """The claims, runs and recommendations that stage=evidence left in claims.json and evidence.csv.

    Raises:
        FileNotFoundError: if claims.json is missing. ValueError: if a file is damaged or lacks a part.
    """
    payload = read_json(folder / "claims.json", made_by)
    try:
        claims = [Claim(**claim) for claim in payload["claims"]]
        with open(folder / "evidence.csv", newline="") as stream:
            rows = [Row.from_dict(row) for row in csv.DictReader(stream)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds damaged evidence ({error}): run `{command(made_by)}`") from error
    return claims, rows, [str(answer) for answer in payload.get("recommended", ())]


def evidence(page: Page, claims: Sequence[Claim], rows: Sequence[Row], answers: Sequence[str] = ()) -> None:
    """A table of all claims, and a forest plot of those that compare errors.

    Args:
        claims: in the order to show them. rows: of evidence.csv, the runs behind them. answers: what to do, a sentence
            or two for every task.
    """
    tasks, seeds = (len({getattr(row, name) for row in rows}) for name in ("task", "seed"))
    page.section("evidence", "Evidence")
    for answer in answers:
        page.text(answer)
    if curves := rank_curves(rows):
        page.figure(
            "rank_curve",
            curve_figure(curves),
            "Test error against the uniform rank, every rank at its own learning rate and every adapter at one scale: "
            "a point a seed, a ring their mean. Lines: the frozen body and full fine-tuning, with the range of their "
            "seeds.",
        )
    page.table(
        [
            {
                "claim": claim.claim,
                "verdict": claim.verdict,
                "estimate": cell(claim.estimate) if math.isfinite(claim.estimate) else "",
                "95 % interval": interval_text(*_ends(claim)).strip(),
                "unit": claim.unit,
                "p": claim.p,
                "fine-tunes": claim.runs,
                "note": claim.note,
            }
            for claim in claims
        ],
        f"From {len(rows)} fine-tunes on {tasks} tasks with {seeds} seeds. p: of no difference, adjusted where several "
        f"rules were asked at once",
    )
    compared = [claim for claim in claims if claim.unit == PER_CENT and math.isfinite(claim.estimate)]
    if compared:
        page.figure(
            "evidence",
            forest_figure(compared),
            f"Difference of the test error in per cent of what it is compared with, with 95 % intervals; left of 0 the "
            f"claim holds. Shaded: ±{MARGIN:g} %, within which a difference is of no use. Arrows: the interval goes "
            f"on.",
        )


def markdown(claims: Sequence[Claim], rows: Sequence[Row], answers: Sequence[str]) -> str:
    """The verdicts as a page of text beside rank_curve.png: what stands in the README.

    Claims in parameters are left out: they are those in errors, in another unit; claims.json has them.
    """
    lines = ["| claim | verdict | figure | 95 % interval | fine-tunes |", "|---|---|---|---|---|"]
    for claim in claims:
        if claim.unit == PARAMETERS:
            continue
        figure = f"{claim.estimate:+.1f} {claim.unit}" if math.isfinite(claim.estimate) else ""
        interval = interval_text(*_ends(claim)).strip()
        lines.append(f"| {claim.claim} | **{claim.verdict}** | {figure} | {interval} | {claim.runs} |")
    seconds = sum(row.seconds for row in rows)
    ran = f"{len(rows)} fine-tunes, {seconds / 3600:.1f} hours of training."
    return "\n\n".join(["\n".join(lines), *(f"- {answer}" for answer in answers), ran]) + "\n"


Curve = dict[str, list[float]]


def rank_curves(rows: Sequence[Row]) -> dict[str, Curve]:
    """task -> "frozen", "full" or a rank as text, in this order, -> the test errors of its seeds."""
    curves: dict[str, Curve] = {}
    for row in sorted((row for row in rows if row.part == "gate"), key=lambda row: (row.task, row.rank, row.seed)):
        name = row.rule if row.rule in (FROZEN, FULL) else str(row.rank)
        curves.setdefault(row.task, {}).setdefault(name, []).append(row.test)
    return curves


@styled()
def curve_figure(curves: Mapping[str, Curve]) -> Figure:
    """One panel a task: see `rank_curves`; ranks at equal steps, seeds as points, means as rings."""
    width = min(4.6, (PAGE - 0.8 - 0.9 * (len(curves) - 1)) / len(curves) - 0.2)
    figure, (axes,) = grid([width] * len(curves), [2.6], left=0.8, across=0.9)
    for axis, (task, curve) in zip(axes, curves.items(), strict=True):
        ranks = [name for name in curve if name not in (FROZEN, FULL)]
        for name, colour in ((FROZEN, GREY), (FULL, GREEN)):
            if errors := curve.get(name):
                axis.axhspan(min(errors), max(errors), color=colour, alpha=0.18, linewidth=0)
                axis.axhline(fmean(errors), color=colour, linewidth=1.2)
                axis.annotate(
                    f"{name} body" if name == FROZEN else "full fine-tuning",
                    (0, fmean(errors)), xycoords=("axes fraction", "data"), xytext=(4, 3), textcoords="offset points",
                    color=colour,
                )  # fmt: skip
        for place, rank in enumerate(ranks):
            axis.plot([place] * len(curve[rank]), curve[rank], "o", color=BLUE, markersize=4, alpha=0.7)
        axis.plot(range(len(ranks)), [fmean(curve[rank]) for rank in ranks], "o-", color=BLUE, markersize=9, mfc="none")
        axis.set(xlabel="uniform rank of every layer", ylabel="test error", title=task)
        axis.set(xlim=(-0.5, max(1, len(ranks)) - 0.5), xticks=range(len(ranks)), xticklabels=ranks)
    return figure


@styled()
def forest_figure(claims: Sequence[Claim]) -> Figure:
    """One line a claim: its estimate and interval in per cent, against 0 and the margin of equivalence.

    Args:
        claims: with finite estimates; an end of an interval that is not finite leaves the plot.
    """
    names = [claim.claim if len(claim.claim) <= _LONGEST else f"{claim.claim[: _LONGEST - 1]}…" for claim in claims]
    left = 0.3 + 0.9 * LETTER * max(len(name) for name in names)
    figure, ((axis,),) = grid([max(4.0, PAGE - 1.1 - left)], [0.3 * len(claims) + 0.2], left=left, right=1.1, top=0.4)
    finite = [abs(value) for claim in claims for value in (claim.estimate, *_ends(claim)) if value is not None]
    limit = 1.15 * max(2 * MARGIN, *finite)
    axis.axvspan(-MARGIN, MARGIN, color="#e4e7eb", linewidth=0)
    axis.axvline(0, color=INK, linewidth=1.0)
    for place, claim in enumerate(claims):
        colour = _COLOURS[claim.verdict]
        low, high = _ends(claim)
        for end, value in ((-limit, low), (limit, high)):
            stop = end if value is None else value
            axis.plot([claim.estimate, stop], [place, place], color=colour, linewidth=2.0, alpha=0.6)
            if value is None:
                axis.plot([end], [place], "<" if end < 0 else ">", color=colour, markersize=5, clip_on=False)
        axis.plot([claim.estimate], [place], "o", color=colour, markersize=6)
        axis.annotate(
            claim.verdict, (1, place), xycoords=("axes fraction", "data"), xytext=(10, 0), textcoords="offset points",
            va="center", color=colour,
        )  # fmt: skip
    axis.set(xlim=(-limit, limit), ylim=(len(claims) - 0.4, -0.6), xlabel="difference of the test error (%)")
    axis.set_yticks(range(len(claims)), names)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    return figure


def _ends(claim: Claim) -> tuple[float | None, float | None]:
    low, high = (value if math.isfinite(value) else None for value in (claim.low, claim.high))
    return low, high
