"""What rank rules of the evidence read, made once a task: measurements, a learned update, held-out losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from orca_rank.artifacts.files import read_json
from orca_rank.evidence.points import FROZEN, UNIFORM, Point, Row
from orca_rank.evidence.protocol import Protocol, asked_for
from orca_rank.stages import finetune, measure, rank_losses
from orca_rank.stages.evidence_points import configured, for_task, nested_config, reads_losses


def is_donor(protocol: Protocol, point: Point) -> bool:
    """Whether rank=trained reads what this point learns: the first run of the curve's largest uniform rank."""
    return (point.part, point.rule, point.rank, point.seed) == ("gate", UNIFORM, max(protocol.gate, default=0), 0)


def make_read(
    config: DictConfig, folder: Path, task: str, cost: int, protocol: Protocol, rows: Sequence[Row], rules: bool = True
) -> Point | None:
    """Make what is not there yet: the update that the largest uniform rank learned, the held-out losses of a nested
    adapter of that rank and rate where a rule reads them, and gaps and spectra with the predictor of the frozen body's
    first run (through a random predictor gradients see noise).

    Args:
        folder: of the evidence. cost: see `cost_of_one_rank`. rules: without them the gaps alone are wanted.

    Returns:
        The fine-tune whose update, or whose nested twin's losses, rules read; None without rules.

    Rows may have come without their fine-tunes, as those of the repository do: the two are then run again.
    """
    curve = [row for row in asked_for(protocol, rows) if (row.part, row.task) == ("gate", task) and not row.diverged]
    curve.sort(key=lambda row: row.seed)
    frozen = next(row.point for row in curve if row.rule == FROZEN)
    largest = (row.point for row in curve if (row.rule, row.rank) == (UNIFORM, max(protocol.gate)))
    donor = next(largest, None) if rules else None
    for point, result in ((frozen, "metrics.json"), *([(donor, "update.safetensors")] if donor else [])):
        if not (folder / task / "finetune" / point.name / result).exists():
            finetune.run(configured(config, folder, point, cost, keep_update=point == donor))
    if donor and any(reads_losses(config, rule) for rule in protocol.rules):
        nested = nested_config(config, folder, donor, cost)
        if not (folder / task / "finetune" / nested.finetune.tag / "rank_losses.safetensors").exists():
            finetune.run(nested)
            rank_losses.run(nested)
    measured, fitted = folder / task / "measure" / "layers.json", folder / task / "finetune" / frozen.name
    known = measured.exists()
    if known:  # but through a predictor of rates that are no longer the best, where a grid has grown
        read = (read_json(measured, "stage=evidence").get("config") or {}).get("measure") or {}
        known = Path(str(read.get("fitted"))).name == fitted.name
    if not known:
        measure.run(for_task(config, folder, task, {"measure": {"fitted": str(fitted)}, "force": measured.exists()}))
    return donor
