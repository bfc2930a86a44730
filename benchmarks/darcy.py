"""The Darcy solver against scipy's sparse direct solver on the same systems: time per sample and difference.

    python benchmarks/darcy.py                    # K = 85, 141 and 211, under a minute of one core
    python benchmarks/darcy.py --grids 421 --repeats 3

Both solve the same five-point systems (faces of the coefficient, f = 1) from the same coefficients on one thread,
alternated in one process; medians of the processor time over samples. Ours is float32 as the generator uses it, the
peer is scipy.sparse.linalg.spsolve in float64, with the matrix's assembly left out of its time.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from scipy.sparse.linalg import spsolve
from threadpoolctl import threadpool_limits

from orca_rank.data.darcy_field import sample_coefficient
from orca_rank.data.darcy_solver import face_coefficients, matrix, solve_all


def compare(K: int, repeats: int) -> None:
    """Print one row: both medians, their ratio, iterations and the largest relative difference."""
    coefficients = sample_coefficient(repeats, K, seed=0, positions="nodes")
    right = np.full((K - 2) ** 2, 1 / (K - 1) ** 2)
    solve_all(coefficients[:1], "clean")  # first use of the libraries
    ours, peer, difference, iterations = [], [], [], []
    for a in coefficients:
        began = time.process_time()
        solution = solve_all(a[None], "clean")
        ours.append(time.process_time() - began)
        system = matrix(*face_coefficients(a.astype(np.float64), "clean"))
        began = time.process_time()
        exact = spsolve(system, right)
        peer.append(time.process_time() - began)
        difference.append(np.linalg.norm(solution.u[0, 1:-1, 1:-1].ravel() - exact) / np.linalg.norm(exact))
        iterations.append(solution.iterations[0])
    fast, slow = statistics.median(ours), statistics.median(peer)
    print(
        f"{K:5d}  ours {1e3 * fast:8.2f} ms  spsolve {1e3 * slow:8.2f} ms  ratio {slow / fast:6.1f}  "
        f"iterations {np.mean(iterations):4.1f}  relative difference {max(difference):.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The Darcy solver against scipy.sparse.linalg.spsolve.")
    parser.add_argument("--grids", type=int, nargs="+", default=[85, 141, 211], metavar="K")
    parser.add_argument("--repeats", type=int, default=9, help="samples per grid (default: 9)")
    options = parser.parse_args()
    with threadpool_limits(1):
        for K in options.grids:
            compare(K, options.repeats)


if __name__ == "__main__":
    main()
