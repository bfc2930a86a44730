"""Spectrograms of generated sounds: a modality far from photographs, as many images as wanted, labels that are known.

A sound is one of ten kinds with random frequencies, rates and times, under white noise; its image is the logarithm of
the power in Hann windows, low frequencies below, time from left to right.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float

from orca_rank.data.module import InMemory, Pair, Parts, check_fraction, check_whole
from orca_rank.data.splits import limited, stratified_order, take_validation
from orca_rank.task import Task

KINDS = (
    "tone",  # one frequency
    "rising",  # a frequency that goes up evenly
    "falling",  # … or down
    "vibrato",  # a frequency that swings
    "switching",  # two frequencies in turn
    "harmonics",  # a frequency, its double and its triple
    "beating",  # one frequency, its amplitude swinging
    "hiss",  # noise of a band of frequencies
    "bursts",  # noise of all frequencies, now and then
    "clicks",  # impulses at equal distances
)
_FLOOR = 1e-3  # of the mean power of white noise of variance 1 in a window: what is below is silence


class Spectrograms(InMemory):
    """Log spectrograms (1, size, size) of ten kinds of sounds, see `KINDS`; equally many of each.

    Sample i of a part depends on (data_seed, part, i, size) and the noise alone.

    Args:
        size: pixels a side: bins of frequency and windows of time.
        train, test: images; val_fraction: of the former, held out class by class.
        noise: smallest and largest signal-to-noise ratio in dB, drawn evenly.
        train_limit, test_limit: use only so many of `train` and `test`, the classes in their proportions.
        data_seed: of the sounds and of the validation split. batch_size, seed: see `InMemory`.

    Raises:
        ValueError: for sizes that leave a class out, or a range of noise that is none.
    """

    def __init__(
        self,
        *,
        size: int = 64,
        train: int = 2000,
        test: int = 2000,
        val_fraction: float = 0.1,
        noise: tuple[float, float] | list[float] = (-12.0, 6.0),
        train_limit: int | None = None,
        test_limit: int | None = None,
        data_seed: int = 0,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        check_whole("size", size, least=16)
        check_whole("train", train, least=3 * len(KINDS))
        check_whole("test", test, least=len(KINDS))
        check_whole("train_limit", train_limit, optional=True)
        check_whole("test_limit", test_limit, optional=True)
        check_whole("data_seed", data_seed, least=0)
        check_fraction("val_fraction", val_fraction)
        if len(noise) != 2 or not noise[0] <= noise[1]:
            raise ValueError(f"noise must be the smallest and the largest ratio in dB, received {list(noise)}")
        self.size, self.train, self.test, self.noise = size, train, test, (float(noise[0]), float(noise[1]))
        self.val_fraction, self.data_seed = val_fraction, data_seed
        self.train_limit, self.test_limit = train_limit, test_limit

    @property
    def outline(self) -> Task:
        """Known without the sounds."""
        return Task("classification", (1, self.size, self.size), (len(KINDS),), classes=KINDS)

    def load(self) -> Parts:
        x, y = self._part(0, self.train)
        order = stratified_order(y.numpy(), self.data_seed)
        train, val = (torch.from_numpy(i) for i in take_validation(order, self.val_fraction, self.train_limit))
        test_x, test_y = self._part(1, self.test)
        kept = limited(stratified_order(test_y.numpy(), self.data_seed), self.test_limit, "test_limit")
        test = torch.from_numpy(kept)
        inputs = self.inputs(x[train], "channel")
        pairs = (x[train], y[train]), (x[val], y[val]), (test_x[test], test_y[test])
        return Parts(self.outline, *pairs, inputs.encode, inputs=inputs)

    def _part(self, part: int, count: int) -> Pair:
        """Images (count, 1, size, size) float32 and labels."""
        x = np.empty((count, self.size, self.size), np.float32)
        for i in range(count):
            random = np.random.default_rng(np.random.SeedSequence(self.data_seed, spawn_key=(part, i)))
            clean = sound(KINDS[i % len(KINDS)], self.size, random)[0]
            ratio = 10 ** (random.uniform(*self.noise) / 20)
            x[i] = spectrogram(ratio * clean + random.standard_normal(len(clean)), self.size)
        return torch.from_numpy(x)[:, None], torch.arange(count) % len(KINDS)


def length(size: int) -> int:
    """Samples of a sound: `size` windows of 2 · size, each size // 2 after the one before."""
    return size // 2 * (size - 1) + 2 * size


def sound(kind: str, size: int, random: np.random.Generator) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
    """A sound of one of `KINDS` with mean power 1, and its (lowest) frequency over time in cycles a sample.

    The frequency is 0 where a kind has none: hiss, bursts and clicks.
    """
    count = length(size)
    time = np.arange(count) / count
    frequency, amplitude = np.full(count, random.uniform(0.06, 0.44)), np.ones(count)
    if kind in ("rising", "falling"):
        low, high = random.uniform(0.05, 0.2), random.uniform(0.3, 0.45)
        frequency = low + (high - low) * (time if kind == "rising" else 1 - time)
    elif kind == "vibrato":
        swing = random.uniform(0.03, 0.06)
        phase = 2 * np.pi * (random.uniform(2, 5) * time + random.random())
        frequency = random.uniform(0.12, 0.38) + swing * np.sin(phase)
    elif kind == "switching":
        low, high = random.uniform(0.06, 0.2), random.uniform(0.3, 0.44)
        frequency = np.where((random.uniform(2, 6) * time + random.random()) % 1 < 0.5, low, high)
    elif kind == "harmonics":
        frequency = np.full(count, random.uniform(0.05, 0.15))
    elif kind == "beating":
        amplitude = 0.5 + 0.5 * np.sin(2 * np.pi * (random.uniform(3, 8) * time + random.random()))
    if kind in ("hiss", "bursts", "clicks"):
        frequency = np.zeros(count)
        signal = _without_pitch(kind, time, random)
    else:
        phase = 2 * np.pi * (np.cumsum(frequency) + random.random())
        signal = amplitude * sum(np.sin(k * phase) for k in ((1, 2, 3) if kind == "harmonics" else (1,)))
    return signal / np.sqrt(np.mean(signal**2)), frequency


def _without_pitch(kind: str, time: Float[np.ndarray, " t"], random: np.random.Generator) -> Float[np.ndarray, " t"]:
    count = len(time)
    if kind == "clicks":
        signal = np.zeros(count)
        gap = int(random.uniform(0.04, 0.12) * count)
        signal[random.integers(gap) :: gap] = 1.0
        return signal
    noise = random.standard_normal(count)
    if kind == "bursts":
        return noise * ((random.uniform(3, 7) * time + random.random()) % 1 < 0.25)
    low = random.uniform(0.05, 0.35)
    spectrum = np.fft.rfft(noise)
    frequency = np.fft.rfftfreq(count)
    return np.fft.irfft(spectrum * ((frequency >= low) & (frequency < low + 0.08)), count)


def spectrogram(signal: Float[np.ndarray, " t"], size: int) -> Float[np.ndarray, "size size"]:
    """log₁₀ of the power, relative to white noise of variance 1, in bins k/(2 · size) cycles a sample, k = 1 … size,
    the highest in the first row; one window a column."""
    window = np.hanning(2 * size + 1)[:-1]
    starts = size // 2 * np.arange(size)
    frames = signal[starts[:, None] + np.arange(2 * size)] * window  # (windows, samples)
    power = np.abs(np.fft.rfft(frames, axis=1)[:, 1:]) ** 2 / np.sum(window**2)  # (windows, bins)
    return np.log10(power + _FLOOR).T[::-1]


def bin_of(frequency: Float[np.ndarray, " t"], size: int) -> Float[np.ndarray, " size"]:
    """Row (from the top, not rounded) at which a frequency stands in each column: its mean over the window."""
    window = np.hanning(2 * size + 1)[:-1]
    starts = size // 2 * np.arange(size)
    mean = (frequency[starts[:, None] + np.arange(2 * size)] * window).sum(1) / window.sum()
    return size - 2 * size * mean
