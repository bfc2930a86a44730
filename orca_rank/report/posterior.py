"""The posterior of every layer's rank, from the held-out losses that stage=rank_losses wrote: figure and section."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from orca_rank.artifacts.damaged import DamagedFile, reading
from orca_rank.report.layer_figures import posterior_figure
from orca_rank.report.page import Page
from orca_rank.report.results import Tune

NAME = "rank_losses"
LEVEL = 0.9  # of the credible sets
PRIOR_MEAN = 8.0  # a of conf/rank/posterior.yaml


def posteriors(page: Page, tunes: Sequence[Tune]) -> None:
    """A figure for every fine-tune with held-out losses of every rank; nothing where there is none.

    The prior is that of rank=posterior without a gap: the same for all layers.

    Raises:
        DamagedFile: if a file cannot be read.
    """
    found = [tune for tune in tunes if (tune.folder / f"{NAME}.safetensors").exists()]
    if not found:
        return
    page.section("posterior", "Posterior of every rank")
    for number, tune in enumerate(found):
        try:
            ranks, probability, sets = rank_posteriors(tune)
        except DamagedFile:
            raise
        except ValueError as error:  # too few images: the rest of the report does without
            page.text(f"{tune.tag} has held-out losses of every rank, but no posterior follows from them: {error}.")
            continue
        sizes = [int(one.sum()) for one in sets.values()]
        likely = [ranks[int(one.argmax())] for one in probability.values()]
        page.figure(
            "posterior" if number == 0 else f"posterior_{number + 1}",
            posterior_figure(probability, ranks),
            f"Posterior of the rank of every layer given the held-out losses of {tune.tag}, the stronger "
            f"the colour, the more probable. The most probable ranks lie between {min(likely)} and {max(likely)}; "
            f"{100 * LEVEL:.0f} % credible sets hold between {min(sizes)} and {max(sizes)} of {len(ranks)} ranks.",
            [
                {"layer": name, "rank": rank, "probability": f"{value:.5g}", "in the credible set": bool(inside)}
                for name, one in probability.items()
                for rank, value, inside in zip(ranks, one, sets[name], strict=True)
            ],
        )


def rank_posteriors(tune: Tune) -> tuple[list[int], dict[str, Float[np.ndarray, " ranks"]], dict[str, np.ndarray]]:
    """The ranks that were tried, P(rank | losses) and the credible set of every layer, as in rank=posterior."""
    theory = importlib.import_module("orca_rank.ranks.posterior")
    path = tune.folder / f"{NAME}.safetensors"
    with reading(path, "run stage=rank_losses again"):
        losses = importlib.import_module("safetensors.numpy").load_file(path)
    tried = losses.pop("ranks", None)
    first = next(iter(losses.values()))
    grid = np.arange(1, len(first) + 1) if tried is None else tried.astype(np.int64)
    prior = theory.rank_prior(PRIOR_MEAN, grid)
    probability = {
        name: theory.rank_posterior(values.astype(float), prior, theory.choose_tempering(values.astype(float)))
        for name, values in losses.items()
    }
    ordered = tune.plan.ranks if tune.plan is not None else probability
    probability = {name: probability[name] for name in ordered if name in probability} or probability
    return [int(rank) for rank in grid], probability, {n: theory.credible_set(p, LEVEL) for n, p in probability.items()}
