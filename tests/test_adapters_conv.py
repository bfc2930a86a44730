"""LoRA of a convolution: the matrix algebra of LoRA, PEFT's files, and clear refusals."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from shared import move_trained
from torch import nn

from orca_rank.adapters import (
    DyLoRA,
    LoRA,
    MoSLoRA,
    NotExpressible,
    PeftAdapter,
    QLoRA,
    adapter_state_dict,
    adapters,
    begin_step,
    end_step,
    inject,
    load_adapter_state_dict,
    load_peft,
    merge,
    parameter_groups,
    save_peft,
    trainable_adapter_parameters,
    unload,
    unmerge,
)

GEOMETRIES = {
    "patches": {"kernel_size": 4, "stride": 4},
    "overlapping": {"kernel_size": (3, 2), "stride": (2, 1), "padding": 1, "bias": False},
    "dilated": {"kernel_size": 2, "dilation": 2, "padding": 1, "padding_mode": "reflect"},
}
X = torch.linspace(-1, 1, 2 * 3 * 8 * 8, dtype=torch.float64).cos().reshape(2, 3, 8, 8)


def toy(geometry: str = "patches") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, **GEOMETRIES[geometry]), nn.GELU()).double()


def scramble(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.normal_(0, 0.3)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", "symmetric"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_starts_as_the_identity(geometry, init):
    model = toy(geometry)
    before = model(X)
    adapter = inject(model, {"0": 3}, partial(LoRA, init=init))["0"]
    assert torch.allclose(model(X), before, atol=1e-12)
    assert (adapter.d_in, adapter.d_out) == (model[0].weight[0].numel(), 6)


@pytest.mark.parametrize("init", ["kaiming", "symmetric"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_it_is_the_convolution_with_w_plus_delta(geometry, init):
    model = toy(geometry)
    base = copy.deepcopy(model)
    adapter = inject(model, {"0": 2}, partial(LoRA, init=init, alpha=5))["0"]
    scramble(model)
    delta = adapter.delta_weight().detach()
    with torch.no_grad():
        base[0].weight += delta.view_as(base[0].weight)
    assert torch.linalg.matrix_rank(delta) == 2
    assert torch.allclose(model(X), base(X), atol=1e-12)


def test_patches_are_the_rows_of_a_linear():
    """With stride = kernel, LoRA of the convolution is LoRA of the Linear on flattened patches, gradients included."""
    conv = toy()[:1]
    matrix = nn.Sequential(nn.Linear(48, 6)).double()
    matrix[0].weight.data, matrix[0].bias.data = conv[0].weight.data.flatten(1), conv[0].bias.data
    mine, other = (
        inject(m, {"0": 3}, generator=torch.Generator().manual_seed(3), memory="plain")["0"] for m in (conv, matrix)
    )
    for model in (conv, matrix):
        scramble(model)
    patches = F.unfold(X, 4, stride=4).mT  # (B, 4, 48)
    y = conv(X).flatten(2).mT
    assert torch.allclose(y, matrix(patches), atol=1e-12)
    y.square().sum().backward()
    matrix(patches).square().sum().backward()
    assert torch.allclose(mine.lora_A.grad, other.lora_A.grad) and torch.allclose(mine.lora_B.grad, other.lora_B.grad)


@pytest.mark.parametrize("frozen", [None, "A", "B"])
def test_only_declared_parameters_move(frozen):
    model = toy()
    base = copy.deepcopy(model.state_dict())
    adapter = inject(model, {"0": 2}, partial(LoRA, frozen=frozen))["0"]
    start = copy.deepcopy(adapter.state_dict())
    moving = {"lora_A", "lora_B"} - {f"lora_{frozen}"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"0.branches.all.{n}" for n in moving}
    count = sum(p.numel() for p in trainable_adapter_parameters(model))
    assert count == sum(2 * d for name, d in (("lora_A", 48), ("lora_B", 6)) if name in moving)
    optimiser = torch.optim.AdamW(parameter_groups(model, lr=0.1), weight_decay=0.1)
    for _ in range(3):
        begin_step(model)
        model(X).square().sum().backward()
        optimiser.step()
        end_step(model)
        optimiser.zero_grad()
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.items())
    assert {name for name, value in adapter.state_dict().items() if not torch.equal(value, start[name])} == moving


@pytest.mark.parametrize("init", ["kaiming", "symmetric"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_merge_unmerge_and_unload(geometry, init):
    model = toy(geometry)
    weight = model[0].weight.clone()
    inject(model, {"0": 2}, partial(LoRA, init=init))
    scramble(model)
    expected = model(X)
    merge(model)
    merge(model)
    assert torch.allclose(model(X), expected, atol=1e-12) and not torch.equal(model[0].weight, weight)
    unmerge(model)
    assert torch.equal(model[0].weight, weight) and torch.equal(model(X), expected)
    merge(model)
    unload(model)
    assert type(model[0]) is nn.Conv2d and torch.allclose(model(X), expected, atol=1e-12)


def test_own_checkpoint_returns():
    model, other = toy(), toy()
    inject(model, {"0": 2})
    scramble(model)
    inject(other, {"0": 2})
    load_adapter_state_dict(other, adapter_state_dict(model))
    assert torch.equal(other(X), model(X))


def test_dropout_keeps_the_mean_and_rests_in_eval():
    model = toy()[:1]
    inject(model, {"0": 2}, partial(LoRA, dropout=0.5))
    scramble(model)
    outputs = model(X[:1].expand(4000, -1, -1, -1))
    error = (outputs.mean(0) - model.eval()(X[:1])[0]).abs()
    assert bool((error < 5 * outputs.std(0) / 4000**0.5).all())


def test_16_bit_images_meet_float32_factors():
    model = toy().bfloat16()
    before = model(X.bfloat16())
    assert inject(model, {"0": 2})["0"].lora_A.dtype == torch.float32
    assert torch.equal(model(X.bfloat16()), before)
    float_model = toy().float()
    inject(float_model, {"0": 2})
    with torch.autocast("cpu", torch.bfloat16):
        y = float_model(X.float())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()


def test_refusals_leave_the_model_alone():
    model = toy()
    keys = list(model.state_dict())
    for adapter in (MoSLoRA, DyLoRA, QLoRA):
        with pytest.raises(TypeError, match=f"plain LoRA only; received {adapter.__name__}"):
            inject(model, {"0": 2}, adapter)
    for plan, error, match in (
        ({"0": 7}, ValueError, "full rank 6"),
        ({"0.q": 1}, ValueError, "do not split"),
        ({"1": 1}, TypeError, "GELU"),
    ):
        with pytest.raises(error, match=match):
            inject(model, plan)
    assert list(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="groups=3"):
        inject(nn.Sequential(nn.Conv2d(3, 6, 2, groups=3)), {"0": 1})


class Shifted(nn.Conv2d):
    def forward(self, x):
        return super().forward(x + 1)


def test_a_forward_pass_of_its_own_is_refused():
    with pytest.raises(TypeError, match="Shifted"):
        inject(nn.Sequential(Shifted(3, 6, 2)), {"0": 1})


def test_peft_files_refuse_dilation(tmp_path):
    model = toy("dilated")
    inject(model, {"0": 2})
    with pytest.raises(NotExpressible, match="dilation"):
        save_peft(model, tmp_path)


SWIN_PLAN = {"patch_embed.proj": 5, "layers.0.blocks.0.attn.proj": 4, "layers.0.blocks.0.mlp.fc1": 4}
SMALL = {"img_size": 28, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 3}
IMAGES = torch.linspace(-1, 1, 2 * 3 * 28 * 28).reshape(2, 3, 28, 28)


def swin() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("swin_tiny_patch4_window7_224", **SMALL).eval()


@pytest.mark.parametrize("options", [{}, {"scaling": "rslora", "alpha": 5}, {"init": "symmetric"}, {"init": "pissa"}])
@pytest.mark.filterwarnings("ignore")  # PEFT and timm speak about their own future
def test_peft_gives_the_same_outputs_and_we_read_them_back(options, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra orca_rank[peft]")
    model = swin()
    inject(model, SWIN_PLAN, partial(LoRA, **options))
    scramble(model)
    save_peft(model.eval(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(swin(), tmp_path).eval()
    kernels = {n: tuple(p.shape) for n, p in theirs.named_parameters() if "patch_embed.proj.lora" in n}
    rank = 10 if options.get("init") in ("symmetric", "pissa") else 5
    assert set(kernels.values()) == {(rank, 3, 4, 4), (12, rank, 1, 1)}
    assert torch.allclose(theirs(IMAGES), model(IMAGES), atol=2e-6)
    assert not torch.allclose(swin()(IMAGES), model(IMAGES), atol=1e-3)
    other = swin()
    assert load_peft(other, tmp_path)["patch_embed.proj"].rank == rank
    assert torch.allclose(other(IMAGES), model(IMAGES), atol=2e-6)
    load_peft(other, tmp_path)  # into a model that is adapted already
    assert torch.allclose(other(IMAGES), model(IMAGES), atol=2e-6)


@pytest.mark.filterwarnings("ignore")
def test_reads_what_peft_writes_and_trains_alike(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra orca_rank[peft]")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["proj"], rank_pattern={"patch_embed.proj": 2})
    theirs = peft.get_peft_model(swin(), config).eval()
    move_trained(theirs)
    theirs.save_pretrained(tmp_path)
    model = swin()
    found = load_peft(model, tmp_path)
    assert found["patch_embed.proj"].rank == 2 and len(found) == 5
    assert torch.allclose(model(IMAGES), theirs(IMAGES), atol=2e-6)
    for each in (model, theirs):
        each(IMAGES).square().sum().backward()
    other = theirs.base_model.model.patch_embed.proj
    for mine, factor in (
        (found["patch_embed.proj"].lora_A, other.lora_A),
        (found["patch_embed.proj"].lora_B, other.lora_B),
    ):
        expected = factor["default"].weight.grad.flatten(1)
        assert float((mine.grad - expected).norm() / expected.norm()) < 1e-5


def test_peft_methods_do_not_take_convolutions():
    pytest.importorskip("peft", reason="needs the extra orca_rank[peft]")
    with pytest.raises(TypeError, match="received PeftAdapter"):
        inject(toy(), {"0": 2}, PeftAdapter("dora"))
