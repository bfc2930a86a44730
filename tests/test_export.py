"""stage=export: a LoraConfig of the run's plan, both counts of parameters, and a model card."""

import json

import pytest
import torch
from shared import TINY_SWIN

from orca_rank import RankPlan, load_peft
from orca_rank.artifacts.provenance import plain
from orca_rank.backbone import create_timm
from orca_rank.stages import export, finetune, plan
from orca_rank.stages.export import counts, lora_config

peft = pytest.importorskip("peft", reason="needs the extra orca_rank[peft]")
OVER_RANK = ("adapter.module.scaling=lora", "adapter.module.alpha=16")
SMALL = (*TINY_SWIN, "data=digits", "embedder.aligned=false", "rank=uniform", "rank.r=2")


def body(config) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_timm(plain(config.backbone))


def adapted(model: torch.nn.Module, config: "peft.LoraConfig") -> dict[str, tuple[int, float]]:
    """Layer -> rank and scale of what PEFT adapts."""
    theirs = peft.get_peft_model(model, config)
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.filterwarnings("ignore")  # PEFT and timm speak about their own future
@pytest.mark.parametrize("qkv", ["fused", "separate"])
def test_the_file_is_a_lora_config_with_the_planned_ranks(composed, tmp_path, capsys, qkv):
    config = composed("stage=export", *SMALL, f"layers.qkv={qkv}", *OVER_RANK)
    with pytest.raises(FileNotFoundError, match="stage=plan"):
        export.run(config)
    plan.run(config)
    capsys.readouterr()
    export.run(config)
    printed = capsys.readouterr().out
    folder = tmp_path / "runs/default/export"
    written = peft.LoraConfig.from_pretrained(folder)
    assert not written.inference_mode
    found = adapted(body(config), written)
    whole, parts = (2, 8.0), (6, 8.0)  # alpha 16 over rank 2; of q, k and v together 48 over 6
    assert found == {name: parts if qkv == "separate" and name.endswith("qkv") else whole for name in found}
    assert len(found) == 8
    model = peft.get_peft_model(body(config), written)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    planned = json.loads((tmp_path / "runs/default/plan/plan.json").read_text())["trainable_parameters"]["adapter"]
    assert f"{trained:,}" in printed and f"{planned:,}" in printed
    assert (trained == planned) == (qkv == "fused")
    assert f'config = LoraConfig.from_pretrained("{folder}")' in printed.splitlines()
    assert "from peft import LoraConfig, get_peft_model\n" in printed


def test_scales_are_the_runs_own_where_peft_can_say_them():
    ranks = RankPlan({"a.qkv.q": 1, "a.qkv.v": 3, "b": 2}, shapes=dict.fromkeys(("a.qkv.q", "a.qkv.v", "b"), (4, 4)))
    lora = {"_target_": export.LORA, "alpha": 16, "init": "kaiming", "dropout": 0.1}
    written, notes = lora_config(ranks, {"name": "lora", "module": {**lora, "scaling": "constant", "alpha": 3}})
    assert written["alpha_pattern"] == {r"^a\.qkv": 12.0, "^b": 6.0}
    assert (written["lora_dropout"], len(notes)) == (0.1, 1)
    written, notes = lora_config(ranks, {"name": "lora", "module": {**lora, "scaling": "lora"}})
    assert written["alpha_pattern"] == {r"^a\.qkv": 4, "^b": 2}
    assert "different ranks" in notes[0] and "scale is 1" in notes[1]
    _, notes = lora_config(ranks, {"name": "dora", "module": {"_target_": "orca_rank.adapters.PeftAdapter"}})
    assert "adapter=dora is more" in notes[-1]
    # q and v apart: 4 · 8 and 2 · 8; as one fused (4 -> 12) matrix of rank 4: 4 · 16 and 2 · 8
    assert counts(ranks).startswith(
        "planned are 48 adapter parameters, PEFT trains 80: the plan adapts q, k and v apart"
    )


@pytest.mark.filterwarnings("ignore")
def test_a_model_card_stands_beside_the_adapter(composed, tmp_path):
    options = (*SMALL, "data.train_limit=16", "finetune.epochs=1", "trainer.enable_progress_bar=false")
    config = composed("stage=export", *options)
    plan.run(config)
    finetune.run(config)
    export.run(config)
    (folder,) = (tmp_path / "runs/default/finetune").glob("*/adapter")
    card = (folder / "README.md").read_text()
    metrics = json.loads((folder.parent / "metrics.json").read_text())
    _, header, text = card.split("---\n", 2)
    assert header.splitlines()[0] == 'library_name: "peft"'
    for words in (f"| test/error | {metrics['test/error']:.6g} |", "classification: inputs 1 × 8 × 8, outputs 10",
                  "orca_rank.data.digits.Digits", f"adapter {metrics['trainable_parameters']['adapter']:,}",
                  "rule uniform: 12 of 12 layers adapted", "python -m orca_rank stage=finetune\n"):  # fmt: skip
        assert words in text, words
    load_peft(body(config), folder)  # what else lies in the folder does not matter
    export.run(composed("stage=export", *options, "finetune.epochs=2"))
    assert "with the options below" in (folder / "README.md").read_text()
    with pytest.raises(FileNotFoundError, match="nothing: run"):
        export.run(composed("stage=export", *options, "finetune.tag=nothing"))


def test_a_plan_without_adapters_is_refused(composed):
    config = composed("stage=export", *SMALL, "adapter=full")
    plan.run(config)
    with pytest.raises(ValueError, match="adapts no layer"):
        export.run(config)
