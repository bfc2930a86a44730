"""stage=rank_curve: every rank of one nested fine-tune is the fine-tune cut to it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import run_folders
import torch
from omegaconf import DictConfig
from shared import TINY_FINETUNE as TINY

from orca_rank import load
from orca_rank.adapters import adapters, cut
from orca_rank.artifacts.files import write_csv
from orca_rank.build import build
from orca_rank.report.page import Page
from orca_rank.report.rank_curve import nested_curves, separate_runs
from orca_rank.report.run_folder import RunFolder, read_tunes
from orca_rank.stages import finetune, rank_curve, report


def test_a_row_is_the_model_cut_to_its_rank(composed: Callable[..., DictConfig]) -> None:
    config = composed(*TINY, "rank=uniform", "rank.r=3", "adapter=matryoshka", "finetune.tag=nested")
    finetune.run(config)
    finetune.run(composed(*TINY, "rank=uniform", "rank.r=2", "finetune.tag=alone"))
    with pytest.raises(ValueError, match="adapter=matryoshka or adapter=dylora"):
        rank_curve.run(composed(*TINY, "finetune.tag=alone"))
    with pytest.raises(ValueError, match=r"fine-tuned on other data \(data\.split_seed: 0 -> 1\)"):
        rank_curve.run(composed(*TINY, "finetune.tag=nested", "data.split_seed=1"))
    rank_curve.run(config)
    run = Path(config.paths.runs) / config.run
    with open(run / "finetune/nested/rank_curve.csv", newline="") as stream:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert [row["scale"] for row in rows] == pytest.approx([4, 4 / 2**0.5, 4 / 3**0.5])  # rslora
    data = build(config.data)
    for row in rows:
        fitted = load(run, tag="nested")
        cut(fitted.model.body, dict.fromkeys(adapters(fitted.model.body), int(row["rank"])))
        kept = sum(p.numel() for adapter in adapters(fitted.model.body).values() for p in adapter.parameters())
        assert row["parameters"] == kept
        for part in ("val", "test"):
            with torch.inference_mode():
                wrong = [fitted.task.metric(fitted.model(x), y) for x, y in data.loader(part)]
            assert row[part] == pytest.approx(float(torch.cat(wrong).mean()), abs=1e-6)
    report.run(config)
    page = (run / "report.html").read_text()
    assert "Every rank of one adapter" in page and "nested: rank" in page
    assert (run / "finetune/nested/rank_curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_ring_is_the_best_on_validation_of_those_trained_alike(tmp_path: Path) -> None:
    long, short = {"finetune": {"epochs": 8}}, {"finetune": {"epochs": 2}}
    here, there = {"_target_": "a.b.Far", "root": "here"}, {"_target_": "a.b.Far", "root": "there", "train": 5}
    run_folders.finetune(tmp_path, "nested", 0.75, options={**long, "adapter": {"name": "dylora"}}, data=here)
    for tag, val, seed, options, data in (
        ("high rate", 0.5, 0, {**long, "optimizer": {"lr": 1.0}}, here),
        ("low rate", 0.25, 0, {**long, "optimizer": {"lr": 0.1}}, {**here, "root": "elsewhere"}),
        ("other seed", 0.375, 1, long, here),
        ("shorter", 0.125, 0, short, here),
        ("other data", 0.0625, 0, long, there),
    ):
        run_folders.finetune(tmp_path, tag, val, seed=seed, options=options, data=data)
    rows = [{"rank": rank, "parameters": 9, "val": 1 / rank, "test": 1 / rank} for rank in (2, 4)]
    write_csv(tmp_path / "finetune/nested/rank_curve.csv", rows)
    tunes = read_tunes(RunFolder(tmp_path, "")).tunes
    nested = [tune for tune in tunes if tune.tag == "nested"]
    assert separate_runs(tunes, nested) == [(4, 0.25 + 0.0625), (4, 0.375 + 0.0625)]
    page = Page("a run", "rank curve")
    nested_curves(page, tunes)
    assert "the one with the lowest validation metric" in page.html()
