"""stage=plan against the trainable-parameter counts of the project's slides (Swin-B; tables 1 to 4)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from orca_rank import ranks
from orca_rank.artifacts.files import write_json
from orca_rank.stages import plan

DECODER_FROZEN = {1: 78_720, 2: 150_912, 4: 295_296, 8: 584_064, 16: 1_161_600, 64: 4_626_816, 1024: 73_931_136}
DECODER_TRAINED = {
    1: 3_371_904,
    2: 3_588_480,
    4: 4_021_632,
    8: 4_887_936,
    16: 6_620_544,
    64: 17_016_192,
    128: 30_877_056,
}
CASES = {
    "darcy_table2": DECODER_FROZEN,
    "darcy_table4": {r: DECODER_FROZEN[r] for r in (1, 64)},
    "darcy_table3": DECODER_TRAINED,
    "cifar100_table1": {1: 181_220},
}


def planned(config: DictConfig) -> dict:
    plan.run(config)
    return json.loads((Path(config.paths.runs) / config.run / "plan" / "plan.json").read_text())


@pytest.mark.parametrize(
    "experiment",
    ["darcy_table4", "cifar100_table1", *(pytest.param(f"darcy_table{n}", marks=pytest.mark.slow) for n in (2, 3))],
)
def test_counts_of_the_slides(composed: Callable[..., DictConfig], experiment: str) -> None:
    config = composed(f"experiment={experiment}", "backbone.pretrained=false", "stage=plan")
    for r, total in CASES[experiment].items():
        config.rank.r = r
        content = planned(config)
        counts = content["trainable_parameters"]
        assert counts["total"] == total
        assert counts["total"] == sum(counts[part] for part in ("adapter", "embedder", "predictor", "other"))
        assert counts["embedder"] == 6_528
        assert sum(layer["parameters"] for layer in content["layers"]) == counts["adapter"]
        assert {layer["rank"] for layer in content["layers"]} == {r}
        assert content["total_parameters"] > counts["total"]


@pytest.mark.parametrize(("qkv", "width"), [("fused", 4), ("separate", 6)])
def test_fused_and_separate_q_k_v_cost_what_they_cost(
    composed: Callable[..., DictConfig], qkv: str, width: int
) -> None:
    options = ("experiment=darcy_table3", "stage=plan", "layers.target=attn.qkv", "rank.r=2")
    content = planned(composed(*options, f"layers.qkv={qkv}"))
    per_rank = sum(width * blocks * d for blocks, d in ((2, 128), (2, 256), (18, 512), (2, 1024)))
    assert content["trainable_parameters"]["adapter"] == 2 * per_rank


@pytest.mark.parametrize("adapter", ["full", "linear_probe", "norm_only"])
def test_methods_without_ranks(composed: Callable[..., DictConfig], adapter: str) -> None:
    content = planned(composed("stage=plan", f"adapter={adapter}"))
    counts = content["trainable_parameters"]
    assert counts["adapter"] == 0
    assert (counts["other"] > 0) == (adapter != "linear_probe")
    assert counts["predictor"] > 0
    if adapter == "full":
        assert counts["total"] == content["total_parameters"]


def test_errors_name_the_option(composed: Callable[..., DictConfig]) -> None:
    with pytest.raises(ValueError, match="allow_above_full"):
        plan.run(composed("stage=plan", "rank=uniform", "rank.r=100000"))
    with pytest.raises(ValueError, match="matches none"):
        plan.run(composed("stage=plan", "rank=uniform", "rank.r=1", "layers.target=nothing"))
    with pytest.raises(ValueError, match="exactly one"):
        plan.run(composed("stage=plan", "rank=uniform", "budget.total_rank=100"))


def test_rules_side_by_side_at_one_budget(composed: Callable[..., DictConfig], capsys: pytest.CaptureFixture) -> None:
    content = planned(composed("stage=plan", "rank=uniform", "rank.r=null", "plan.rules=[uniform,proportional]"))
    assert set(content["rules"]) == {"uniform"}
    assert content["rules"]["uniform"] == {layer["name"]: layer["rank"] for layer in content["layers"]}
    assert "proportional is left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="unifrom"):
        plan.run(composed("stage=plan", "rank=uniform", "plan.rules=[unifrom]"))


def test_no_budget_is_for_rules_that_know_their_ranks(composed: Callable[..., DictConfig]) -> None:
    free = ("stage=plan", "budget.mean_rank=null", "budget.parameters=null", "plan.rules=[]")
    content = planned(composed(*free, "rank=uniform", "rank.r=3"))
    assert {layer["rank"] for layer in content["layers"]} == {3}
    with pytest.raises(ValueError, match="budget"):
        plan.run(composed(*free, "rank=uniform", "rank.r=null"))
    with pytest.raises(ValueError, match=r"budget\.r_max=5.*set one"):
        plan.run(composed(*free, "rank=uniform", "rank.r=3", "budget.r_max=5"))


def test_many_rules_are_shown_in_tables_that_fit(
    composed: Callable[..., DictConfig], capsys: pytest.CaptureFixture
) -> None:
    config = composed("stage=plan", "rank=uniform", "rank.r=null")
    layers = planned(config)["layers"]
    gap = {"mmd": {"value": 1.0, "low": 1.0, "high": 1.0, "p": 0.5}}
    spectrum = {"singular_values": [1.0], "null": 0.5, "energy": 1.0, "rank": 1}
    rest = {"weight": {"stable_rank": 1.0, "effective_rank": 1.0}, "importance": 1.0, "fisher": 1.0}
    rest |= {"intrinsic_dimension": {"input": 1.0, "output": 1.0}, "ot_map": spectrum, "gradient": spectrum}
    rest["whitened_gradient"] = spectrum
    records = [{**{k: layer[k] for k in ("name", "d_in", "d_out")}, "gap": gap, **rest} for layer in layers]
    write_json(Path(config.paths.runs) / config.run / "measure" / "layers.json", {"layers": records})
    names = [name for name in ranks.RULES if name not in ("activation", "theory", "posterior", "from_file")]
    config.plan.rules = names
    capsys.readouterr()
    plan.run(config)
    printed = capsys.readouterr().out
    for name in names:
        assert name in printed, name
    assert "…" not in printed


def test_before_measuring_a_rule_of_gaps_shows_the_uniform_plan_and_says_so(
    composed: Callable[..., DictConfig], capsys: pytest.CaptureFixture
) -> None:
    config = composed("stage=plan", "rank=proportional")
    content = planned(config)
    assert content["rule"] == "uniform"
    shown = " ".join(capsys.readouterr().out.split())
    assert "nothing is measured yet" in shown
    assert "stage=measure" in shown
    records = [{**layer, "gap": {}} for layer in content["layers"]]
    write_json(Path(config.paths.runs) / config.run / "measure" / "layers.json", {"layers": records})
    with pytest.raises(ValueError, match="stage=measure"):
        plan.run(config)


def test_brackets_in_a_folders_name_are_no_markup(
    composed: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("[x]", "[", "x]"):
        plan.run(composed("stage=plan", "rank=uniform", "rank.r=1", f"run='{name}/[bold]'"))
        assert f"{name}/[bold]/plan/plan.json" in "".join(capsys.readouterr().out.split())
    plan.run(composed("stage=plan", "rank=uniform", "rank.r=1", f"paths.runs='{tmp_path}/[/a]'"))
    assert (tmp_path / "[/a]/default/plan/plan.json").exists()
