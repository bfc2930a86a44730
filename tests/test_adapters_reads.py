"""Models that read a layer's weight without calling it: the adapter learns there, and what reaches it is measured."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from shared import apart
from torch import Tensor, nn

from orca_rank.adapters import (
    Bottleneck,
    DyLoRA,
    LoRA,
    PeftAdapter,
    QLoRA,
    adapters,
    inject,
    load_peft,
    merge,
    probe,
    save_peft,
    unload,
    unmerge,
)
from orca_rank.adapters.reads import read_layers
from orca_rank.measuring.activations import collect
from orca_rank.measuring.gradients import collect_gradients
from orca_rank.measuring.passes import watch

timm = pytest.importorskip("timm")

SWIN = {"window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
# A model of each family that never calls attn.qkv.
READERS = {
    "swinv2": ("swinv2_tiny_window8_256", {"img_size": 32, **SWIN}),
    "beit": ("beit_base_patch16_224", {"img_size": 32, **VIT}),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 32, **VIT}),
}
CALLERS = {
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 32, **SWIN}),
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, **VIT}),
}
X = torch.linspace(-2, 2, 2 * 3 * 32 * 32, dtype=torch.float64).reshape(2, 3, 32, 32).sin()


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    name, options = {**READERS, **CALLERS}[family]
    model = timm.create_model(name, num_classes=3, **options).double()
    with torch.no_grad():  # some start with norms or scales at zero, where no branch has a gradient
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def layers(model: nn.Module, *ends: str) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.endswith(ends)]


def scramble(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.normal_(0, 0.3)


@pytest.mark.parametrize("family", READERS)
def test_readers_are_known_and_callers_are_not(family: str) -> None:
    model = make(family)
    assert read_layers(model, layers(model, "qkv", "attn.proj", "fc1", "fc2")) == layers(model, "qkv")


@pytest.mark.parametrize("family", CALLERS)
def test_no_layer_of_swin_or_vit_is_read(family: str) -> None:
    model = make(family)
    assert read_layers(model, layers(model, "")) == []


@pytest.mark.parametrize("thirds", [False, True])
@pytest.mark.parametrize("adapter", [LoRA, partial(LoRA, init="symmetric"), DyLoRA])
@pytest.mark.parametrize("family", READERS)
def test_the_adapter_of_a_read_weight_is_that_of_w_plus_delta(
    family: str, adapter: Callable[..., LoRA], thirds: bool
) -> None:
    model, reference = make(family), make(family)
    before = model(X)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = layers(model, "qkv")
    plan = {f"{name}.{part}": 2 for name in names for part in "qv"} if thirds else dict.fromkeys(names, 2)
    found = inject(model, plan, adapter)
    assert apart(model(X), before) < 1e-12
    probe(model, lambda: model(X))
    assert all(p.grad is None for p in model.parameters())
    scramble(model)
    output = model(X)
    output.square().sum().backward()
    gradients = {name: (a.lora_A.grad, a.lora_B.grad) for name, a in found.items()}
    assert all(float(g.norm()) > 0 for pair in gradients.values() for g in pair)
    # The same through the reference's own weights: ∂A = s Bᵀ ∂W and ∂B = s ∂W Aᵀ.
    with torch.no_grad():
        for name in names:
            weight = reference.get_parameter(f"{name}.weight")
            weight.add_(model.get_submodule(name).delta_weight())
    expected = reference(X)
    assert apart(output, expected) < 1e-12 < apart(expected, before)
    expected.square().sum().backward()
    for name, branch in found.items():
        module, _, part = name.rpartition(".") if thirds else (name, "", "")
        full = reference.get_parameter(f"{module}.weight").grad
        full = full.chunk(3)["qkv".index(part)] if thirds else full
        assert apart(gradients[name][0], branch.scale * branch.lora_B.T @ full) < 1e-10
        assert apart(gradients[name][1], branch.scale * full @ branch.lora_A.T) < 1e-10
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())


@pytest.mark.parametrize("family", READERS)
def test_merging_files_and_unloading(family: str, tmp_path) -> None:
    model, bare = make(family), make(family)
    inject(model, dict.fromkeys(layers(model, "qkv", "proj"), 2))
    base = {name: p.clone() for name, p in model.named_parameters() if "branches" not in name}
    scramble(model)
    expected = model(X)
    save_peft(model, tmp_path)
    load_peft(bare, tmp_path)
    assert apart(bare(X), expected) < 1e-6
    merge(model)
    merge(model)
    assert apart(model(X), expected) < 1e-10
    unmerge(model)
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in base.items())
    merge(model)
    unload(model)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in layers(model, "qkv"))
    assert apart(model(X), expected) < 1e-10


def test_a_packed_matrix_is_read_with_its_adapter() -> None:
    model = make("beit").float()
    found = inject(model, dict.fromkeys(layers(model, "qkv"), 2), QLoRA)
    probe(model, lambda: model(X.float()))
    before = model(X.float())
    scramble(model)
    assert len(found) == 2 and apart(model(X.float()), before) > 1e-3


def test_what_a_read_weight_cannot_carry_is_refused() -> None:
    model = make("swinv2")
    plan = dict.fromkeys(layers(model, "qkv"), 2)
    for adapter, message in ((partial(LoRA, dropout=0.1), "dropout=0.1"), (Bottleneck, "Bottleneck")):
        with pytest.raises(ValueError, match=f"reads this layer's weight.*{message}"):
            inject(model, plan, adapter)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in plan)
    pytest.importorskip("peft", reason="needs the extra orca_rank[peft]")
    with pytest.raises(ValueError, match="PEFT's layer never runs"):
        inject(model, plan, PeftAdapter("dora"))


class Bypass(nn.Module):
    """Its first layer is read by a function that knows nothing of modules, its second is called, its third is idle."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.called, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(F.linear(x, dict(self.named_parameters())["hidden.weight"]))


def test_the_probe_names_a_layer_that_takes_no_part() -> None:
    model = Bypass()
    inject(model, {"hidden": 1, "called": 1, "idle": 1})
    with pytest.raises(ValueError, match=r"2 of 3 adapters get no gradient.*hidden"):
        probe(model, lambda: model(torch.ones(2, 4)))
    model = Bypass()
    inject(model, {"idle": 1})
    with pytest.raises(ValueError, match=r"1 of 1 adapters.*idle"):
        probe(model, lambda: model(torch.ones(2, 4)))


@pytest.mark.parametrize("family", [*READERS, *CALLERS])
def test_what_reaches_a_layer_is_seen_once_called_or_read(family: str) -> None:
    model = make(family)
    modules = {name: model.get_submodule(name) for name in layers(model, "qkv", "fc1")}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with watch(modules, lambda name, x, y: seen.setdefault(name, []).append((x, y))), torch.inference_mode():
        model(X)
    assert list(map(len, seen.values())) == [1] * len(modules) and seen.keys() == modules.keys()
    for name, ((x, y),) in seen.items():
        assert apart(y - y[:1, :1], F.linear(x - x[:1, :1], modules[name].weight)) < 1e-10  # up to a bias
    model(X)
    assert all(len(calls) == 1 for calls in seen.values())


def test_measuring_names_a_layer_that_takes_no_part() -> None:
    model = Bypass()
    batches = [(torch.ones(2, 4), torch.ones(2, 4))]
    known = {"hidden": model.hidden, "called": model.called}
    inputs, _ = collect(model, known, batches, 2)
    assert torch.equal(inputs["hidden"].pooled, batches[0][0])
    everything = {**known, "idle": model.idle}
    with pytest.raises(ValueError, match=r"idle took no part.*1 of 3"):
        collect(model, everything, batches, 2)
    with pytest.raises(ValueError, match=r"idle took no part.*1 of 3"):
        collect_gradients(lambda x: x, model, F.mse_loss, everything, batches, 2)
