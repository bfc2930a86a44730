"""What an evidence run says before its fine-tunes, and writes after them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orca_rank.artifacts.files import atomic, read_record, write_json
from orca_rank.evidence.claims import claims
from orca_rank.evidence.compare import half_width
from orca_rank.evidence.curves import recommended
from orca_rank.evidence.points import UNIFORM, Row
from orca_rank.evidence.protocol import Protocol, asked_for, most, rank_matters
from orca_rank.evidence.verdicts import MARGIN
from orca_rank.report.claims import markdown, rank_curves
from orca_rank.report.plots import curve_figure, png
from orca_rank.stages.planning import read_layers

console = Console(highlight=False, markup=False)
SPREAD = 2.1  # per cent of the error: the paired spread over seeds in runs of this size, before this one has its own
CHECK = (
    "Scale α/√r (adapter.module.scaling=rslora): layers of different ranks also have different scales, so this is a "
    "check of the verdicts at one scale and none of its own."
)


def announce(protocol: Protocol) -> None:
    """What the run can tell apart, before any work: half the 95 % interval of a paired difference."""
    seeds = sorted({protocol.seeds_of(rule) for rule in (UNIFORM, *protocol.rules)})
    widths = ", ".join(f"±{half_width(SPREAD, count):.1f} % with {count} seeds" for count in seeds)
    console.print(
        f"{len(protocol.tasks)} tasks, {len(protocol.rules)} rules, {len(protocol.arms)} arms, at most "
        f"{most(protocol)} fine-tunes; on one task a difference will be known to {widths} if seeds spread by "
        f"{SPREAD} % (equivalence is asked within ±{MARGIN:g} %)"
    )


def gaps_of(folder: Path, protocol: Protocol, metric: str) -> dict[str, float]:
    """Task -> median calibrated gap over its layers; of rows that came without their measurement, as known before."""
    path, known = folder / "claims.json", {}
    if path.exists():
        known = read_record(path, "stage=evidence", lambda payload: dict(payload["gaps"]))
    for task in protocol.tasks:
        measured = folder / task / "measure" / "layers.json"
        if measured.exists():
            known[task] = median(layer.gap[metric].value for layer in read_layers(measured))
    return {task: known[task] for task in protocol.tasks if task in known}


def conclude(folder: Path, protocol: Protocol, rows: Sequence[Row], metric: str, notes: Sequence[str] = ()) -> None:
    """Write the verdicts, and print them. `notes` are what a reader must know of all of them."""
    rows, gaps = asked_for(protocol, rows), gaps_of(folder, protocol, metric)
    found = list(claims(protocol, rows, gaps))
    answers = [*notes]
    for task in protocol.tasks:
        try:
            rank_matters(protocol, rows, task)
        except ValueError:
            continue  # its curve has not been run yet
        answers.append(recommended(protocol, rows, task))
    payload: dict[str, Any] = {
        "claims": [claim.to_dict() for claim in found],
        "recommended": answers,
        "gaps": gaps,
        "runs": len(rows),
        "seconds": math.fsum(row.seconds for row in rows),
    }
    write_json(folder / "claims.json", payload)
    with atomic(folder / "README.md") as temporary:
        temporary.write_text(markdown(found, rows, answers))
    if curves := rank_curves(rows):
        with atomic(folder / "rank_curve.png") as temporary:
            temporary.write_bytes(png(curve_figure(curves)))
    table = Table("claim", "verdict", "figure", "95 % interval", "runs")
    for claim in found:
        table.add_row(
            escape(claim.claim),
            claim.verdict,
            f"{claim.estimate:+.2f} {claim.unit}" if math.isfinite(claim.estimate) else "",
            f"{claim.low:+.2f} to {claim.high:+.2f}" if math.isfinite(claim.low) else "",
            str(claim.runs),
        )
    console.print(table if found else "no claim can be decided yet")
    for answer in answers:
        console.print(answer, soft_wrap=True)
    console.print(f"written to {folder / 'evidence.csv'} and {folder / 'claims.json'}", soft_wrap=True)
