"""How often the posterior's credible sets hold the rank of least risk, where that rank is known.

    python benchmarks/posterior.py                        # prints coverage, writes posterior_calibration.png
    python benchmarks/posterior.py --repeats 400 --out runs/calibration.png

World: y = Σ_k c_k z_k + ε with z, ε standard normal and c_k falling in k. A model of rank r predicts with the first r
estimates c_k + e_k, so its risk is Σ_{k>r} c_k² + Σ_{k≤r} e_k² + 1: known, and least at an inner rank. The posterior
sees squared errors of n held-out images and an IBP stick-breaking prior; λ is chosen by cross-validation. Calibrated
sets lie on the diagonal; sets above it are wider than they need be.
"""

from __future__ import annotations

import argparse

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from orca_rank.ranks.posterior import choose_tempering, credible_set, rank_posterior, rank_prior

RANKS = np.arange(1, 17)
LEVELS = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
IMAGES = (100, 300, 1000)


def world(images: int, generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """Losses (ranks, images) and the index of the rank of least risk."""
    true = 0.8 * generator.uniform(0.55, 0.9) ** np.arange(len(RANKS))
    estimate = true + 0.08 * generator.standard_normal(len(RANKS))
    z = generator.standard_normal((len(RANKS), images))
    y = true @ z + generator.standard_normal(images)
    predictions = np.cumsum(estimate[:, None] * z, axis=0)  # row r - 1: the first r terms
    tail = np.concatenate([np.cumsum((true**2)[::-1])[::-1][1:], [0.0]])
    risk = tail + np.cumsum((estimate - true) ** 2)
    return (y - predictions) ** 2, int(risk.argmin())


def coverage(images: int, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """For every level: the share of sets that hold the best rank, and their mean size."""
    prior = rank_prior(8.0, RANKS)
    held, size = np.zeros(len(LEVELS)), np.zeros(len(LEVELS))
    for repeat in range(repeats):
        losses, best = world(images, np.random.default_rng([images, repeat]))
        probability = rank_posterior(losses, prior, choose_tempering(losses))
        for index, level in enumerate(LEVELS):
            inside = credible_set(probability, float(level))
            held[index] += inside[best]
            size[index] += inside.sum()
    return held / repeats, size / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", default="posterior_calibration.png")
    options = parser.parse_args()
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot([0.4, 1], [0.4, 1], color="0.6", linewidth=1, label="calibrated")
    print("images  " + "  ".join(f"{level:>12.0%}" for level in LEVELS) + "   (coverage, mean ranks in the set)")
    for images in IMAGES:
        held, size = coverage(images, options.repeats)
        print(f"{images:>6}  " + "  ".join(f"{h:>6.3f} ({s:>3.1f})" for h, s in zip(held, size, strict=True)))
        error = 2 * np.sqrt(held * (1 - held) / options.repeats)
        axis.errorbar(LEVELS, held, error, marker="o", capsize=2, label=f"{images} held-out images")
    axis.set(xlabel="level of the credible set", ylabel="share that holds the rank of least risk", ylim=(0.4, 1.02))
    axis.legend(frameon=False)
    figure.savefig(options.out, dpi=150)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
