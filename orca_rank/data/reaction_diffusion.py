"""Phase separation: the Allen–Cahn equation from a random field to a later time, a second field-to-field problem.

    ∂u/∂t = ε² Δu + u − u³   on the unit square, periodic.

Strang splitting with both parts exact: diffusion in Fourier space, the reaction in closed form. Two runs of n and 2n
steps, combined as (4 u₂ₙ − uₙ)/3 (Richardson), make it of fourth order in time; in space it is spectral.

Reference:
    Strang, On the construction and comparison of difference schemes (1968).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy.fft import irfft2, rfft2

from orca_rank.data.checks import check_inputs, check_targets
from orca_rank.data.module import InMemory, Pair, Parts, check_fraction, check_whole
from orca_rank.data.splits import stratified_order, take_validation
from orca_rank.task import Normaliser, Task, typical_norm

_CHUNK = 64  # samples solved at a time


class ReactionDiffusion(InMemory):
    """Allen–Cahn: u at time 0, a smooth random field, to u at `time`; both (1, k, k) on the points i · stride / grid.

    Args:
        train, test: samples. val_fraction: of the former, held out.
        grid, stride: points a side of the solver, and the subsampling; k = grid / stride.
        epsilon: width of the fronts, over the side of the square.
        time: of the answer. steps: of the solver (and twice as many).
        train_limit, test_limit: use only the first so many of `train` and `test`.
        data_seed: of the fields and of the validation split. batch_size, seed: see `InMemory`.

    Raises:
        ValueError: for sizes out of range, or a grid too coarse for the fronts.
    """

    def __init__(
        self,
        *,
        train: int = 1000,
        test: int = 200,
        val_fraction: float = 0.1,
        grid: int = 64,
        stride: int = 2,
        epsilon: float = 0.03,
        time: float = 3.0,
        steps: int = 12,
        train_limit: int | None = None,
        test_limit: int | None = None,
        data_seed: int = 0,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        for name, value in (("train", train), ("test", test), ("stride", stride), ("steps", steps)):
            check_whole(name, value)
        check_whole("grid", grid, least=8)
        check_whole("train_limit", train_limit, optional=True)
        check_whole("test_limit", test_limit, optional=True)
        check_whole("data_seed", data_seed, least=0)
        check_fraction("val_fraction", val_fraction)
        if grid % stride:
            raise ValueError(f"stride must divide grid, received grid={grid} and stride={stride}")
        if not time > 0 or not epsilon * grid >= 1.5:
            raise ValueError(
                f"expected time > 0 and epsilon · grid >= 1.5 (points across a front), received time={time}, "
                f"epsilon={epsilon} and grid={grid}"
            )
        self.train, self.test, self.grid, self.stride, self.steps = train, test, grid, stride, steps
        self.epsilon, self.time, self.val_fraction, self.data_seed = epsilon, time, val_fraction, data_seed
        self.train_limit, self.test_limit = train_limit, test_limit

    @property
    def outline(self) -> Task:
        k = self.grid // self.stride
        return Task("dense", (1, k, k), (1, k, k))

    def load(self) -> Parts:
        x, u = self._part(0, self.train, self.train_limit)
        order = stratified_order(np.zeros(len(x), dtype=np.int64), self.data_seed)
        train, val = (torch.from_numpy(np.sort(index)) for index in take_validation(order, self.val_fraction, None))
        parts = {"train": (x[train], u[train]), "val": (x[val], u[val])}
        parts["test"] = self._part(1, self.test, self.test_limit)
        inputs = self.inputs(parts["train"][0], "channel")
        outline = self.outline
        task = Task(
            "dense",
            outline.input_shape,
            outline.output_shape,
            Normaliser.fit(u[train], "channel"),
            typical_norm(u[train]),
        )
        notes = (*check_inputs(parts, inputs), *check_targets(parts, task))
        return Parts(task, parts["train"], parts["val"], parts["test"], inputs.encode, inputs=inputs, notes=notes)

    def _part(self, part: int, count: int, limit: int | None) -> Pair:
        used = count if limit is None else min(count, limit)
        keep = slice(None, None, self.stride)
        fields = []
        for first in range(0, used, _CHUNK):
            start = random_field(
                min(_CHUNK, used - first), self.grid, seed=self.data_seed, stream=part, first=first
            ).astype(np.float32)
            end = evolve(start, self.time, self.epsilon, self.steps)
            fields.append(np.stack([start[:, keep, keep], end[:, keep, keep]]))
        x, u = torch.from_numpy(np.concatenate(fields, axis=1))[:, :, None]
        return x.contiguous(), u.contiguous()


def random_field(
    n: int, grid: int, *, seed: int, stream: int = 0, first: int = 0, alpha: float = 3.0, tau: float = 15.0
) -> Float[np.ndarray, "n grid grid"]:
    """Periodic Gaussian fields of mean 0 and variance about ¼ with spectrum (4π²|k|² + τ²)^{−α/2}; sample i depends on
    (seed, stream, i, grid) alone."""
    k = np.fft.fftfreq(grid, 1 / grid)[:, None], np.fft.rfftfreq(grid, 1 / grid)
    deviation = (4 * np.pi**2 * (k[0] ** 2 + k[1] ** 2) + tau**2) ** (-alpha / 2)
    deviation[0, 0] = 0.0
    twice = np.where((k[1] == 0) | (k[1] == grid / 2), 1, 2)  # modes of rfft2 that stand for two
    deviation /= 2 * np.sqrt((deviation**2 * twice).sum())
    fields = np.empty((n, grid, grid))
    for i in range(n):
        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, first + i)))
        white = rfft2(random.standard_normal((grid, grid)), norm="ortho")
        fields[i] = irfft2(white * deviation * grid, s=(grid, grid), norm="ortho")
    return fields


def evolve(
    u: Float[np.ndarray, "n grid grid"], time: float, epsilon: float, steps: int
) -> Float[np.ndarray, "n grid grid"]:
    """u at a later time, in the precision of u, see the module's text."""
    coarse, fine = _strang(u, time, epsilon, steps), _strang(u, time, epsilon, 2 * steps)
    return (4 * fine - coarse) / 3


def _strang(
    u: Float[np.ndarray, "n grid grid"], time: float, epsilon: float, steps: int
) -> Float[np.ndarray, "n grid grid"]:
    grid, step = u.shape[-1], time / steps
    k = np.fft.fftfreq(grid, 1 / grid)[:, None], np.fft.rfftfreq(grid, 1 / grid)
    decay = np.exp(-step * epsilon**2 * 4 * np.pi**2 * (k[0] ** 2 + k[1] ** 2)).astype(u.dtype)
    u = react(u, step / 2)
    for number in range(steps):
        u = irfft2(rfft2(u) * decay, s=(grid, grid))
        u = react(u, step / 2 if number == steps - 1 else step)
    return u


def react(u: np.ndarray, time: float) -> np.ndarray:
    """The solution of du/dt = u − u³ in closed form, u / √(u² + (1 − u²) e^{−2t})."""
    square = u * u
    decay = np.asarray(np.exp(-2 * time), u.dtype)
    return u / np.sqrt(square + (1 - square) * decay)
