"""QLoRA: the numbers of bitsandbytes, the step on a packed matrix, and what a 4-bit matrix refuses."""

import itertools
from functools import partial

import pytest
import torch
from shared import apart
from torch import nn

from orca_rank.adapters import (
    QLoRA,
    adapter_state_dict,
    adapters,
    inject,
    load_peft,
    merge,
    paged_adamw,
    save_peft,
    unload,
)
from orca_rank.adapters.quantised import NF4, QuantisedLinear, dequantise, dynamic_codes, nearest, quantise


def weight(rows=48, columns=80):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def back(w):
    return dequantise(quantise(w), tuple(w.shape), w.dtype)


def test_codes():
    assert len(set(NF4)) == 16 and list(NF4) == sorted(NF4)
    codes = dynamic_codes()
    assert len(codes) == 256 and bool((codes.diff() > 0).all()) and float(codes.max()) == 1.0
    values = torch.linspace(-1, 1, 999)
    expected = (values[:, None] - torch.tensor(NF4)).abs().argmin(1)
    assert torch.equal(nearest(values, torch.tensor(NF4)).long(), expected)


def test_error_is_bounded_by_the_widest_interval():
    w = weight()
    top = w.flatten().view(-1, 64).abs().amax(1)
    error = (back(w) - w).flatten().view(-1, 64).abs().amax(1)
    widest = max(b - a for a, b in itertools.pairwise(NF4)) / 2
    assert bool((error <= top * widest * 1.1 + 0.02).all())


def test_quantising_twice_is_quantising_once_up_to_the_scales():
    w = back(weight())
    assert torch.equal(quantise(w)["codes"], quantise(weight())["codes"])


@pytest.mark.parametrize("shape", [(48, 80), (7, 9), (5, 64)])
def test_shapes_that_fill_no_block(shape):
    w = weight(*shape)
    packed = quantise(w)
    assert float((back(w) - w).abs().mean()) < 0.12
    assert sum(v.numel() * v.element_size() for v in packed.values()) < 0.55 * w.numel() + 64 + 16


def test_the_numbers_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs the extra orca_rank[qlora]")
    w = weight(96, 192)
    codes, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    packed = quantise(w)
    assert torch.equal(codes.flatten(), packed["codes"])
    assert torch.equal(state.absmax, packed["scales"])
    assert torch.allclose(functional.dequantize_4bit(codes, state), back(w), atol=1e-6)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 8))


def gradients(memory):
    net = model()
    found = inject(net, {"0.q": 2, "0.k": 3, "2": 4}, QLoRA, memory=memory, generator=torch.Generator().manual_seed(1))
    for adapter in found.values():
        nn.init.normal_(adapter.lora_B, generator=torch.Generator().manual_seed(2))
    x = torch.linspace(-1, 1, 10 * 16).reshape(10, 16).mul(5).sin().requires_grad_()
    y = net(x)
    y.square().sum().backward()
    return net, x, [y.detach(), x.grad, *(p.grad for p in net.parameters() if p.requires_grad)]


def test_is_lora_on_the_unpacked_matrix():
    _, x, lean = gradients("lean")
    net, _, plain = gradients("plain")
    assert type(net[0]) is QuantisedLinear and "weight" not in dict(net[2].named_parameters())
    assert all(apart(a, b) < 1e-5 for a, b in zip(lean, plain, strict=True))
    reference = model()
    with torch.no_grad():
        for layer in (reference[0], reference[2]):
            layer.weight.copy_(back(layer.weight))
    expected = reference[0](x) + torch.cat(
        [net[0].branches["q"](x), net[0].branches["k"](x), torch.zeros(10, 16)], dim=1
    )
    assert apart(net[0](x), expected) < 1e-5


def test_the_matrix_is_not_kept_for_the_backward_pass():
    net = nn.Sequential(nn.Linear(256, 256))
    inject(net, {"0": 2}, QLoRA)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(torch.randn(4, 256, requires_grad=True))
    assert sum(kept.values()) < 256 * 256
    assert sum(b.numel() * b.element_size() for b in net.buffers()) < 0.6 * 256 * 256


def test_adapters_travel_and_the_matrix_refuses(tmp_path):
    net, _, _ = gradients("lean")
    assert all(name.endswith(("lora_A", "lora_B")) for name in adapter_state_dict(net))
    save_peft(net, tmp_path)
    other = model()
    load_peft(other, tmp_path)
    assert torch.equal(adapters(other)["0.k"].delta_weight(), adapters(net)["0.k"].delta_weight())
    assert not torch.equal(other[2].weight, net[2].weight)  # beside the unquantised matrix
    with pytest.raises(ValueError, match="4-bit"):
        merge(net)
    unpacked = net[2].weight
    unload(net)
    assert type(net[2]) is nn.Linear and torch.equal(net[2].weight, unpacked)
    with pytest.raises(ValueError, match="cannot start"):
        inject(model(), {"2": 2}, partial(QLoRA, init="pissa"))


def test_paged_optimiser_says_what_it_needs():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, where it works")
    with pytest.raises((ImportError, RuntimeError), match=r"bitsandbytes|CUDA"):
        paged_adamw([nn.Parameter(torch.zeros(2))])
