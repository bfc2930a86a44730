"""The evidence as a section: what every claim comes to, in a table and a forest plot."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from orca_rank.artifacts.command import command
from orca_rank.artifacts.files import read_json
from orca_rank.evidence.points import FROZEN, FULL, Row
from orca_rank.evidence.verdicts import MARGIN, OWN, PARAMETERS, Claim
from orca_rank.report.draw import LETTER, Panel, Picture, Scale, scale, words
from orca_rank.report.page import Page, cell
from orca_rank.report.values import interval_text

PER_CENT = "% of the error"  # the unit of a claim about a difference of errors
_COLOURS = {"supported": "c2", "refuted": "c1", "equivalent": "c0", "undecided": "c6"}
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


class Evidence(NamedTuple):
    """What stage=evidence came to: see `read_evidence`."""

    claims: list[Claim]
    rows: list[Row]
    answers: list[str]

    def section(self, page: Page) -> None:
        evidence(page, *self)


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
            [{"task": task, "rank": rank, "test": error} for task, curve in curves.items()
             for rank, errors in curve.items() for error in errors],
        )  # fmt: skip
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
            [claim.to_dict() for claim in compared],
        )


def markdown(claims: Sequence[Claim], rows: Sequence[Row], answers: Sequence[str]) -> str:
    """The verdicts as a page of text beside rank_curve.png: what stands in the README.

    Claims in parameters are left out: they are those in errors, in another unit; claims.json has them. So are those of
    rules at a learning rate of their own where it is uniform's: they are said in a sentence.
    """
    lines = ["| claim | verdict | figure | 95 % interval | p | fine-tunes |", "|---|---|---|---|---|---|"]
    known = {claim.claim: claim.estimate for claim in claims}
    same = [
        claim for claim in claims if OWN in claim.claim and known.get(claim.claim.replace(OWN, "")) == claim.estimate
    ]
    for claim in claims:
        if claim.unit == PARAMETERS or claim in same:
            continue
        figure = f"{claim.estimate:+.1f} {claim.unit}" if math.isfinite(claim.estimate) else ""
        interval = interval_text(*_ends(claim)).strip()
        note = f"; {claim.note}" if claim.note else ""
        p = cell(claim.p) if claim.p >= 1e-3 else "< 0.001"
        lines.append(f"| {claim.claim}{note} | **{claim.verdict}** | {figure} | {interval} | {p} | {claim.runs} |")
    seconds = sum(row.seconds for row in rows)
    ran = f"{len(rows)} fine-tunes, {seconds / 3600:.1f} hours of training."
    if same:
        rules = ", ".join(dict.fromkeys(claim.claim.partition(" ")[0] for claim in same))
        answers = [f"The own best learning rate of these rules is uniform's: {rules}.", *answers]
    return "\n\n".join(["\n".join(lines), *(f"- {answer}" for answer in answers), ran]) + "\n"


Curve = dict[str, list[float]]


def rank_curves(rows: Sequence[Row]) -> dict[str, Curve]:
    """task -> "frozen", "full" or a rank as text, in this order, -> the test errors of its seeds."""
    curves: dict[str, Curve] = {}
    for row in sorted(
        (row for row in rows if row.part == "gate" and not row.diverged), key=lambda row: (row.task, row.rank, row.seed)
    ):
        name = row.rule if row.rule in (FROZEN, FULL) else str(row.rank)
        curves.setdefault(row.task, {}).setdefault(name, []).append(row.test)
    return curves


def curve_figure(curves: Mapping[str, Curve]) -> Picture:
    """One panel a task: see `rank_curves`; ranks at equal steps, seeds as points, means as rings."""
    wide = 300.0
    draw = Picture(20 + len(curves) * (wide + 175), 300)
    for number, (task, curve) in enumerate(curves.items()):
        left = 75 + number * (wide + 175)
        ranks = [name for name in curve if name not in (FROZEN, FULL)]
        up = scale([error for errors in curve.values() for error in errors], 245, 36)
        panel = Panel(draw, Scale(-0.5, max(1, len(ranks)) - 0.5, left, left + wide), up)
        panel.frame(title=words(task), x="uniform rank of every layer", y="test error", x_ticks=list(enumerate(ranks)))
        for name, shown, colour in ((FROZEN, "frozen body", "c6"), (FULL, "full fine-tuning", "c2")):
            if errors := curve.get(name):
                draw.box(left, up(max(errors)), wide, up(min(errors)) - up(max(errors)), f"bar {colour}", shade=0.15)
                draw.line([(left, up(fmean(errors))), (left + wide, up(fmean(errors)))], f"dash {colour}",
                          f"{shown}: {fmean(errors):.4g}")  # fmt: skip
                draw.text(left + wide + 4, up(fmean(errors)) + 4, shown, f"small name {colour}")
        for place, rank in enumerate(ranks):
            for error in curve[rank]:
                panel.mark(place, error, "dot pale c0", f"rank {rank}: a seed, {error:.4g}", size=3)
        panel.line([(place, fmean(curve[rank])) for place, rank in enumerate(ranks)], "fine c0")
        for place, rank in enumerate(ranks):
            mean = fmean(curve[rank])
            panel.mark(place, mean, "ring c0", f"rank {rank}: mean {mean:.4g} of {len(curve[rank])} seeds")
    return draw


def forest_figure(claims: Sequence[Claim]) -> Picture:
    """One line a claim: its estimate and interval in per cent, against 0 and the margin of equivalence.

    Args:
        claims: with finite estimates; an end of an interval that is not finite leaves the plot.
    """
    names = [claim.claim if len(claim.claim) <= _LONGEST else f"{claim.claim[: _LONGEST - 1]}…" for claim in claims]
    left = 20 + LETTER * 0.92 * max(map(len, names))
    foot = 12.0 + 26 * len(claims)
    draw = Picture(left + 500, foot + 46)
    finite = [abs(value) for claim in claims for value in (claim.estimate, *_ends(claim)) if value is not None]
    limit = 1.15 * max(2 * MARGIN, *finite)
    panel = Panel(draw, Scale(-limit, limit, left, left + 390), Scale(len(claims) - 0.5, -0.5, foot, 12))
    draw.box(panel.across(-MARGIN), 12, panel.across(MARGIN) - panel.across(-MARGIN), foot - 12, "band")
    panel.frame(x="difference of the test error (%)", y_ticks=())
    draw.line([(panel.across(0), 12), (panel.across(0), foot)], "fine")
    for place, claim in enumerate(claims):
        colour, (low, high) = _COLOURS[claim.verdict], _ends(claim)
        y = panel.up(place)
        draw.text(left - 10, y + 4, names[place], at="end", say=claim.claim)
        starts, stops = (end if value is None else value for end, value in ((-limit, low), (limit, high)))
        draw.put("line", f"span {colour}", x1=panel.across(starts), x2=panel.across(stops), y1=y, y2=y)
        for end, value, arrow in ((-limit, low, "◂"), (limit, high, "▸")):
            if value is None:
                draw.text(panel.across(end), y + 4, arrow, f"name {colour}", at="middle")
        say = f"{claim.claim}: {claim.verdict}, {claim.estimate:+.3g} %{interval_text(low, high)}"
        panel.mark(claim.estimate, place, f"dot {colour}", say, size=5)
        draw.text(left + 400, y + 4, claim.verdict, f"name {colour}")
    return draw


def _ends(claim: Claim) -> tuple[float | None, float | None]:
    low, high = (value if math.isfinite(value) else None for value in (claim.low, claim.high))
    return low, high
