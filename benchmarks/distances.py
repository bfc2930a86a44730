"""Distances against the compositions they replace: time, peak memory, and the value both give.

    python benchmarks/distances.py                       # everything, a few minutes of one core
    python benchmarks/distances.py --only step mmd       # some rows; --repeats 3 for medians of three

Peer and ours are alternated in one process on one thread; medians of processor time and their ratio are printed. The
peer is written from its definition: distances between classes pair by pair, recomputed in every call, by matrix square
roots of class covariances (Gaussian) or by geomloss between the samples of the classes (exact), and
geomloss.SamplesLoss (p = 2, blur² = 0.1, scaling 0.5, debiased, tensorized) on features with the label appended. Ours
is run to a marginal error of 5e-4 at ε = 5e-4 of the data's scale. The step's own distances within the source are made
once for a whole alignment: their cost is printed beside it. Peak memory is that of a fresh process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import torch
from _machine import machine
from torch import Tensor

from orca_rank.distances import OTDDSource, gaussian, mmd, otdd

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import geomloss
    from geomloss._legacy.utils import squared_distances

Sample = tuple[Tensor, Tensor]


def sample(n: int, d: int, classes: int, shift: float, seed: int) -> Sample:
    """Gaussian classes with their own means, float32."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, d, generator=generator)
    label = torch.arange(n) % classes
    return means[label] + torch.randn(n, d, generator=generator) + shift, label


def root(matrix: Tensor) -> Tensor:
    """Matrix square root by eigendecomposition."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def peer_class_distances(a: list[Sample], b: list[Sample] | None) -> Tensor:
    """Bures-Wasserstein distances of (mean, covariance) pairs, one pair at a time."""
    rows = []
    for i, (mean, covariance) in enumerate(a):
        half = root(covariance)
        row = []
        for j, (other_mean, other) in enumerate(a if b is None else b):
            if b is None and j == i:
                row.append(mean.new_zeros(()))
                continue
            if b is None and j < i:
                row.append(rows[j][i])
                continue
            cross = root(half @ other @ half)
            row.append((mean - other_mean).square().sum() + (covariance + other - 2 * cross).trace().clamp_min(0))
        rows.append(row)
    return torch.stack([torch.stack(row) for row in rows])


def peer_exact_distances(a: list[Tensor], b: list[Tensor] | None) -> Tensor:
    """Transport between the samples of two classes by geomloss, one pair at a time; full cost, not differentiated."""
    loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.1**0.5, scaling=0.5, debias=True, backend="tensorized")
    found = torch.zeros(len(a), len(a if b is None else b))
    for i, group in enumerate(a):
        for j, other in enumerate(a if b is None else b):
            if b is not None or j > i:
                found[i, j] = 2 * loss(group.detach(), other.detach())
    return found if b is not None else found + found.T


def peer_otdd(x: Tensor, x_label: Tensor, y: Tensor, y_label: Tensor, exact: bool = False) -> Tensor:
    """OTDD as ORCA composes it; half cost."""
    sides: list[list[Any]] = []
    for z, label in ((x, x_label), (y, y_label)):
        groups = [z[label == c] for c in label.unique()]
        sides.append(groups if exact else [(g.mean(0), g.T.cov()) for g in groups])
    distances = peer_exact_distances if exact else peer_class_distances
    across = distances(sides[0], sides[1])
    w = torch.cat(
        [
            torch.cat([distances(sides[0], None), across], 1),
            torch.cat([across.T, distances(sides[1], None)], 1),
        ]
    )

    def cost(a: Tensor, b: Tensor) -> Tensor:  # (1, n, d + 1), (1, m, d + 1) -> (1, n, m)
        features = squared_distances(a[..., :-1], b[..., :-1]) / 2
        flat = w.shape[1] * a[:, :, None, -1].long() + b[:, None, :, -1].long()
        return features + w.flatten()[flat.flatten(1)].reshape(features.shape) / 2

    loss = geomloss.SamplesLoss(
        "sinkhorn", p=2, blur=0.1**0.5, scaling=0.5, cost=cost, debias=True, backend="tensorized"
    )
    first = torch.cat([x, x_label[:, None].to(x)], 1)
    second = torch.cat([y, (y_label + len(sides[0]))[:, None].to(y)], 1)
    return loss(first, second)


def peer_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Five-kernel biased MMD² through the broadcast (N, N, d) tensor of differences."""
    z = torch.cat([x, y])
    distances = (z[None] - z[:, None]).square().sum(2)
    bandwidth = distances.detach().sum() / (len(z) ** 2 - len(z)) / 4
    kernel = sum(torch.exp(-distances / (bandwidth * 2.0**i)) for i in range(5))
    n = len(x)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - kernel[:n, n:].mean() - kernel[n:, :n].mean()


def alternate(peer: Callable[[], Any], ours: Callable[[], Any], repeats: int) -> tuple[float, float, float, float]:
    """Median seconds of both, and the last value of both."""
    times: tuple[list[float], list[float]] = ([], [])
    values = [0.0, 0.0]
    for _ in range(repeats):
        for k, call in enumerate((peer, ours)):
            start = time.process_time()
            values[k] = float(call())
            times[k].append(time.process_time() - start)
    return statistics.median(times[0]), statistics.median(times[1]), values[0], values[1]


def show(name: str, peer: float, ours: float, wanted: float, unit: str = "s", note: str = "") -> None:
    print(f"{name:34} peer {peer:9.3f} {unit}   ours {ours:9.4f} {unit}   ratio {peer / ours:7.1f}   "
          f"(at least {wanted:g})   {note}", flush=True)  # fmt: skip


def gradient(y: Tensor, call: Callable[[Tensor], Tensor]) -> float:
    """The value, after its gradient by y was taken."""
    z = y.clone().requires_grad_()
    value = call(z)
    value.backward()
    return value.item()


def step(exact: bool, wanted: float, repeats: int) -> None:
    x, x_label = sample(5000, 128, 10, 0.0, 0)
    y, y_label = sample(128, 128, 1, 0.5, 1)
    inner = "exact" if exact else "gaussian"
    start = time.process_time()
    source = OTDDSource(x, x_label, inner=inner)
    prepared = time.process_time() - start
    peer, ours, a, b = alternate(
        lambda: gradient(y, lambda z: peer_otdd(x, x_label, z, y_label, exact)),
        lambda: gradient(y, lambda z: source.distance(z, y_label, detach_labels=exact).value),
        repeats,
    )
    show(f"{inner} step 5000 v 128, d 128", peer, ours, wanted,
         note=f"2 x half cost {2 * a:.2f}, ours {b:.2f}; source prepared once: {prepared:.2f} s")  # fmt: skip


def value(n: int, d: int, wanted: float, repeats: int) -> None:
    first, second = sample(n, d, 10, 0.0, 0), sample(n, d, 10, 0.2, 1)
    peer, ours, a, b = alternate(lambda: peer_otdd(*first, *second), lambda: otdd(*first, *second).value, repeats)
    show(f"value N {n}, d {d}, 10 v 10", peer, ours, wanted, note=f"2 x half cost {2 * a:.2f}, ours {b:.2f}")


def five_kernels(repeats: int) -> None:
    x, y = sample(500, 768, 1, 0.0, 0)[0], sample(500, 768, 1, 0.1, 1)[0]
    options = {"kernels": 5, "bandwidth": "mean", "unbiased": False}
    peer, ours, a, b = alternate(lambda: peer_mmd(x, y), lambda: mmd(x, y, **options), repeats)
    show("five-kernel MMD n 500, d 768", peer, ours, 100, note=f"{a:.6f}, ours {b:.6f}")
    x, y = x[:200], y[:200]  # the graph of the peer's differences takes gigabytes above
    peer, ours, a, b = alternate(
        lambda: gradient(y, lambda z: peer_mmd(x, z)), lambda: gradient(y, lambda z: mmd(x, z, **options)), repeats
    )
    show("the same with gradient, n 200", peer, ours, 50, note=f"{a:.6f}, ours {b:.6f}")


def norms(repeats: int) -> None:
    """Nuclear norms with their gradients, what `distances.gaussian` chooses its route by."""

    def by_singular_values(m: Tensor) -> Tensor:
        u, sigma, vh = torch.linalg.svd(m, full_matrices=False)
        return sigma.sum() + (u @ vh).sum()

    def by_gram(m: Tensor) -> Tensor:
        own, gaussian.SMALL_SIDE = gaussian.SMALL_SIDE, max(m.shape)
        try:
            norm, polar = gaussian._norm_and_polar(m, True)
        finally:
            gaussian.SMALL_SIDE = own
        assert polar is not None
        return norm.sum() + polar.sum()

    for count, rows, columns in ((200, 10, 29), (10, 128, 128)):
        m = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(0))
        ways: dict[str, Callable[[], Any]] = {
            "one by one": lambda m=m: [by_singular_values(one) for one in m],
            "batched": lambda m=m: by_singular_values(m),
            "by Gram matrices": lambda m=m: by_gram(m),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(max(repeats, 9)):
            for name, call in ways.items():
                start = time.process_time()
                call()
                times[name].append(time.process_time() - start)
        found = ", ".join(f"{name} {1e3 * statistics.median(some):.1f} ms" for name, some in times.items())
        print(f"{count} nuclear norms of {rows} x {columns} with gradients: {found}", flush=True)


def sliced(repeats: int) -> None:
    first, second = sample(100_000, 256, 10, 0.0, 0), sample(100_000, 256, 10, 0.2, 1)
    start = time.perf_counter()
    result = otdd(*first, *second, outer="sliced").value
    print(f"sliced OTDD N 100000, d 256, 10 v 10: {time.perf_counter() - start:.2f} s (under 30), value {result:.2f}")


def peak(what: str) -> None:
    """Run one call in this process and print what it added to the peak resident memory, in MB."""

    def rss() -> float:  # VmHWM starts afresh with the process; ru_maxrss would inherit the parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

    if what == "mmd":
        x, y = sample(500, 768, 1, 0.0, 0)[0], sample(500, 768, 1, 0.1, 1)[0]
        mmd(x[:50], y[:50])
        before = rss()
        mmd(x, y, kernels=5, bandwidth="mean", unbiased=False)
    elif what == "sliced":
        first, second = sample(100_000, 256, 10, 0.0, 0), sample(100_000, 256, 10, 0.2, 1)
        before = rss()
        otdd(*first, *second, outer="sliced")
    else:
        first, second = sample(5000, 128, 10, 0.0, 0), sample(5000, 128, 10, 0.2, 1)
        small = tuple(t[:200] for t in (*first, *second))
        call = peer_otdd if what == "peer" else otdd
        call(*small)
        before = rss()
        call(*first, *second)
    print(rss() - before)


def memory(repeats: int) -> None:
    added = {}
    for what in ("peer", "ours", "mmd", "sliced"):
        command = [sys.executable, "-W", "ignore", __file__, "--peak", what]
        added[what] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    show("peak memory N 5000, d 128", added["peer"], added["ours"], 2, "MB")
    print(f"five-kernel MMD adds {added['mmd']:.1f} MB (under 50); sliced OTDD at 1e5 adds {added['sliced']:.0f} MB "
          f"beside its inputs (under 1000)")  # fmt: skip


ROWS: dict[str, Callable[[int], None]] = {
    "step": lambda repeats: step(False, 50, repeats),
    "exact_step": lambda repeats: step(True, 50, repeats),
    "mmd": five_kernels,
    "norms": norms,
    "sliced": sliced,
    "value2000": lambda repeats: value(2000, 1024, 30, repeats),
    "value5000": lambda repeats: value(5000, 128, 3, repeats),
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--peak", choices=["peer", "ours", "mmd", "sliced"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        peak(options.peak)
        return
    for name in options.only:
        ROWS[name](options.repeats)
    print(machine())


if __name__ == "__main__":
    main()
