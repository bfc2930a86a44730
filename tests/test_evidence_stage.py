"""stage=evidence on a tiny Swin: it runs to verdicts, goes on where it stopped, and refuses what confounds."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig
from shared import TINY_SWIN

from orca_rank.stages import evidence

TINY = (
    "stage=evidence",
    "evidence=none",
    "+data@evidence.tasks.digits.data=digits",
    "+rank@evidence.rules.shuffled=shuffled",
    "+rank@evidence.rules.trained=trained",
    "evidence.tasks.digits.data.train_limit=24",
    "evidence.tasks.digits.data.test_limit=16",
    "evidence.tasks.digits.data.batch_size=8",
    "evidence.budgets=[1]",
    "evidence.gate=[1,2]",
    "evidence.seeds=2",
    "evidence.gate_seeds=2",
    "evidence.rates=[1e-3,1e-2]",
    "evidence.steps=0",
    "evidence.permuted=[shuffled]",
    "evidence.permutations=2",
    "source=digits",
    *TINY_SWIN,
    "predictor=linear",
    "adapter.module.scaling=constant",
    "adapter.module.alpha=4",
    "gap.samples=16",
    "gap.bootstrap=0",
    "gap.permutations=0",
    "finetune.epochs=1",
    "finetune.warmup_epochs=0",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "evidence.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_it_goes_on_where_it_stopped_and_ends_with_verdicts(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether rank matters on two dozen digits is chance: here it always does, so that rules are compared.
    monkeypatch.setattr("orca_rank.evidence.protocol.Gate.matters", property(lambda gate: True))
    first = composed(*TINY, "evidence.most_points=5")
    folder = Path(first.paths.runs) / first.run / "evidence"
    evidence.run(first)
    assert len(rows(folder)) == 5
    config = composed(*TINY)
    evidence.run(config)
    found = rows(folder)
    # rates of the frozen body, two ranks and full; a curve of 4 × 2; uniform, two permutations and trained × 2 seeds
    assert len(found) == 4 * 2 + 4 * 2 + 4 * 2
    assert {"task", "rule", "budget", "seed", "val", "test"} <= set(found[0])
    for name in ("finetune", "measure"):  # rows without their fine-tunes go on too
        shutil.rmtree(folder / "digits" / name)
    again = next((folder / "digits" / "rows").glob("rules-trained-*-s1-*"))
    row = json.loads(again.read_text())["row"]
    again.unlink()
    evidence.run(config)
    assert json.loads(again.read_text())["row"] | {"seconds": 0} == row | {"seconds": 0}
    kept = [path.stat().st_mtime_ns for path in sorted(folder.rglob("metrics.json"))]
    evidence.run(config)
    assert [path.stat().st_mtime_ns for path in sorted(folder.rglob("metrics.json"))] == kept
    claims = json.loads((folder / "claims.json").read_text())
    assert (folder / "rank_curve.png").exists() and "trained beats uniform" in (folder / "README.md").read_text()
    assert any(claim["claim"].startswith("trained beats uniform") for claim in claims["claims"])
    assert "rank.r=" in claims["recommended"][0]
    parameters = {row["rule"]: int(row["parameters"]) for row in found if row["part"] == "rules"}
    assert parameters["uniform"] >= max(parameters["shuffled"], parameters["trained"])
    with pytest.raises(ValueError, match=r"other options.*epochs"):
        evidence.run(composed(*TINY, "finetune.epochs=2"))


def test_a_scale_that_follows_the_rank_is_refused(composed: Callable[..., DictConfig]) -> None:
    with pytest.raises(ValueError, match="scaling=constant"):
        evidence.run(composed(*TINY, "adapter.module.scaling=lora"))


def test_arms_take_their_adapter_or_alignment_over(composed: Callable[..., DictConfig]) -> None:
    arms = (
        "+adapter@evidence.arms.lora.adapter=lora",
        "+adapter@evidence.arms.moslora.adapter=moslora",
        "+align@evidence.arms.aligned.align=mmd",
        "+evidence.arms.aligned.embedder.aligned=true",
        "evidence.arms.aligned.align.epochs=1",
        "evidence.arms.aligned.align.held_out.samples=8",
        "evidence.arms.aligned.align.held_out.resamples=0",
        "evidence.tasks.digits.data.train_limit=48",
        "evidence.baseline=lora",
        "evidence.arms_rank=2",
        "~evidence.rules.shuffled",
        "~evidence.rules.trained",
        "evidence.permuted=[]",
        "evidence.rates=[3e-3,1e-2]",
    )
    config = composed(*TINY, *arms, "evidence.budgets=[]", "evidence.gate=[]")
    evidence.run(config)
    folder = Path(config.paths.runs) / config.run / "evidence"
    found = rows(folder)
    assert len(found) == 2 + 3 * 2 + 3 * 2
    parameters = {row["rule"]: int(row["parameters"]) for row in found if row["part"] == "arms"}
    assert parameters["moslora"] > parameters["lora"] == parameters["aligned"]  # the mixers
    claims = json.loads((folder / "claims.json").read_text())["claims"]
    assert [claim["claim"].split(" at ")[0] for claim in claims] == ["moslora beats lora", "aligned beats lora"]
    assert (folder / "digits-aligned-s1" / "align" / "embedder.safetensors").exists()
    with pytest.raises(ValueError, match=r"evidence\.baseline=pissa: must be the arm.*lora, moslora, aligned"):
        evidence.run(composed(*TINY, *arms, "evidence.baseline=pissa"))
