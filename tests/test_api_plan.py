"""orca_rank.plan, and the ranks it gives on a user's own model, in PEFT and here."""

import pytest
import torch
from torch import nn

import orca_rank as orca
from orca_rank.adapters import adapters
from orca_rank.ranks import RULES, MissingMeasurement

timm = pytest.importorskip("timm")
X = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FEW = {"splits": 2, "bootstrap": 0, "permutations": 9, "metrics": ["mmd"]}


def swin() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(1, 2)
    )


def hugging_face(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "vit":
        return transformers.ViTForImageClassification(
            transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                   image_size=32, patch_size=8)
        )  # fmt: skip
    return transformers.SwinModel(
        transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    )


MODELS = {
    "timm, fused qkv": (swin, r"attn\.(qkv|proj)$|mlp\.fc[12]$"),
    "transformers ViT": (lambda: hugging_face("vit"), r"attention\.|mlp|intermediate|output\.dense"),
    "transformers Swin": (lambda: hugging_face("swin"), r"attention\.self\.(query|key|value)|q_proj|k_proj|v_proj"),
}


@pytest.mark.filterwarnings("ignore")  # PEFT and transformers speak about their own future
@pytest.mark.parametrize("kind", MODELS)
def test_peft_and_inject_adapt_the_users_model_with_exactly_the_planned_ranks(kind):
    peft = pytest.importorskip("peft")
    make, pattern = MODELS[kind]
    batches = X if kind.startswith("timm") else [{"pixel_values": X, "labels": torch.arange(16) % 2}]
    gaps = orca.measure(
        make(), batches, [{"pixel_values": X + 1}] if not kind.startswith("timm") else X + 1, pattern, **FEW
    )
    plan = orca.plan(gaps, "proportional", total_rank=len(gaps) // 2)
    assert 0 in plan.ranks.values() and max(plan.ranks.values()) > 0  # a layer without an adapter among them
    planned = {name: rank for name, rank in plan.ranks.items() if rank}
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**plan.to_peft()))
    found = {
        name.removeprefix("base_model.model."): module.lora_A["default"].weight.shape[0]
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert found == planned
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trained == plan.parameters(gaps) > 0
    mine = make()
    orca.inject(mine, plan)
    assert {name: adapter.rank for name, adapter in adapters(mine).items()} == planned
    assert sum(p.numel() for p in mine.parameters() if p.requires_grad) == trained


@pytest.mark.parametrize("rule", [*RULES, "only"])
def test_rules_by_name(rule):
    layers = orca.layers(swin(), "mlp|qkv", qkv="separate")
    options = {"pattern": "mlp"} if rule == "only" else {}
    if rule in ("uniform", "recommended", "only"):
        plan = orca.plan(layers, rule, total_rank=12, **options)
        assert plan.total_rank == 12
        assert plan.shapes.keys() == plan.ranks.keys()
        assert f"rule {rule}" in repr(plan) and "parameters" in repr(plan)
    else:
        with pytest.raises(MissingMeasurement, match=r"orca_rank\.measure\(\.\.\., metrics"):
            orca.plan(layers, rule, total_rank=12)


def test_a_rule_of_ones_own():
    layers = orca.layers(swin(), "mlp")

    def first(layers, budget, *, r=1):
        return orca.RankPlan({layer.name: r * (layer is layers[0]) for layer in layers}, "first")

    assert [*orca.plan(layers, first, r=3).ranks.values()] == [3, *[0] * (len(layers) - 1)]
    with pytest.raises(ValueError, match=r"rank rule first: .*gamma"):
        orca.plan(layers, first, gamma=1)
    with pytest.raises(TypeError, match="this one gave a dict"):
        orca.plan(layers, lambda layers, budget: {})
    with pytest.raises(ValueError, match="says nothing of"):
        orca.plan(layers, lambda layers, budget: orca.RankPlan({layers[0].name: 1}))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rule": "recomended"}, "no rank rule 'recomended'; there are uniform, recommended"),
        ({"rule": "uniform", "gamma": 2}, "rank rule uniform: .*gamma"),
        ({"rule": "uniform"}, "rank rule uniform spends a budget"),
        ({"total_rank": 3, "mean_rank": 2}, "exactly one of mean_rank, total_rank, parameters"),
        ({"r_max": 3}, "bound the ranks of a budget"),
        ({"total_rank": 10**6}, "full rank of all"),
    ],
)
def test_options_of_a_plan_are_checked(given, words):
    with pytest.raises(ValueError, match=words):
        orca.plan(orca.layers(swin(), "mlp"), **given)
    assert orca.plan(orca.layers(swin(), "mlp"))["layers.0.blocks.0.mlp.fc1"] == 8  # 16, or its full rank
