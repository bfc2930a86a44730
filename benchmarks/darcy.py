"""The Darcy solver against sparse direct solvers on the same systems: time per sample and difference.

    python benchmarks/darcy.py                    # K = 85, 141 and 211, under a minute of one core
    python benchmarks/darcy.py --grids 421 --repeats 3
    python benchmarks/darcy.py --mode clean

Both start from the same coefficients on one thread, alternated in one process; medians of the processor time over
samples, and quartiles of their ratios. Ours, in float32 as the generator uses it and in float64, is the whole solve,
with the splines of mode "fno" (the default) between cell centres and nodes. The peer is SuperLU in float64 with its
symmetric ordering (MMD of AᵀA + A, symmetric mode; about 1.6 times faster than SciPy's default), and, where cvxopt is
installed (`pip install cvxopt`), CHOLMOD in float64 with the analysis of the pattern made once for all samples. Factors
and solution alone: neither the assembly of their matrices nor splines are in the peers' times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from _machine import machine
from scipy.sparse.linalg import splu
from threadpoolctl import threadpool_limits

try:
    import cvxopt
    import cvxopt.cholmod
except ImportError:
    cvxopt = None

from orca_rank.data.darcy_field import sample_coefficient
from orca_rank.data.darcy_solver import face_coefficients, matrix, solve_all


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


def superlu(system: Any, right: np.ndarray) -> np.ndarray:
    factors = splu(system, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    return factors.solve(right)


class Cholmod:
    """CHOLMOD with one analysis for all matrices of a pattern."""

    def __init__(self, system: Any) -> None:
        self.analysis = cvxopt.cholmod.symbolic(self._lower(system))

    @staticmethod
    def _lower(system: Any) -> Any:
        lower = system.tocoo()
        kept = lower.row >= lower.col
        entries = (lower.data[kept], lower.row[kept].astype(int), lower.col[kept].astype(int))
        return cvxopt.spmatrix(*(cvxopt.matrix(part) for part in entries), system.shape)

    def ready(self, system: Any, right: np.ndarray) -> Callable[[], np.ndarray]:
        matrix, vector = self._lower(system), cvxopt.matrix(right)

        def solved() -> np.ndarray:
            cvxopt.cholmod.numeric(matrix, self.analysis)
            cvxopt.cholmod.solve(self.analysis, vector)
            return np.array(vector).ravel()

        return solved


def compare(K: int, repeats: int, mode: str) -> None:
    """Print rows for float32 and for float64: medians, ratios, iterations and how far float32 is off."""
    coefficients = sample_coefficient(repeats, K, seed=0, positions="nodes" if mode == "clean" else "centres")
    right = np.full((K - 2) ** 2, 1 / (K - 1) ** 2)
    kinds = (np.float32, np.float64)
    times: dict[type, list[float]] = {kind: [] for kind in kinds}
    iterations: dict[type, list[int]] = {kind: [] for kind in kinds}
    peers: dict[str, list[float]] = {"SuperLU": []}
    cholmod, apart = None, []
    for kind in kinds:
        solve_all(coefficients[:1], mode, dtype=kind)  # first use of the libraries
    for a in coefficients:
        solutions = {}
        for kind in kinds:
            seconds, found = timed(lambda a=a, kind=kind: solve_all(a[None], mode, dtype=kind))
            times[kind].append(seconds)
            iterations[kind].append(int(found.iterations[0]))
            solutions[kind] = found.u[0].astype(np.float64)
        system = matrix(*face_coefficients(a.astype(np.float64), mode))
        seconds, exact = timed(lambda system=system: superlu(system, right))
        peers["SuperLU"].append(seconds)
        if cvxopt is not None:
            cholmod = cholmod or Cholmod(system)
            seconds, again = timed(cholmod.ready(system, right))
            peers.setdefault("CHOLMOD", []).append(seconds)
            assert np.linalg.norm(again - exact) < 1e-8 * np.linalg.norm(exact), "the two peers differ"
        if mode == "clean":  # the nodes are the output: compare with the peer itself
            solutions[np.float64] = np.pad(exact.reshape(K - 2, K - 2), 1)
        reference = solutions[np.float64]
        apart.append(float(np.linalg.norm(solutions[np.float32] - reference) / np.linalg.norm(reference)))
    for kind in kinds:
        for name, peer in peers.items():
            ratios = [slow / fast for slow, fast in zip(peer, times[kind], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
            print(
                f"{K:5d} {mode} {kind.__name__}  ours {1e3 * statistics.median(times[kind]):8.2f} ms  "
                f"{name} {1e3 * statistics.median(peer):8.2f} ms  ratio {middle:5.1f} ({low:.1f} to {high:.1f})  "
                f"iterations {statistics.mean(iterations[kind]):4.1f}",
                flush=True,
            )
    print(f"{K:5d} {mode} float32 differs by at most {max(apart):.1e} of the field's norm", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="The Darcy solver against sparse direct solvers.")
    parser.add_argument("--grids", type=int, nargs="+", default=[85, 141, 211], metavar="K")
    parser.add_argument("--repeats", type=int, default=9, help="samples per grid (default: 9)")
    parser.add_argument("--mode", choices=["fno", "clean"], default="fno")
    options = parser.parse_args()
    with threadpool_limits(1):
        for K in options.grids:
            compare(K, options.repeats, options.mode)
    print(machine(threads=1))


if __name__ == "__main__":
    main()
