"""Distances on held-out features and their half-sampling intervals."""

import pytest
import torch

from orca_rank.training.features import Source
from orca_rank.training.held_out import compare


def source(features: torch.Tensor) -> Source:
    labels = torch.arange(len(features)) % 2
    return Source(features, labels, features[:2, None])


def test_two_points_have_their_distance_and_no_spread():
    x, y = torch.zeros(12, 4), torch.full((8, 4), 3.0)
    found = compare(source(x), y, torch.arange(8) % 2, resamples=5, seed=0)
    for name, scale in (("sliced", 1.0), ("otdd", 2.0)):  # OTDD adds the distance of the labels' clouds
        assert found[name]["value"] == pytest.approx(scale * 36.0, rel=0.1 if name == "sliced" else 1e-3)
        assert found[name]["low"] == found[name]["value"] == found[name]["high"]
    assert found["mmd"]["value"] == pytest.approx(2 - 2 * torch.tensor(-36.0).exp().item(), rel=1e-5)


def test_intervals_narrow_with_the_number_of_images():
    generator = torch.Generator().manual_seed(0)
    width = {}
    for n in (16, 256):
        x, y = torch.randn(n, 4, generator=generator), 1 + torch.randn(n, 4, generator=generator)
        found = compare(source(x), y, torch.arange(n) % 2, resamples=20, seed=0)
        for name in ("mmd", "sliced"):
            assert found[name]["low"] < found[name]["value"] < found[name]["high"]
            width[name, n] = found[name]["high"] - found[name]["low"]
    for name in ("mmd", "sliced"):  # 1/√n: 4
        assert 2 < width[name, 16] / width[name, 256] < 8


def test_three_images_are_too_few():
    with pytest.raises(ValueError, match="at least 4 validation images, received 3"):
        compare(source(torch.zeros(8, 4)), torch.ones(3, 4), torch.zeros(3), resamples=0, seed=0)
