"""Darcy flow as ORCA and FNO use it: coefficient to pressure on a grid of 85×85.

Reference:
    [1] Li et al., Fourier Neural Operator (2020).
    [2] Shen et al., Cross-Modal Fine-Tuning: Align then Refine (ORCA, 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from orca_rank.artifacts.provenance import contents_hash
from orca_rank.data.checks import check_inputs, check_targets
from orca_rank.data.darcy_data import DarcyArrays, generate, read_mat, subsampled_size
from orca_rank.data.darcy_field import gaussian_field, sample_coefficient
from orca_rank.data.darcy_solver import MODES, solve, solve_all
from orca_rank.data.mat_files import grid_of
from orca_rank.data.module import Encode, InMemory, Parts, check_choice, check_fraction, check_whole
from orca_rank.data.splits import stratified_order, take_validation
from orca_rank.task import Normaliser, Task, relative_l2, typical_norm

__all__ = [
    "Darcy",
    "classical_baseline",
    "coarse_solve",
    "gaussian_field",
    "generate",
    "read_mat",
    "sample_coefficient",
    "solve",
    "solve_all",
]


@dataclass(frozen=True)
class WithCoordinates:
    """(B, 1, k, k) coefficients to the channels (a, x, y): a normalised, x along columns, y along rows, in [0, 1]."""

    normaliser: Normaliser

    def __call__(self, a: Tensor) -> Float[Tensor, "b 3 k k"]:
        count, _, k, _ = a.shape
        line = torch.linspace(0, 1, k, device=a.device)
        x, y = line.expand(count, 1, k, k), line[:, None].expand(count, 1, k, k)
        return torch.cat([self.normaliser.encode(a), x, y], dim=1)


class Darcy(InMemory):
    """Darcy flow: input channels (a, x, y), target u in physical units; `task.normaliser` decodes the network's output.

    Both normalisers are per pixel and fitted on the training part alone. Validation is a split of the training set.

    Args:
        cache: folder for generated data.
        root: folder of the official .mat files.
        source: "generated" (published-script-equivalent) or "mat".
        train, test: number of samples; ORCA takes the first 1,000 of smooth1 and the first 100 of smooth2.
        grid, stride: points per side of the solve, and the subsampling; for "mat" the file says the grid.
        mode: "fno" (the published route) or "clean", see `orca_rank.data.darcy_solver`. Generated data only.
        val_fraction: of the training samples, held out for validation.
        train_limit, test_limit: use only the first so many of `train` and `test`.
        data_seed: of the generated samples and the validation split.
        files: the .mat pair, relative to root.
        workers: processes for generating; null for one per core.
        device: where new samples are solved: "cpu", or a GPU such as "cuda", equal to 1e-6 of a field's norm.
        batch_size, seed, statistics: see `InMemory`.

    Raises:
        ValueError: for an unknown source or sizes out of range, or fields that never vary; FileNotFoundError,
            DamagedFile, ValueError from `read_mat`.
    """

    def __init__(
        self,
        *,
        cache: str | Path,
        root: str | Path = "data",
        source: str = "generated",
        train: int = 1000,
        test: int = 100,
        grid: int = 421,
        stride: int = 5,
        mode: str = "fno",
        val_fraction: float = 0.1,
        train_limit: int | None = None,
        test_limit: int | None = None,
        data_seed: int = 0,
        files: Sequence[str] = (
            "piececonst_r421_N1024_smooth1.mat",
            "piececonst_r421_N1024_smooth2.mat",
        ),
        workers: int | None = None,
        device: str = "cpu",
        batch_size: int = 4,
        seed: int = 0,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(batch_size, seed, statistics)
        check_choice("source", source, ("generated", "mat"))
        check_choice("mode", mode, MODES)
        for name, value in (("train", train), ("test", test), ("grid", grid), ("stride", stride)):
            check_whole(name, value)
        for name, limit in (("train_limit", train_limit), ("test_limit", test_limit), ("workers", workers)):
            check_whole(name, limit, optional=True)
        check_whole("data_seed", data_seed, least=0)
        check_fraction("val_fraction", val_fraction)
        if len(files) != 2:
            raise ValueError(f"files must name the training and the test file, received {list(files)}")
        if source == "mat" and Path(files[0]) == Path(files[1]):
            raise ValueError(f"data.files={list(files)} names one file twice: training samples would be tested on")
        self.cache, self.root, self.source, self.files = Path(cache), Path(root), source, tuple(files)
        self.train, self.test, self.grid, self.stride, self.mode = train, test, grid, stride, mode
        self.val_fraction, self.train_limit, self.test_limit = val_fraction, train_limit, test_limit
        self.data_seed, self.workers, self.device = data_seed, workers, str(device)

    @property
    def outline(self) -> Task:
        """Shapes of the task without making the data or reading them."""
        k = subsampled_size(self.points, self.stride)
        return Task("dense", (3, k, k), (1, k, k))

    @property
    def points(self) -> int:
        """Points per side before the subsampling: what a .mat file that is there says, or else `grid`."""
        path = self.root / self.files[0]
        return grid_of(path) if self.source == "mat" and path.is_file() else self.grid

    @property
    def contents(self) -> str | None:
        return contents_hash([self.root / name for name in self.files]) if self.source == "mat" else None

    def arrays(self, part: str) -> DarcyArrays:
        """The "train" or "test" samples, limited: coefficient and solution in physical units, (n, k, k)."""
        is_test = part == "test"
        count, limit = (self.test, self.test_limit) if is_test else (self.train, self.train_limit)
        used = count if limit is None else min(count, limit)
        if self.source == "mat":
            return read_mat(self.root / self.files[is_test], self.stride, used)
        data = generate(
            count,
            folder=self.cache,
            grid=self.grid,
            stride=self.stride,
            mode=self.mode,
            seed=self.data_seed,
            stream=int(is_test),
            workers=self.workers,
            device=self.device,
        )
        return data._replace(coefficient=data.coefficient[:used], solution=data.solution[:used])

    def load(self) -> Parts:
        everything, test = self.arrays("train"), self.arrays("test")
        if everything.coefficient.shape[1:] != test.coefficient.shape[1:]:
            raise ValueError(
                f"train and test have different grids: {everything.coefficient.shape} and {test.coefficient.shape}"
            )
        a, u = (torch.from_numpy(field)[:, None] for field in everything[:2])  # (n, 1, k, k)
        order = stratified_order(np.zeros(len(a), dtype=np.int64), self.data_seed)
        train, val = (torch.from_numpy(np.sort(index)) for index in take_validation(order, self.val_fraction, None))
        k = a.shape[-1]
        parts = {"train": (a[train], u[train]), "val": (a[val], u[val])}
        parts["test"] = (torch.from_numpy(test.coefficient)[:, None], torch.from_numpy(test.solution)[:, None])
        inputs = self.inputs(parts["train"][0], "pixel")
        task = Task("dense", (3, k, k), (1, k, k), Normaliser.fit(u[train]), typical_norm(u[train]))
        notes = (*check_inputs(parts, inputs), *check_targets(parts, task))
        encode = WithCoordinates(inputs)
        return Parts(task, parts["train"], parts["val"], parts["test"], encode, inputs=inputs, notes=notes)

    def everything(self) -> tuple[Tensor, Tensor]:
        """All training samples and then all test samples, each in the order of its file."""
        x, y = (
            torch.cat([torch.from_numpy(self.arrays(part)[i])[:, None] for part in ("train", "test")]) for i in (0, 1)
        )
        return x, y

    def encoder(self) -> Encode:
        return self.parts.encode if self.given is None else WithCoordinates(self.given)


def coarse_solve(a: Float[np.ndarray, "n k k"], grid: int | None = None, stride: int = 1) -> Float[np.ndarray, "n k k"]:
    """The finite-difference answer from the coarse coefficient alone: what a network has to beat.

    Args:
        a: subsampled coefficients.
        grid: None solves on the coarse grid, its points taken as the nodes i/(k − 1), harmonic face means. A number
            repeats the nearest known value on a fine grid of `grid` points a side, on which a holds every `stride`-th
            point, solves there in mode "fno" and keeps the same points.
        stride: see grid.
    """
    k = a.shape[-1]
    if grid is None:
        return solve(a, "clean")
    if subsampled_size(grid, stride) != k:
        raise ValueError(f"every {stride}-th point of {grid} is not {k} points")
    nearest = np.minimum((np.arange(grid) + stride // 2) // stride, k - 1)
    return np.concatenate([solve(sample[None, nearest][:, :, nearest], "fno")[:, ::stride, ::stride] for sample in a])


def classical_baseline(data: Darcy, upsample: bool = False) -> float:
    """Mean relative L2 error on the test set of a classical solver that sees what the network sees.

    Args:
        data: the dataset.
        upsample: solve on the coefficient repeated to the original grid (about 0.1 s a sample at 421) instead of on
            the coarse grid.
    """
    test = data.arrays("test")
    u = coarse_solve(test.coefficient, data.points if upsample else None, data.stride).astype(np.float64)
    prediction, target = (torch.from_numpy(field.astype(np.float64))[:, None] for field in (u, test.solution))
    without_norm = (target.flatten(1).abs().amax(1) == 0).any()
    return float(relative_l2(prediction, target, data.task.typical_norm if without_norm else None).mean())
