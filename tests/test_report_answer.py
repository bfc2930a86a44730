"""The first lines of a page: the question, the answer with its uncertainty, and what to do next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig
from run_folders import align, counts, finetune, measure, words
from safetensors.numpy import save_file

from orca_rank.report.answer import Answer, answer
from orca_rank.report.posterior import rank_posteriors
from orca_rank.report.run_folder import read_run
from orca_rank.stages import report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "mine"


def said(run: Path, baselines: dict[str, float] | None = None) -> Answer:
    return answer(read_run(run, "run=mine"), baselines or {}, [])


def sweep(run: Path, proportional: list[float], uniform: list[float]) -> None:
    for rule, values in (("proportional", proportional), ("uniform", uniform)):
        for seed, value in enumerate(values):
            finetune(run, f"{rule}{seed}", value, rule=rule, seed=seed)


@pytest.mark.parametrize(
    ("proportional", "found"),
    [
        ([0.2, 0.21, 0.22], "Yes: proportional ranks have 23 % less error than uniform ranks of as many parameters "
                            "(95 % interval -23 to -23 %, 3 seeds)."),
        ([0.4, 0.41, 0.42], "No: proportional ranks have 34 % more error than uniform ranks of as many parameters "
                            "(95 % interval +34 to +34 %, 3 seeds)."),
        ([0.2, 0.31, 0.30], "Undecided: proportional ranks have 5.7 % less error than uniform ranks of as many "
                            "parameters (95 % interval -43 to +32 %, 3 seeds), so seeds alone could make this "
                            "difference."),
        ([0.2], "Not known: proportional ranks have 23 % less error than uniform ranks of as many parameters, but from "
                "one seed, and how much seeds differ is not known."),
    ],
)  # fmt: skip
def test_rules_are_compared_with_uniform_ranks(run: Path, proportional: list[float], found: str) -> None:
    sweep(run, proportional, [0.28, 0.29, 0.3])
    told = said(run)
    assert told.asked == "Do proportional ranks beat uniform ones when swin is fine-tuned on Far?"
    assert told.found == found
    best = "proportional" if min(proportional) < 0.28 else "uniform"
    assert told.beside.startswith(f"LoRA with {best} ranks (mean rank 4) is best on validation, with a test error of ")


def test_seeds_make_an_interval_and_their_lack_is_said(run: Path) -> None:
    finetune(run, "a", 0.1875, seed=0)
    assert said(run).found.endswith("a test error of 0.25 (one seed: how much seeds differ is not known).")
    finetune(run, "b", 0.3125, seed=1)
    assert said(run).found == (
        "LoRA with uniform ranks (mean rank 4) is best on validation, with a test error of 0.3125 [-0.4816, 1.107] "
        "(mean of 2 seeds, 95 % interval)."
    )


def test_both_ends_are_compared_with(run: Path) -> None:
    finetune(run, "a", 0.25)
    for name, method, val in (("full", "full", 0.125), ("linear_probe", "probe", 0.5)):
        finetune(run, name, val, options={"adapter": {"name": name, "method": method}})
    assert said(run).beside == "For comparison: frozen body 0.5625."
    assert said(run).found.startswith("Full fine-tuning is best on validation, with a test error of 0.1875 (one seed")
    assert said(run, {"solver": 0.1}).beside == said(run).beside  # a solver's relative L2 is no error of classes


def test_what_is_next_follows_from_what_is_open(run: Path) -> None:
    command = "python -m orca_rank"
    finetune(run, "a", 0.25, seed=0)
    assert said(run).command == f"{command} -m stage=finetune run=mine seed=0,1,2"
    finetune(run, "b", 0.26, seed=1)
    assert said(run).command == f"{command} stage=finetune run=mine rank=recommended"
    finetune(run, "c", 0.1, rule="proportional", seed=0, adapter=900)
    finetune(run, "d", 0.1, rule="proportional", seed=1, adapter=900)
    assert said(run).command == f"{command} stage=finetune run=mine rank=uniform"
    for seed, tag in enumerate("ef"):
        finetune(run, tag, 0.25 + seed / 100, seed=seed, adapter=900, options={"rank": {"other": 1}})
    assert said(run).command == f"{command} -m stage=finetune run=mine adapter=linear_probe,full"
    finetune(run, "g", 0.5, options={"adapter": {"name": "full", "method": "full"}})
    assert said(run).command == f"{command} stage=predict run=mine"
    finetune(run, "d", 0.249, rule="proportional", seed=1, adapter=900)
    assert said(run).next.startswith("take uniform ranks, which need no measurement, or add seeds")


@pytest.mark.parametrize(
    ("make", "asked", "found", "stage"),
    [
        (align, "How near to the source does alignment bring Far?",
         "OTDD on held-out data went from 3.25 [3, 3.5] to 1.75 [1.5, 2] (90 % intervals).", "measure"),
        (measure, "How far is Far from the source at every layer of swin?",
         "The MMD gap to the source has p < 0.05 in 4 of 8 layers (each layer tested by itself).", "align"),
        (counts, "How many parameters does the plan train?", "700 of 9,000, 500 of them in adapters.", "align"),
    ],
)  # fmt: skip
def test_before_any_fine_tune_the_last_stage_answers(
    run: Path, make: Callable[[Path], None], asked: str, found: str, stage: str
) -> None:
    make(run)
    told = said(run)
    assert (told.asked, told.found) == (asked, found)
    assert told.command == f"python -m orca_rank stage={stage} run=mine" and told.next.startswith("make the ")


def test_files_that_changed_come_first(run: Path) -> None:
    measure(run)
    counts(run)
    finetune(run, "a", 0.25)
    measure(run, family=True)
    assert said(run).next.startswith("some files were made from others that changed since")


def test_a_posterior_is_drawn_where_losses_of_every_rank_are(composed: Callable[..., DictConfig]) -> None:
    config = composed("stage=report", "run=mine")
    run = Path(config.paths.runs) / "mine"
    finetune(run, "one", 0.25)
    names = list(read_run(run, "run=mine").tunes[0].plan.ranks)  # type: ignore[union-attr]
    noise = np.random.default_rng(0).normal(0, 0.01, (5, 40))
    falling = {name: (np.maximum(0, number % 4 - np.arange(5))[:, None] + noise) for number, name in enumerate(names)}
    save_file({**falling, "ranks": np.arange(5)}, run / "finetune/one/rank_losses.safetensors")
    ranks, probability, sets = rank_posteriors(read_run(run, "run=mine").tunes[0])
    assert ranks == [0, 1, 2, 3, 4] and list(probability) == names
    for number, name in enumerate(names):  # below the rank where the loss stops to fall, nothing is probable
        assert probability[name].sum() == pytest.approx(1) and probability[name][: number % 4].sum() < 1e-6
        assert sets[name].any() and probability[name][sets[name]].sum() >= 0.9
    report.run(config)
    (said,) = [text for text in words(run) if text.startswith("Posterior of the rank of every layer given")]
    assert "held-out losses of one" in said and "of 5 ranks" in said
    assert (run / "report/posterior.svg").exists()
    few = {name: values[:, :4] for name, values in falling.items()}  # the rest of the report is still written
    save_file({**few, "ranks": np.arange(5)}, run / "finetune/one/rank_losses.safetensors")
    report.run(config)
    assert any("no posterior follows from them" in text for text in words(run))
