"""The lean step against the plain module: outputs, gradients, dtypes, compilation, DDP, checkpointing."""

import copy
import os
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from shared import apart
from torch import nn
from torch.utils.checkpoint import checkpoint

from orca_rank.adapters import (
    AdaptedLinear,
    DyLoRA,
    LoRA,
    QLoRA,
    adapters,
    begin_step,
    inject,
    merge,
    products,
    set_memory,
    unload,
)
from orca_rank.adapters import lean as lean_module
from orca_rank.adapters.blocks import Attention, KeptAttention
from orca_rank.adapters.lean import LeanLinear, Plan, cheapest
from orca_rank.adapters.products import FastLinear
from orca_rank.ranks import RankPlan

timm = pytest.importorskip("timm")
NAMES = ("qkv", "proj", "fc1", "fc2")


def swin(**options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 56, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 3}
    return timm.create_model("swin_tiny_patch4_window7_224", **{**sizes, "drop_path_rate": 0.0, **options})


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=2, num_heads=2, num_classes=3)


def inputs(model: nn.Module, dtype=torch.float64) -> torch.Tensor:
    size = 56 if hasattr(model, "layers") else 32
    return torch.linspace(-2, 2, 2 * 3 * size * size, dtype=dtype).reshape(2, 3, size, size).sin()


def adapt(model: nn.Module, memory: str, rank: int = 2, thirds: bool = False, **options) -> nn.Module:
    ranks = {}
    for name, module in model.named_modules():
        if name.endswith(NAMES) and isinstance(module, nn.Linear):
            if thirds and name.endswith("qkv"):
                ranks |= {f"{name}.q": rank, f"{name}.v": rank + 1}
            else:
                ranks[name] = rank
    make = options.pop("make", LoRA)
    inject(model, RankPlan(ranks, allow_above_full=True), partial(make, **options), memory=memory)
    torch.manual_seed(1)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.normal_(0, 0.1)
    return model


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"output": y.detach(), "input": x.grad, **found}


def assert_same(first: dict, second: dict, rtol: float = 1e-9) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert float((value - second[name]).norm()) <= rtol * float(value.norm()) + 1e-30, name


@pytest.mark.parametrize("make", [swin, vit, partial(swin, img_size=60)])
@pytest.mark.parametrize(
    "options", [{}, {"rank": 30}, {"thirds": True}, {"frozen": "A"}, {"frozen": "B"}, {"init": "symmetric"}]
)
def test_same_outputs_and_gradients_as_the_plain_module(make, options, monkeypatch):
    monkeypatch.setattr(lean_module, "CPU_ROWS", 50)  # several chunks
    plain, lean = (adapt(make().double(), memory, **options) for memory in ("plain", "lean"))
    x = inputs(plain)
    if make is not swin and make is not vit:
        x = F.pad(x, (2, 2, 2, 2))
    assert_same(gradients(plain, x), gradients(lean, x))


def test_dylora_takes_the_same_path():
    plain, lean = (adapt(swin().double(), memory, rank=4, make=DyLoRA) for memory in ("plain", "lean"))
    for model in (plain, lean):
        begin_step(model, torch.Generator().manual_seed(3))
    assert_same(gradients(plain, inputs(plain)), gradients(lean, inputs(lean)))


@pytest.mark.parametrize("form", ["factored", "folded", "dense"])
@pytest.mark.parametrize("before", [None, F.gelu, lambda x: F.layer_norm(x, (6,))])
def test_gradcheck(form, before, monkeypatch):
    monkeypatch.setattr(lean_module, "CPU_ROWS", 2)
    generator = torch.Generator().manual_seed(0)
    w, bias, a, b1, b2, x = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((9, 6), (9,), (5, 6), (3, 2), (3, 3), (5, 6))
    )
    rows = [slice(0, 3), slice(6, 9)]
    plan = Plan(before, rows, form, 1, torch.float64)
    leaves = [t.requires_grad_() for t in (a, b1, b2, x)]
    assert torch.autograd.gradcheck(lambda a, *rest: LeanLinear.apply(plan, w, bias, a, *rest), leaves)
    delta = torch.zeros(9, 6, dtype=torch.float64)
    delta[:3], delta[6:] = b1.detach() @ a.detach()[:2], b2.detach() @ a.detach()[2:]
    u = x if before is None else before(x)
    assert torch.allclose(LeanLinear.apply(plan, w, bias, *leaves), u @ (w + delta).T + bias)


def test_cost_rule():
    assert cheapest(25088, 256, 96, 288) == "dense" and cheapest(25088, 8, 96, 288) == "folded"
    assert cheapest(100, 256, 768, 2304) == "factored"  # W₀ + BA costs more than the few tokens
    assert cheapest(25088, 8, 96, 288, folds=False) == "factored"


@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck_of_the_fast_product(folds, with_bias, monkeypatch):
    monkeypatch.setattr(products, "CPU_ROWS", 2)
    generator = torch.Generator().manual_seed(0)
    w, bias, a, b, x = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((7, 6), (7,), (3, 6), (7, 3), (2, 4, 6))
    )
    given = bias if with_bias else None
    leaves = [x.requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    y = FastLinear.apply(folds, x, w, given, a, b)
    assert apart(y, F.linear(x, w + b @ a, given)) < 1e-14
    assert torch.autograd.gradcheck(lambda x, a, b: FastLinear.apply(folds, x, w, given, a, b), leaves)
    for learns in range(3):  # the others are constants
        learning = [leaves[learns]]
        frozen = [leaf if i == learns else leaf.detach() for i, leaf in enumerate(leaves)]
        y = FastLinear.apply(folds, frozen[0], w, given, *frozen[1:])
        (grad,) = torch.autograd.grad(y.square().sum(), learning)
        (expected,) = torch.autograd.grad(F.linear(x, w + b @ a, given).square().sum(), learning)
        assert apart(grad, expected) < 1e-12


@pytest.mark.parametrize("make", [swin, vit])
@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 30}, {"thirds": True}, {"frozen": "A"}, {"frozen": "B"}, {"init": "symmetric"}, {"make": QLoRA}],
)
def test_fast_is_plain(make, options):
    plain, fast = (adapt(make().double(), memory, **options) for memory in ("plain", "fast"))
    assert_same(gradients(plain, inputs(plain)), gradients(fast, inputs(plain)))
    assert any("forward" in vars(block) for block in fast.modules()) == (make is swin)
    set_memory(fast, "plain")
    assert not any("forward" in vars(block) for block in fast.modules())


def test_gradcheck_of_attention_that_keeps_its_weights():
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(2, 2, 3, 3, dtype=torch.float64, generator=generator)  # two windows of three tokens, two heads
    attention = Attention(2, bias, 0.7)
    qkv = torch.randn(4, 3, 12, dtype=torch.float64, generator=generator).requires_grad_()
    assert apart(KeptAttention.apply(attention, qkv), attention(qkv)) < 1e-14
    assert torch.autograd.gradcheck(lambda qkv: KeptAttention.apply(attention, qkv), qkv)


@pytest.mark.parametrize(("width", "chosen"), [(12, "fast"), (96, "lean")])
def test_the_path_is_chosen_by_the_narrowest_layer(width, chosen):
    model = adapt(swin(embed_dim=width, num_heads=(2, 4)), "auto")
    assert {module.memory for module in model.modules() if isinstance(module, AdaptedLinear)} == {chosen}


@pytest.mark.parametrize("memory", ["plain", "fast", "lean"])
def test_bfloat16_autocast(memory):
    exact = gradients(adapt(swin(), "plain"), inputs(swin(), torch.float32))
    model = adapt(swin(), memory)
    with torch.autocast("cpu", torch.bfloat16):
        x = inputs(model, torch.float32).requires_grad_()
        y = model(x)
        loss = y.float().square().sum()
    loss.backward()
    assert y.dtype == torch.bfloat16
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.dtype == torch.float32
            assert float(F.cosine_similarity(p.grad.flatten(), exact[name].flatten(), dim=0)) > 0.95, name


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_one_function_at_extreme_logits(memory):
    """timm's mask is -100, which logits of some hundreds outweigh: trained, evaluated, lean, plain and bare agree."""
    bare, plain, lean = swin().double(), adapt(swin().double(), "plain"), adapt(swin().double(), memory)
    for model in (bare, plain, lean):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("qkv.weight"):
                    parameter.mul_(300.0)
                if "branches" in name:
                    parameter.zero_()
    x = inputs(bare)
    expected = bare(x)
    unmasked = copy.deepcopy(bare)
    for block in unmasked.modules():
        if getattr(block, "attn_mask", None) is not None:
            block.attn_mask.masked_fill_(block.attn_mask < 0, -torch.inf)
    assert apart(unmasked(x), expected) > 1e-6  # the case tells the two masks apart
    for model in (plain, lean):
        assert apart(model.train()(x), expected) < 1e-9
        assert apart(model.eval()(x), expected) < 1e-9
        with torch.no_grad():
            assert apart(model(x), expected) < 1e-9
    assert_same(gradients(plain, x), gradients(lean, x), rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"rank": 30}, {"thirds": True}, {"init": "symmetric"}, {"make": DyLoRA}, {"make": QLoRA}]
)
@pytest.mark.parametrize("memory", ["plain", "lean"])
def test_evaluation_folds_the_product_and_gives_the_same(memory, options, monkeypatch):
    model = adapt(swin(), memory, **options).eval()
    x = inputs(model, torch.float32)
    expected = model(x).detach()  # with gradients: no folding
    calls = []
    folds = AdaptedLinear.folds
    monkeypatch.setattr(AdaptedLinear, "folds", lambda layer, x: calls.append(folds(layer, x)) or calls[-1])
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert apart(model(x), expected) < 1e-5
    assert calls and all(calls)
    calls.clear()
    assert apart(model(x), expected) < 1e-6 and not any(calls)


@pytest.mark.parametrize(("make", "memory"), [(swin, "lean"), (vit, "lean"), (swin, "fast")])
def test_a_whole_model_is_copied_and_pickled(make, memory, tmp_path):
    model = adapt(make(), memory).train()
    x = inputs(model, torch.float32)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert_same(gradients(copy.deepcopy(model), x), gradients(twin, x), rtol=1e-5)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
            assert float(twin(x).norm()) == 0 < float(model(x).norm())


def test_folding_only_where_it_is_exact_and_pays():
    layer = adapt(swin(), "plain").layers[0].blocks[0].mlp.fc1  # 12 -> 48
    x = torch.randn(40, 12)
    with torch.no_grad():
        assert layer.folds(x) and not layer.folds(x[:4]) and not layer.folds(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert not layer.folds(x)
    assert not layer.folds(x)


def test_without_gradients_the_same_outputs():
    plain, lean = adapt(swin().double(), "plain"), adapt(swin().double(), "lean")
    with torch.no_grad():
        assert torch.allclose(plain(inputs(plain)), lean(inputs(lean)), atol=1e-12)
    merge(lean)
    assert torch.allclose(plain(inputs(plain)), lean(inputs(lean)), atol=1e-12)


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    return sum(kept.values())


def test_keeps_less_than_the_frozen_model():
    x = inputs(swin(), torch.float32)
    frozen = swin().requires_grad_(False)
    plain, lean = (saved_bytes(adapt(swin(), memory), x) for memory in ("plain", "lean"))
    assert lean < 0.8 * plain and lean < saved_bytes(frozen, x.clone().requires_grad_())


def test_x_is_kept_once_for_the_thirds_and_not_at_all_for_lora_fa():
    x = torch.randn(64, 12, requires_grad=True)
    kept = {}
    for frozen in (None, "A"):
        model = nn.Sequential(nn.Linear(12, 36))
        inject(model, {"0.q": 2, "0.k": 2, "0.v": 2}, partial(LoRA, frozen=frozen))
        kept[frozen] = saved_bytes(model, x)
    small = 4 * (6 * 12 + 3 * 12 * 2)  # A stacked and the scaled Bs
    assert kept[None] <= 4 * 64 * 12 + small
    assert kept["A"] <= 4 * 64 * 6 + small


def test_lora_fa_saves_activations_in_a_fast_step_and_none_in_a_lean_one():
    x = inputs(swin(), torch.float32).requires_grad_()
    kept = {
        (memory, frozen): saved_bytes(adapt(swin(), memory, frozen=frozen), x)
        for memory in ("plain", "fast", "lean")
        for frozen in (None, "A")
    }
    assert kept["lean", "A"] == pytest.approx(kept["lean", None], rel=0.05)  # small ones may share an address
    assert kept["lean", "A"] < kept["fast", "A"]
    for memory in ("plain", "fast"):
        assert kept[memory, "A"] < 0.8 * kept[memory, None]


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, memory):
    plain, lean = adapt(swin().double(), "plain"), adapt(swin().double(), memory)
    for stage in lean.layers:
        stage.blocks = _Checkpointed(stage.blocks, reentrant)
    first, second = gradients(plain, inputs(plain)), gradients(lean, inputs(lean))
    assert_same(first, {name.replace(".inner", ""): value for name, value in second.items()})


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        for block in self.inner:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo looks at .grad of what is no leaf
def test_torch_compile():
    plain = adapt(vit().double(), "plain")
    compiled = torch.compile(adapt(vit().double(), "lean"), backend="aot_eager")
    first, second = gradients(plain, inputs(plain)), gradients(compiled, inputs(plain))
    assert_same(first, {name.removeprefix("_orig_mod."): value for name, value in second.items()})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_torch_compile_with_inductor():
    plain = adapt(vit(), "plain")
    compiled = torch.compile(adapt(vit(), "lean"))
    x = inputs(plain, torch.float32)
    first, second = gradients(plain, x), gradients(compiled, x)
    assert_same(first, {name.removeprefix("_orig_mod."): value for name, value in second.items()}, rtol=1e-4)


def _worker(rank: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(adapt(swin(), "lean"))
    model(inputs(swin(), torch.float32)[rank : rank + 1]).square().sum().backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.module.named_parameters() if p.requires_grad}, path)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_data_parallel(tmp_path):
    """Two processes with one image each average to half of the sum over both images."""
    path = str(tmp_path / "grads.pt")
    torch.multiprocessing.spawn(_worker, (29500 + os.getpid() % 1000, path), nprocs=2)
    whole = gradients(adapt(swin(), "plain"), inputs(swin(), torch.float32))
    for name, grad in torch.load(path).items():
        assert torch.allclose(2 * grad, whole[name], rtol=1e-3, atol=1e-5), name


def test_two_backward_passes_through_one_graph_stop_with_an_error(monkeypatch):
    monkeypatch.setattr(lean_module, "CPU_ROWS", 50)
    model = adapt(swin(), "lean")
    loss = model(inputs(model, torch.float32)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()
    for memory in ("plain", "fast"):
        set_memory(model, memory)
        loss = model(inputs(model, torch.float32)).sum()
        loss.backward(retain_graph=True)
        loss.backward()


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_hooks_are_still_called(memory):
    model = adapt(swin(), memory)
    seen = []
    model.layers[0].blocks[1].attn.proj.register_forward_hook(lambda *_: seen.append("proj"))
    model.layers[0].blocks[0].norm1.register_forward_pre_hook(lambda *_: seen.append("norm"))
    gradients(model, inputs(model, torch.float32))
    assert seen == ["norm", "proj"]


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_trained_norms_and_biases_get_their_gradients(memory):
    plain, lean = adapt(swin().double(), "plain"), adapt(swin().double(), memory)
    for model in (plain, lean):
        block = model.layers[0].blocks[1]
        for module in (block.norm1, block.norm2):
            module.requires_grad_(True)
        block.attn.proj.bias.requires_grad_(True)
        model.layers[1].blocks[0].attn.relative_position_bias_table.requires_grad_(True)
    assert_same(gradients(plain, inputs(plain)), gradients(lean, inputs(lean)))


def test_copies_and_unloading():
    model = adapt(swin().double(), "lean")
    other = copy.deepcopy(model)
    assert other.layers[0].blocks[0].forward.args[0] is other.layers[0].blocks[0]
    assert_same(gradients(model, inputs(model)), gradients(other, inputs(model)))
    unload(other)
    assert "forward" not in vars(other.layers[0].blocks[0])
    with pytest.raises(ValueError, match="expected"):
        set_memory(model, "more")
