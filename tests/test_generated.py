"""Generated data sets: sounds are what their labels say, fields solve their equation, permuted pixels are all there."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from orca_rank.data.cifar import Cifar100, permute
from orca_rank.data.reaction_diffusion import ReactionDiffusion, evolve, random_field, react
from orca_rank.data.spectrograms import KINDS, Spectrograms, bin_of, sound, spectrogram

SIZE = 64


def draw(kind: str, number: int = 0):
    return sound(kind, SIZE, np.random.default_rng(number))


# ---------------------------------------------------------------- sounds


@pytest.mark.parametrize("kind", ["tone", "rising", "falling", "vibrato", "beating"])
def test_the_brightest_row_is_the_frequency(kind):
    for number in range(5):
        signal, frequency = draw(kind, number)
        assert np.mean(signal**2) == pytest.approx(1.0)
        image = spectrogram(signal, SIZE)
        bright = image.max(0) > 0  # beating is silent in between
        found, expected = image.argmax(0), bin_of(frequency, SIZE)
        assert bright.mean() > 0.5 and np.abs(found - expected)[bright].max() < 2
    slope = np.diff(expected).mean()
    assert {"rising": slope < -0.1, "falling": slope > 0.1}.get(kind, abs(slope) < 0.2)  # rows count from the top


def test_harmonics_stand_at_multiples_and_switching_at_two_frequencies():
    signal, frequency = draw("harmonics")
    mean = spectrogram(signal, SIZE).mean(1)
    for k in (1, 2, 3):
        row = round(float(SIZE - 2 * SIZE * k * frequency[0]))
        assert mean[row - 1 : row + 2].max() > mean.mean() + 1
    signal, frequency = draw("switching")
    rows = spectrogram(signal, SIZE).argmax(0)
    steady = bin_of(frequency, SIZE)
    pure = np.isin(np.round(steady, 6), np.round(SIZE - 2 * SIZE * np.unique(frequency), 6))
    assert len(np.unique(frequency)) == 2 and pure.sum() > 10
    assert np.abs(rows - steady)[pure].max() < 2


def test_sounds_without_a_pitch():
    hiss = (10 ** spectrogram(draw("hiss")[0], SIZE)).mean(1)
    band = hiss > hiss.max() / 10
    assert 8 <= band.sum() <= 14 and np.diff(np.flatnonzero(band)).max() == 1  # 0.08 cycles a sample are 10 bins
    for kind, least in (("bursts", 5), ("clicks", 3)):
        image = spectrogram(draw(kind)[0], SIZE)
        columns, rows = image.mean(0), image.mean(1)
        assert np.ptp(columns) > 1 and rows.std() < 0.5  # events in time, of all frequencies
        assert ((columns[1:] > columns.mean()) & (columns[:-1] <= columns.mean())).sum() >= least - 1


def test_white_noise_is_at_zero():
    noise = np.random.default_rng(0).standard_normal(100_000)
    power = 10 ** np.stack([spectrogram(noise[i * 5000 :][:5000], SIZE) for i in range(15)])
    assert np.mean(power[:, 1:]) == pytest.approx(1.0, abs=0.05)  # the highest bin stands for one frequency, not two


def test_spectrograms_are_balanced_and_drawn_from_their_seed():
    options = {"size": 16, "train": 60, "test": 30}
    data = Spectrograms(**options)
    assert data.outline == data.task and data.task.classes == KINDS
    assert [len(part[1]) for part in (data.parts.train, data.parts.val, data.parts.test)] == [54, 6, 30]
    assert data.parts.test[1].bincount().tolist() == [3] * 10
    x = data.parts.encode(data.parts.train[0])
    assert x.shape == (54, 1, 16, 16) and abs(x.mean()) < 1e-4 and abs(x.std() - 1) < 1e-2
    same, more, other = (Spectrograms(**{**options, **change}) for change in ({}, {"train": 90}, {"data_seed": 1}))
    assert torch.equal(same.parts.test[0], data.parts.test[0]) and torch.equal(more.parts.test[0], data.parts.test[0])
    assert not torch.equal(other.parts.test[0], data.parts.test[0])
    few = Spectrograms(**options, train_limit=20, test_limit=10)
    assert [len(part[1]) for part in (few.parts.train, few.parts.val, few.parts.test)] == [18, 2, 10]
    for wrong in ({"size": 8}, {"test": 3}, {"noise": (3.0, 1.0)}, {"train_limit": 0}):
        with pytest.raises(ValueError, match="received"):
            Spectrograms(**{**options, **wrong})


# ---------------------------------------------------------------- fields


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_a_field_without_differences_follows_the_reaction():
    u = np.array([0.3, -0.8, 1.0, 0.0])[:, None, None] * np.ones((4, 16, 16))
    expected = u / np.sqrt(u**2 + (1 - u**2) * np.exp(-2 * 1.7))
    np.testing.assert_allclose(evolve(u, 1.7, 0.1, 4), expected, rtol=1e-12, atol=1e-15)
    step = 1e-5  # du/dt = u − u³
    np.testing.assert_allclose((react(u, step) - react(u, -step)) / (2 * step), u - u**3, atol=1e-9)


def test_a_small_wave_grows_at_its_linear_rate():
    grid, epsilon, time = 32, 0.05, 2.0
    x = np.arange(grid) / grid
    wave = 1e-6 * np.cos(2 * np.pi * (3 * x[:, None] - 2 * x))[None]
    rate = 1 - epsilon**2 * 4 * np.pi**2 * (3**2 + 2**2)
    assert relative(evolve(wave, time, epsilon, 8), np.exp(rate * time) * wave) < 1e-9


def test_fronts_stand_still():
    """tanh(x / (√2 ε)) solves ε² u″ + u − u³ = 0; two of them, opposite, are periodic but for e^{−1/(√2 ε)}."""
    grid, epsilon = 64, 0.03
    x = np.arange(grid) / grid
    front = np.tanh((0.25 - np.abs(x - 0.5)) / (np.sqrt(2) * epsilon))
    u = np.broadcast_to(front, (1, grid, grid))
    assert relative(evolve(u, 3.0, epsilon, 24), u) < 1e-3


def test_the_solver_is_of_fourth_order_and_resolved():
    u = random_field(2, 64, seed=0)
    reference = evolve(u, 3.0, 0.03, 192)
    errors = [relative(evolve(u, 3.0, 0.03, steps), reference) for steps in (12, 24, 48)]
    assert errors[0] < 1e-3  # the default
    assert all(8 < a / b < 32 for a, b in pairwise(errors))  # 16 in the limit
    k = np.fft.fftfreq(64, 1 / 64)
    spectrum = np.abs(np.fft.fft2(reference)) ** 2
    high = np.maximum(np.abs(k[:, None]), np.abs(k)) > 28
    assert spectrum[:, high].sum() < 1e-6 * spectrum.sum()
    single = evolve(u.astype(np.float32), 3.0, 0.03, 12)
    assert single.dtype == np.float32 and relative(single, evolve(u, 3.0, 0.03, 12)) < 1e-5


def test_random_fields_have_their_variance_and_seed():
    fields = random_field(400, 32, seed=3)
    assert abs(fields.mean()) < 1e-12 and fields.var() == pytest.approx(0.25, rel=0.1)
    np.testing.assert_array_equal(random_field(2, 32, seed=3, first=7), fields[7:9])
    assert not np.array_equal(random_field(2, 32, seed=3, stream=1), fields[:2])
    shifted = np.mean(fields * np.roll(fields, 1, 1)) / fields.var()  # stationary: the same along both axes
    assert shifted == pytest.approx(np.mean(fields * np.roll(fields, 1, 2)) / fields.var(), abs=0.03)


def test_the_parts_of_the_fields():
    options = {"train": 20, "test": 6, "grid": 64, "stride": 4, "steps": 4}
    data = ReactionDiffusion(**options)
    assert data.outline.output_shape == data.task.output_shape == (1, 16, 16)
    assert [len(part[0]) for part in (data.parts.train, data.parts.val, data.parts.test)] == [18, 2, 6]
    _, u = data.parts.test
    expected = evolve(random_field(6, 64, seed=0, stream=1).astype(np.float32), 3.0, 0.03, 4)[:, ::4, ::4]
    np.testing.assert_allclose(u[:, 0], expected, atol=1e-5)
    assert data.task.metric(data.task.normaliser.encode(u), u).max() < 1e-5
    few = ReactionDiffusion(**options, train_limit=10, test_limit=3)
    assert torch.equal(few.parts.test[1], u[:3]) and len(few.parts.train[0]) == 9
    for wrong in ({"stride": 5}, {"epsilon": 0.01}, {"time": 0.0}, {"grid": 4}):
        with pytest.raises(ValueError, match="received"):
            ReactionDiffusion(**{**options, **wrong})


# ---------------------------------------------------------------- permuted pixels


def test_permuted_pixels_are_all_there_in_one_order():
    x = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    y = permute(x, 0)
    order = y[0, 0].flatten()
    assert torch.equal(order.sort().values, torch.arange(32 * 32)) and not torch.equal(order, torch.arange(32 * 32))
    assert torch.equal(y.flatten(2), x.flatten(2)[:, :, order])  # the same for every image and channel
    assert torch.equal(permute(x, 0), y) and not torch.equal(permute(x, 1), y)
    with pytest.raises(ValueError, match=r"augment=false"):
        Cifar100(root=".", permuted=0)
