"""Files: PEFT loads what we write with the same outputs, we load what PEFT writes, and nothing is ignored."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import move_trained
from torch import nn

from orca_rank.adapters import LoRA, adapter_state_dict, adapters, inject, load_peft, save_peft
from orca_rank.ranks import RankPlan

peft = pytest.importorskip("peft", reason="needs the extra orca_rank[peft]")
timm = pytest.importorskip("timm")

WEIGHTS = "adapter_model.safetensors"
PLANS = {
    "fused": {"layers.0.blocks.0.attn.qkv": 4, "layers.0.blocks.0.mlp.fc1": 2, "layers.1.blocks.1.attn.proj": 4},
    "separate": {f"layers.0.blocks.1.attn.qkv.{part}": 3 for part in "qkv"} | {"layers.1.blocks.0.mlp.fc2": 3},
    "uneven": {"layers.0.blocks.1.attn.qkv.q": 1, "layers.0.blocks.1.attn.qkv.v": 5, "layers.0.blocks.0.mlp.fc2": 2},
}


def swin() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=28, embed_dim=12, depths=(2, 2), num_heads=(2, 2), num_classes=3
    ).eval()


def adapted_swin(plan, **options):
    model = swin()
    inject(model, plan, partial(LoRA, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.normal_(0, 0.3)
    return model.eval()


X = torch.linspace(-1, 1, 2 * 3 * 28 * 28).reshape(2, 3, 28, 28)


OPTIONS = [
    {},
    {"scaling": "rslora", "alpha": 5},
    {"scaling": "constant", "alpha": 2},
    {"init": "symmetric"},
    {"init": "pissa"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.filterwarnings("ignore")  # PEFT and timm speak about their own future
def test_peft_gives_the_same_outputs(plan, options, tmp_path):
    model = adapted_swin(PLANS[plan], **options)
    save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(swin(), tmp_path).eval()
    assert torch.allclose(theirs(X), model(X), atol=2e-6)
    assert not torch.allclose(swin()(X), model(X), atol=1e-3)


def test_a_constant_scale_is_written_as_the_alpha_of_each_rank(tmp_path):
    save_peft(adapted_swin(PLANS["fused"], scaling="constant", alpha=3), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 12, False)
    assert config["alpha_pattern"] == {r"^layers\.0\.blocks\.0\.mlp\.fc1": 6}  # of rank 2


@pytest.mark.parametrize("options", [{}, {"scaling": "rslora", "alpha": 5, "dropout": 0.1}, OPTIONS[2]])
@pytest.mark.parametrize("plan", PLANS)
def test_the_way_back_into_a_bare_model(plan, options, tmp_path):
    model = adapted_swin(PLANS[plan], **options)
    save_peft(model, tmp_path)
    other = swin()
    found = load_peft(other, tmp_path)
    assert {name: a.rank for name, a in found.items()} == PLANS[plan]
    assert torch.allclose(other(X), model(X), atol=2e-6)
    again = adapted_swin(PLANS[plan], **options)
    torch.nn.init.zeros_(next(iter(adapters(again).values())).lora_B)
    load_peft(again, tmp_path)
    assert torch.allclose(again(X), model(X), atol=2e-6)


@pytest.mark.filterwarnings("ignore")
def test_reads_what_peft_writes(tmp_path):
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["qkv", "fc1"], rank_pattern={"fc1": 2}, alpha_pattern={"qkv": 5},
        modules_to_save=["head.fc"],
    )  # fmt: skip
    theirs = peft.get_peft_model(swin(), config).eval()
    move_trained(theirs)
    theirs.save_pretrained(tmp_path)
    model = swin()
    found = load_peft(model, tmp_path)
    assert {a.rank for a in found.values()} == {2, 3} and len(found) == 8
    assert torch.allclose(model(X), theirs(X), atol=2e-6)


@pytest.mark.filterwarnings("ignore")
def test_whole_modules_travel_along(tmp_path):
    model = adapted_swin(PLANS["fused"])
    with torch.no_grad():
        model.head.fc.weight.add_(1.0)
    save_peft(model, tmp_path, modules_to_save=["head.fc"])
    other = swin()
    load_peft(other, tmp_path)
    theirs = peft.PeftModel.from_pretrained(swin(), tmp_path).eval()
    assert torch.allclose(other(X), model(X), atol=2e-6) and torch.allclose(theirs(X), model(X), atol=2e-6)
    with pytest.raises(KeyError, match="nothing"):
        save_peft(model, tmp_path, modules_to_save=["nothing"])


def written(tmp_path, **changes):
    """A file of ours with another adapter_config.json."""
    save_peft(adapted_swin(PLANS["fused"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "replaces W₀"),
        ({"init_lora_weights": "pissa_niter_4"}, "replaces W₀"),
        ({"init_lora_weights": "olora"}, "replaces W₀"),
        ({"init_lora_weights": "loftq"}, "replaces W₀"),
        ({"init_lora_weights": "lora_ga"}, "replaces W₀"),
        ({"init_lora_weights": "a later one"}, "not known here"),
        ({"bias": "all"}, "trained biases"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"lora_bias": True}, "a bias of its own"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"use_dora": True}, "magnitudes"),
        ({"use_qalora": True}, "pools the input"),
        ({"target_parameters": ["w"]}, "no layer"),
        ({"layer_replication": [[0, 1]]}, "repeats layers"),
        ({"trainable_token_indices": [1]}, "embedding"),
        ({"kasa_config": {"beta": 1}}, "not known here"),
        ({"a_key_of_tomorrow": 3}, "not known here"),
    ],
)
def test_a_setting_that_changes_what_tensors_mean_is_refused_with_its_reason(changes, reason, tmp_path):
    model = swin()
    with pytest.raises(ValueError, match=f"sets {next(iter(changes))}=.*{reason}"):
        load_peft(model, written(tmp_path, **changes))
    assert not adapters(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_to_transform": [0, 1], "layers_pattern": "blocks"},
        {"init_lora_weights": "gaussian", "peft_version": "0.99", "runtime_config": {"ephemeral_gpu_offload": False}},
        {"exclude_modules": ["head"], "eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
        {"a_key_of_tomorrow": None, "another": False},
    ],
)
def test_a_setting_without_influence_is_read(changes, tmp_path):
    model = swin()
    load_peft(model, written(tmp_path, **changes))
    assert torch.equal(model(X), adapted_swin(PLANS["fused"])(X))


def test_settings_that_a_file_leaves_out_are_pefts_own(tmp_path):
    folder = written(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["lora_alpha"], config["bias"], config["use_rslora"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert {adapter.alpha for adapter in load_peft(swin(), folder).values()} == {8.0}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_starts_by_moving_the_base_is_refused(init, tmp_path):
    theirs = peft.get_peft_model(swin(), peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=init))
    move_trained(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'"):
        load_peft(swin(), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_layers_chosen_by_number_and_modules_to_save_by_suffix(tmp_path):
    config = peft.LoraConfig(
        r=2, target_modules=["qkv"], layers_to_transform=[1], layers_pattern="blocks", modules_to_save=["fc", "norm1"]
    )
    theirs = peft.get_peft_model(swin(), config).eval()
    move_trained(theirs)
    theirs.save_pretrained(tmp_path)
    model = swin()
    found = load_peft(model, tmp_path)
    assert sorted(found) == ["layers.0.blocks.1.attn.qkv", "layers.1.blocks.1.attn.qkv"]
    assert torch.allclose(model(X), theirs(X), atol=2e-6)


class Nested(nn.Module):
    """Two layers whose names end alike, which suffix matching confuses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"fc": nn.Linear(4, 4)})

    def forward(self, x):
        return self.inner["fc"](self.fc(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("plan", [{"fc": 1}, {"fc": 1, "inner.fc": 3}, {"inner.fc": 2}])
def test_names_that_end_alike_stay_apart(plan, tmp_path):
    torch.manual_seed(0)
    model = Nested()
    bare = {name: value.clone() for name, value in model.state_dict().items()}
    inject(model, plan)
    for adapter in adapters(model).values():
        nn.init.normal_(adapter.lora_B)
    save_peft(model, tmp_path)
    theirs = Nested()
    theirs.load_state_dict(bare)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    x = torch.randn(3, 4)
    assert torch.allclose(theirs(x), model(x), atol=1e-6)


def test_all_zero_plan_saves_and_loads(tmp_path):
    model = swin()
    inject(model, {"layers.0.blocks.0.attn.qkv": 0})
    save_peft(model, tmp_path)
    other = swin()
    assert load_peft(other, tmp_path) == {}
    assert torch.equal(other(X), model(X))


def test_the_file_is_no_larger_than_its_parameters(tmp_path):
    model = adapted_swin({name: 8 for name, m in swin().named_modules() if name.endswith(("qkv", "proj", "fc1", "fc2"))
                          and isinstance(m, nn.Linear)})  # fmt: skip
    save_peft(model, tmp_path)
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert (tmp_path / WEIGHTS).stat().st_size <= 1.02 * trainable + 4096
    assert trainable == sum(v.numel() * 4 for v in adapter_state_dict(model).values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", WEIGHTS]


def test_strict_reading(tmp_path):
    save_peft(adapted_swin(PLANS["fused"]), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    a = next(key for key in tensors if "lora_A" in key)
    cases = [
        ({k: v for k, v in tensors.items() if k != a}, KeyError, "only lora_B"),
        ({**tensors, "base_model.model.more": tensors[a].clone()}, KeyError, "unexpected"),
        ({**tensors, a: tensors[a][:, :-1].contiguous()}, ValueError, "expected"),
        ({k.replace("mlp.fc1", "mlp.fc9"): v for k, v in tensors.items()}, KeyError, "no Linear"),
    ]
    for given, error, message in cases:
        save_file(given, tmp_path / WEIGHTS, {"format": "pt"})
        model = swin()
        with pytest.raises(error, match=message):
            load_peft(model, tmp_path)
        assert not adapters(model)
    with pytest.raises(FileNotFoundError, match="save_peft"):
        load_peft(swin(), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 9}, "has rank .* says 9"),
        ({"r": None}, "r=None: expected a whole number"),
        ({"lora_alpha": None}, "lora_alpha=None: expected a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"use_rslora": "false"}, "use_rslora='false': expected true or false"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern=.*regular expressions"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"fc1": 7, "nothing": 1}}, "two of its patterns reach one layer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_configuration_that_is_not_its_tensors_is_refused(tmp_path, change, message):
    save_peft(adapted_swin(PLANS["fused"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = {**json.loads(path.read_text()), "rank_pattern": {}}
    tensors = {name: value for name, value in load_file(tmp_path / WEIGHTS).items() if ".mlp.fc1." in name}
    config["r"] = len(next(value for name, value in tensors.items() if "lora_A" in name))
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    path.write_text(json.dumps(config))
    load_peft(swin(), tmp_path)
    path.write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load_peft(swin(), tmp_path)


def test_tensors_that_mean_nothing_are_refused(tmp_path):
    save_peft(adapted_swin(PLANS["fused"]), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for change in (lambda v: v * torch.nan, lambda v: v / 0, lambda v: v.to(torch.int32)):
        save_file({name: change(value) for name, value in tensors.items()}, tmp_path / WEIGHTS, {"format": "pt"})
        with pytest.raises(ValueError, match="NaN, infinity or no fractions"):
            load_peft(swin(), tmp_path)
    save_file({}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="holds no LoRA"):
        load_peft(swin(), tmp_path)


def test_other_layers_or_methods_are_refused(tmp_path):
    save_peft(adapted_swin(PLANS["fused"]), tmp_path)
    with pytest.raises(KeyError, match="different layers"):
        load_peft(adapted_swin(PLANS["separate"]), tmp_path)
    wider = {name: rank + 1 for name, rank in PLANS["fused"].items()}
    with pytest.raises(ValueError, match="rank"):
        load_peft(adapted_swin(wider), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, message in (({"peft_type": "LOHA"}, "LOHA"), ({"use_dora": True}, "use_dora")):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_peft(swin(), tmp_path)


def found_by_peft(model, plan, alpha=None):
    """Layer -> (rank, scale) of what PEFT adapts."""
    theirs = peft.get_peft_model(model, peft.LoraConfig(**RankPlan(plan).to_peft(alpha)))
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


class Alike(Nested):
    """A pattern `inner.fc` with a bare dot would take `innerxfc`."""

    def __init__(self) -> None:
        super().__init__()
        self.innerxfc = nn.Linear(4, 4)


@pytest.mark.parametrize(
    "plan",
    [
        {"fc": 1, "innerxfc": 2, "inner.fc": 3},
        {"fc": 1, "inner.fc": 0},
        {"fc": 2, "innerxfc": 0},
        {"inner.fc": 3, "innerxfc": 0},
        {"innerxfc": 1},
    ],
)
def test_a_plan_in_peft_adapts_its_layers_and_no_other(plan):
    assert found_by_peft(Alike(), plan) == {name: (rank, 1.0) for name, rank in plan.items() if rank}
    assert found_by_peft(Alike(), plan, alpha=12) == {name: (rank, 12 / rank) for name, rank in plan.items() if rank}


@pytest.mark.filterwarnings("ignore:Importing from timm")
def test_separate_q_k_v_of_a_plan_become_one_adapter_of_the_fused_matrix():
    first, second = "layers.0.blocks.0.attn.qkv", "layers.1.blocks.0.attn.qkv"
    plan = {f"{first}.{part}": rank for part, rank in zip("qkv", (2, 0, 3), strict=True)} | {f"{second}.k": 0}
    assert found_by_peft(swin(), {**plan, "layers.0.blocks.0.mlp.fc1": 4}) == {
        first: (5, 1.0),
        "layers.0.blocks.0.mlp.fc1": (4, 1.0),
    }
    with pytest.raises(ValueError, match=r"ranks \[2, 3\].*alpha=8.*save_peft"):
        RankPlan(plan).to_peft(alpha=8)
    even = {f"{first}.{part}": 2 for part in "qkv"} | {f"{second}.v": 4}
    assert found_by_peft(swin(), even, alpha=8) == {first: (6, 4.0), second: (4, 2.0)}
    with pytest.raises(ValueError, match="both"):
        RankPlan({first: 1, f"{first}.q": 1}).to_peft()
    with pytest.raises(ValueError, match="every rank is 0"):
        RankPlan({first: 0}).to_peft()
