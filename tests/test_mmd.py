"""MMD and energy distance against ORCA's numbers, definitions written out, and finite differences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from shared import apart
from torch import Tensor

from orca_rank.distances import MovingBandwidth, energy_distance, mmd, objectives

REFERENCE = Path(__file__).parent / "reference" / "mmd_orca_n64_d16"


def samples(n: int = 12, m: int = 9, d: int = 3, seed: int = 0, shift: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, torch.randn(m, d, generator=generator, dtype=torch.float64) + shift


def by_definition(x: Tensor, y: Tensor, bandwidths: list[float], unbiased: bool) -> float:
    total = 0.0
    for h in bandwidths:
        k = lambda a, b, h=h: torch.exp(-(a[:, None] - b[None]).square().sum(2) / h)  # noqa: E731
        for z in (x, y):
            n = len(z)
            total += float((k(z, z).sum() - n) / (n * (n - 1)) if unbiased else k(z, z).mean())
        total -= 2 * float(k(x, y).mean())
    return total


def test_orca_value_and_gradient() -> None:
    with np.load(REFERENCE.with_suffix(".npz")) as stream:
        arrays = {name: torch.tensor(value) for name, value in stream.items()}
    values = json.loads(REFERENCE.with_suffix(".json").read_text())
    x, y = arrays["source"][arrays["idx"]], arrays["target"].requires_grad_()
    value = mmd(x, y, bandwidth="mean", kernels=5, unbiased=False)
    value.backward()
    assert value.item() == pytest.approx(values["orca_value"], rel=1e-12)
    assert apart(y.grad, arrays["grad_target"]) < 1e-10
    unbiased = mmd(x, y, bandwidth="mean", kernels=5).item()
    assert unbiased == pytest.approx(values["unbiased_same_bandwidth"], rel=1e-12)


def test_the_objective_with_a_pooled_bandwidth_is_orcas() -> None:
    """On the source features that ORCA drew, its value and gradient; on others, the definition of both."""
    with np.load(REFERENCE.with_suffix(".npz")) as stream:
        arrays = {name: torch.tensor(value) for name, value in stream.items()}
    source, y = arrays["source"][arrays["idx"]], arrays["target"].requires_grad_()
    labels = torch.zeros(len(source), dtype=torch.long), torch.zeros(len(y), dtype=torch.long)
    value = objectives.MMD(source, labels[0], bandwidth="pooled")(y, labels[1])
    value.backward()
    expected = json.loads(REFERENCE.with_suffix(".json").read_text())["orca_value"]
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert apart(y.grad, arrays["grad_target"]) < 1e-10

    x, y = samples()
    labels = torch.zeros(len(x), dtype=torch.long), torch.zeros(len(y), dtype=torch.long)
    pooled = float(torch.pdist(torch.cat([x, y])).square().mean())
    near = float(torch.pdist(x).square().mean())
    for bandwidth, h in (("pooled", pooled), (None, near * (len(x) - 1) * 2 / (2 * len(x) - 1)), (3.0, 3.0)):
        objective = objectives.MMD(x, labels[0], kernels=3, bandwidth=bandwidth)
        wanted = by_definition(x, y, [h / 2, h, 2 * h], unbiased=False)
        assert objective(y, labels[1]).item() == pytest.approx(wanted, rel=1e-9)
    y = (y + 100).requires_grad_()
    for bandwidth, feels in (("pooled", True), (None, False)):  # of a target this far, where narrow kernels are 0
        (pull,) = torch.autograd.grad(objectives.MMD(x, labels[0], bandwidth=bandwidth)(y, labels[1]), y)
        assert (float(pull.mean(0).norm()) > 1e-6) == feels
    for bandwidth in ("mean", 0.0, -1.0, True):
        with pytest.raises(ValueError, match=rf"bandwidth={bandwidth}: expected a positive number"):
            objectives.MMD(x, labels[0], bandwidth=bandwidth)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernels", [1, 2, 5])
def test_definition(kernels: int, unbiased: bool) -> None:
    x, y = samples()
    widths = [2.0 * 2.0 ** (i - kernels // 2) for i in range(kernels)]
    wanted = by_definition(x, y, widths, unbiased)
    assert mmd(x, y, bandwidth=2.0, kernels=kernels, unbiased=unbiased).item() == pytest.approx(wanted, abs=1e-12)


def test_bandwidth_rules() -> None:
    x, y = samples()
    squares = torch.pdist(torch.cat([x, y])).square()
    for rule, h in (("median", squares.median()), ("mean", squares.mean())):
        assert mmd(x, y, bandwidth=rule).item() == pytest.approx(mmd(x, y, bandwidth=h.item()).item(), rel=1e-9)
    moving = MovingBandwidth("mean", decay=0.5)
    mmd(x, y, bandwidth=moving)
    mmd(2 * x, 2 * y, bandwidth=moving)
    assert moving.value == pytest.approx(0.5 * squares.mean().item() * (1 + 4))


def test_energy_distance_definition() -> None:
    x, y = samples()
    wanted = 2 * torch.cdist(x, y).mean() - torch.pdist(x).mean() - torch.pdist(y).mean()
    assert energy_distance(x, y).item() == pytest.approx(wanted.item(), rel=1e-9)
    # In one dimension it is twice the squared L2 distance of the distribution functions.
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.5]])
    assert energy_distance(a, b, unbiased=False).item() == pytest.approx(2 * (0.25 * 0.5 + 0.25 * 0.5), rel=1e-6)


@pytest.mark.parametrize("name", ["mmd", "mmd biased", "mmd features", "mmd blocks", "energy"])
def test_gradients(name: str) -> None:
    x, y = samples()
    x.requires_grad_()
    y.requires_grad_()
    functions = {
        "mmd": lambda a, b: mmd(a, b, bandwidth=2.0, kernels=3),
        "mmd biased": lambda a, b: mmd(a, b, bandwidth=2.0, unbiased=False),
        "mmd features": lambda a, b: mmd(a, b, bandwidth=2.0, features=16),
        "mmd blocks": lambda a, b: mmd(a, b, bandwidth=2.0, block=4),
        "energy": energy_distance,
    }
    assert torch.autograd.gradcheck(functions[name], (x, y))


def test_estimators_agree() -> None:
    x, y = samples(1500, 1500, 4, shift=0.7)
    exact = mmd(x, y, bandwidth=8.0, kernels=3).item()
    assert mmd(x, y, bandwidth=8.0, kernels=3, features=2000).item() == pytest.approx(exact, rel=0.1)
    assert mmd(x, y, bandwidth=8.0, kernels=3, block=250).item() == pytest.approx(exact, rel=0.15)


def test_unbiased_under_the_null() -> None:
    values = [mmd(*samples(40, 40, seed=seed, shift=0.0), bandwidth=3.0).item() for seed in range(60)]
    mean, error = np.mean(values), np.std(values) / 60**0.5
    assert min(values) < 0 < max(values)
    assert abs(mean) < 4 * error


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = samples(30, 20)
    y.requires_grad_()
    whole = mmd(x, y, kernels=5)
    first = torch.autograd.grad(whole, y)[0]
    monkeypatch.setattr("orca_rank.distances._pairs.ELEMENTS", 64)
    chunked = mmd(x, y, kernels=5)
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-12)
    assert apart(torch.autograd.grad(chunked, y)[0], first) < 1e-12


def test_bad_input_is_named() -> None:
    x, y = samples()
    for options, message in (
        ({"bandwidth": "width"}, "bandwidth must be"),
        ({"bandwidth": 0.0}, "positive"),
        ({"kernels": 0}, "kernels"),
        ({"block": 4, "features": 4}, "not both"),
        ({"block": 1}, "block must be"),
    ):
        with pytest.raises(ValueError, match=message):
            mmd(x, y, **options)
    with pytest.raises(ValueError, match="at least 2 rows"):
        mmd(x[:1], y)
    with pytest.raises(ValueError, match="decay"):
        MovingBandwidth(decay=1.0)
