"""Darcy data sets on disk: generated (and cached) or the official .mat files.

Reference:
    [1] Li et al., Fourier Neural Operator (2020): piececonst_r421_N1024_smooth{1,2}.mat.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress
from threadpoolctl import threadpool_limits

from orca_rank.artifacts.damaged import DamagedFile, reading
from orca_rank.artifacts.files import atomic
from orca_rank.artifacts.shared import making
from orca_rank.data.array_files import read_npz
from orca_rank.data.darcy_field import sample_coefficient
from orca_rank.data.darcy_solver import MODES, solve_all
from orca_rank.data.groups import MissingArray
from orca_rank.data.mat_files import read_fields

_LAW = {"low": 3.0, "high": 12.0, "alpha": 2.0, "tau": 3.0, "format": 1}
CHUNK = 16  # samples that are solved, and kept on disk, together
GPU_CHUNK = 64
_WORTH_PROCESSES = 2e7  # grid points; below, starting processes costs more than it saves


class DarcyArrays(NamedTuple):
    """coefficient and solution, each (n, k, k), and how they were made (empty for .mat files)."""

    coefficient: np.ndarray
    solution: np.ndarray
    metadata: dict[str, Any]


def subsampled_size(grid: int, stride: int) -> int:
    """Points per side that are left of `grid` when every `stride`-th is kept."""
    if grid < 4 or stride < 1:
        raise ValueError(f"expected grid >= 4 and stride >= 1, received grid={grid}, stride={stride}")
    return -(-grid // stride)


def generate(
    n: int,
    *,
    folder: str | Path,
    grid: int = 421,
    stride: int = 5,
    mode: str = "fno",
    seed: int = 0,
    stream: int = 0,
    workers: int | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> DarcyArrays:
    """n samples of the published law, solved at `grid` and kept at every `stride`-th point; read back if cached.

    Sample i depends on (seed, stream, i, grid, mode, device) alone, not on n or workers; another device rounds
    otherwise. What is solved is kept beside the cache until all is there, and a later call goes on from it; of several
    processes that want the same one solves, and the others wait. In mode
    "fno" kept points lie at (stride · i + ½)/grid, in mode "clean" at stride · i/(grid − 1).

    Args:
        n: number of samples.
        folder: cache; one npz per set of parameters, moved into place when whole.
        grid, stride: points per side of the solve, and the subsampling (421 and 5 give 85).
        mode: discretisation, "fno" or "clean", see `orca_rank.data.darcy_solver`.
        seed, stream: of the coefficients, see `orca_rank.data.darcy_field.gaussian_field`.
        workers: processes, one thread each; null for one per core, and none where the work is small.
        device: "cpu", or a GPU, which solves `GPU_CHUNK` samples side by side (`darcy_batched`).
        progress: show a bar on a terminal.

    Raises:
        ValueError: for parameters out of range, or a device that is not there. DamagedFile: for a damaged cache file.
    """
    subsampled_size(grid, stride)
    if n < 1 or (workers is not None and workers < 1):
        raise ValueError(f"expected n >= 1 and workers >= 1 or null, received n={n}, workers={workers}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, received {mode!r}")
    parameters = {"n": n, "grid": grid, "stride": stride, "mode": mode, "seed": seed, "stream": stream, **_LAW}
    if device != "cpu":
        check_device(device)
        parameters["device"] = device.split(":")[0]
    name = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(folder) / f"darcy-{mode}-{grid}-{stride}-{name}.npz"
    if not path.exists():
        with making(path) as parts:
            if not path.exists():  # points of a sweep that run beside each other want the same
                _write(path, _solve_chunks(parameters, workers, device, progress, parts))
    return _read(path)


def sample_pairs(
    first: int, count: int, parameters: dict[str, Any], device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Samples first … first + count − 1, subsampled: coefficient, solution, iterations and fallbacks in total."""
    nodes = parameters["mode"] == "clean"
    with threadpool_limits(1):
        a = sample_coefficient(
            count,
            parameters["grid"],
            seed=parameters["seed"],
            first=first,
            stream=parameters["stream"],
            low=parameters["low"],
            high=parameters["high"],
            alpha=parameters["alpha"],
            tau=parameters["tau"],
            positions="nodes" if nodes else "centres",
        )
        if device == "cpu":
            solution = solve_all(a, parameters["mode"])
        else:
            from orca_rank.data.darcy_batched import solve_batch  # here, because torch takes a worker seconds

            solution = solve_batch(a, parameters["mode"], device=device)
    keep = slice(None, None, parameters["stride"])
    fallbacks = int(solution.fallback.sum())
    return a[:, keep, keep].copy(), solution.u[:, keep, keep].copy(), int(solution.iterations.sum()), fallbacks


def check_device(device: str) -> None:
    """Raise a ValueError for a device that is not there."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"data.device={device}: {str(error).splitlines()[0]}; expected cpu, or a GPU of this machine such as cuda"
        ) from error


def _solve_chunks(
    parameters: dict[str, Any], workers: int | None, device: str, progress: bool, parts: Path
) -> DarcyArrays:
    n, grid = parameters["n"], parameters["grid"]
    chunk = CHUNK if device == "cpu" else GPU_CHUNK
    starts = range(0, n, chunk)
    if device != "cpu":
        workers = 1
    elif workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = cores if n * grid**2 > _WORTH_PROCESSES else 1
    workers = min(workers, len(starts))
    began = time.perf_counter()
    size = subsampled_size(grid, parameters["stride"])
    a, u = np.empty((n, size, size), np.float32), np.empty((n, size, size), np.float32)
    iterations = fallbacks = 0
    console = Console(stderr=True, markup=False)
    with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task(f"Solving {n} Darcy problems at {grid}×{grid}", total=n)

        def keep(start: int, result: tuple[np.ndarray, np.ndarray, int, int]) -> None:
            nonlocal iterations, fallbacks
            count = len(result[0])
            a[start : start + count], u[start : start + count] = result[:2]
            iterations, fallbacks = iterations + result[2], fallbacks + result[3]
            bar.advance(task, count)

        found = {start: part for start in starts if (part := _read_part(parts, start, min(chunk, n - start), size))}
        for start, part in found.items():
            keep(start, part)
        missing = [start for start in starts if start not in found]
        arguments = {start: (start, min(chunk, n - start), parameters, device) for start in missing}
        if workers == 1 or len(missing) < 2:
            for start in missing:
                part = sample_pairs(*arguments[start])
                _write_part(parts, start, part)
                keep(start, part)
        else:
            with ProcessPoolExecutor(workers, mp_context=_Spawned()) as pool:
                jobs = {pool.submit(sample_pairs, *arguments[start]): start for start in missing}
                for job in as_completed(jobs):
                    _write_part(parts, jobs[job], job.result())
                    keep(jobs[job], job.result())
    metadata = {
        **parameters,
        "mean_iterations": iterations / n,
        "fallbacks": fallbacks,
        "seconds": time.perf_counter() - began,
        "workers": workers,
    }
    return DarcyArrays(a, u, metadata)


class _Worker(SpawnProcess):
    """A process that does not run the script that started it: work here is found by import, and a script without
    `if __name__ == "__main__"` would start workers of its own."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")  # without a file to run
        try:
            return SpawnProcess._Popen(process_obj)
        finally:
            sys.modules["__main__"] = main


class _Spawned(SpawnContext):
    """Spawns its workers, for forking a process that already runs threads (BLAS, torch) can deadlock."""

    Process = _Worker


Part = tuple[np.ndarray, np.ndarray, int, int]  # as `sample_pairs` gives it


def _write_part(parts: Path, start: int, part: Part) -> None:
    parts.mkdir(parents=True, exist_ok=True)
    with atomic(parts / f"{start}.npz") as temporary, open(temporary, "wb") as stream:
        np.savez(stream, coefficient=part[0], solution=part[1], counts=np.array(part[2:]))


def _read_part(parts: Path, start: int, count: int, size: int) -> Part | None:
    """A chunk that an interrupted call has left, if it is whole."""
    path = parts / f"{start}.npz"
    if not path.exists():
        return None
    try:
        a, u, counts = read_npz(path, ("coefficient", "solution", "counts"), "it is made again").values()
        iterations, fallbacks = map(int, counts)
    except (DamagedFile, MissingArray, ValueError):
        return None
    shape = (count, size, size)
    return (a, u, iterations, fallbacks) if a.shape == u.shape == shape and a.dtype == u.dtype == np.float32 else None


def _write(path: Path, data: DarcyArrays) -> None:
    with atomic(path) as temporary, open(temporary, "wb") as stream:
        np.savez(
            stream, coefficient=data.coefficient, solution=data.solution, metadata=np.array(json.dumps(data.metadata))
        )


def _read(path: Path) -> DarcyArrays:
    mend = "delete the file to make the data again"
    try:
        arrays = read_npz(path, ("coefficient", "solution", "metadata"), mend)
    except MissingArray as error:
        raise DamagedFile(f"the cached Darcy data {path} lack {error.name!r}: {mend}") from error
    a, u = arrays["coefficient"], arrays["solution"]
    with reading(path, mend):
        if a.shape != u.shape or a.ndim != 3 or a.dtype != np.float32 or u.dtype != np.float32:
            raise ValueError(f"coefficient {a.shape} {a.dtype} and solution {u.shape} {u.dtype}")
        return DarcyArrays(a, u, json.loads(str(arrays["metadata"])))


def read_mat(path: str | Path, stride: int = 1, limit: int | None = None) -> DarcyArrays:
    """The first `limit` samples of an official .mat file (version 5 or 7.3), every `stride`-th point.

    Raises:
        FileNotFoundError: if it is missing. DamagedFile: if it cannot be read. ValueError: if it holds other arrays, or
            NaN.
    """
    return DarcyArrays(*read_fields(Path(path), stride, limit), {})
