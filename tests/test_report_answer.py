"""The first lines of a page: the question, the answer with its uncertainty, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from run_folders import align, counts, finetune, measure, words
from safetensors.numpy import save_file

from orca_rank.artifacts import command
from orca_rank.artifacts.provenance import key, plain
from orca_rank.build import build
from orca_rank.report.answer import Answer, answer
from orca_rank.report.posterior import rank_posteriors
from orca_rank.report.run_folder import read_run
from orca_rank.stages import report
from orca_rank.stages.finetune import finetune_config
from orca_rank.stages.planning import budget_of


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
    command, spent = "python -m orca_rank", "budget.mean_rank=null budget.total_rank=null budget.parameters"
    finetune(run, "a", 0.25, seed=0)
    assert said(run).command == f"{command} -m stage=finetune run=mine seed=1,2"
    finetune(run, "b", 0.26, seed=1)
    assert said(run).command == f"{command} stage=all run=mine rank=proportional {spent}=300"
    measure(run)
    assert said(run).command == f"{command} stage=finetune run=mine rank=proportional {spent}=300"
    finetune(run, "c", 0.1, rule="proportional", seed=0, adapter=900)
    finetune(run, "d", 0.1, rule="proportional", seed=1, adapter=900)
    assert said(run).command == f"{command} -m stage=finetune run=mine adapter=linear_probe,full"
    finetune(run, "g", 0.5, options={"adapter": {"name": "full", "method": "full"}})
    for seed, tag in enumerate("ef"):
        finetune(run, tag, 0.25 + seed / 100, seed=seed, adapter=900, options={"rank": {"other": 1}})
    assert said(run).command == f"{command} stage=predict run=mine finetune.tag=c"
    finetune(run, "d", 0.249, rule="proportional", seed=1, adapter=900)
    assert said(run).next.startswith("take uniform ranks, which need no measurement, or add seeds")
    assert said(run).command == " && ".join([f"{command} -m stage=finetune run=mine seed=2,3"] * 2)


def test_without_uniform_ranks_beside_them_these_are_next_and_a_use_in_the_end(run: Path) -> None:
    for seed, tag in enumerate("ab"):
        finetune(run, tag, 0.1, rule="proportional", seed=seed)
    assert said(run).command.startswith("python -m orca_rank stage=finetune run=mine rank=uniform ")
    for seed, tag in enumerate("cd"):
        finetune(run, tag, 0.25, seed=seed)
    finetune(run, "e", 0.5, options={"adapter": {"name": "full", "method": "full"}})
    assert said(run).command == "python -m orca_rank stage=predict run=mine finetune.tag=a"
    for file in ("predict/a.npz", "finetune/a/adapter/adapter_config.json", "plan/plan.json"):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).touch()
    (run / "plan/plan.json").unlink()
    assert said(run).command == ""
    counts(run)
    assert said(run).command == "python -m orca_rank stage=export run=mine finetune.tag=a"


def test_a_fine_tune_s_own_options_are_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that its folder says it was made with, not those of the report; what would make it again is left out."""
    given = ("experiment=darcy_table3", "rank.r=16", "stage=finetune", "run=x", "paths.data=d", "finetune.tag=mine")
    for tag, seed in (("a", 0), ("b", 1)):
        finetune(run, tag, 0.25, seed=seed, options={"finetune": {"tag": "mine"}, "rank": {"r": 16}})
        monkeypatch.setattr(command, "_given", (*given, f"seed={seed}", "force=true"))
        command.leave(run / "finetune" / tag)
    monkeypatch.setattr(command, "_given", ("stage=report", "run=mine", "report.runs=[y]"))
    start = "python -m orca_rank experiment=darcy_table3 paths.data=d"
    assert said(run).command == (
        f"{start} seed=0 stage=all run=mine finetune.tag=null rank=proportional ++rank.r=16 '~rank.r' "
        f"budget.mean_rank=null budget.total_rank=null budget.parameters=300"
    )
    assert command.other_rule("proportional", given[:1], 4)[1] == "'~rank.r'"
    assert command.other_rule("proportional", given[1:], 4)[1] == "budget.mean_rank=4"
    (run / "finetune/b/metrics.json").unlink()
    assert read_run(run, "run=mine").missing[-1] == (
        "the result of the fine-tune b, started but not finished",
        "python -m orca_rank experiment=darcy_table3 rank.r=16 paths.data=d finetune.tag=mine seed=1 stage=finetune "
        "run=mine",
    )


def points(line: str) -> list[list[str]]:
    """The options of every point of a command line that may sweep."""
    words = [word for word in shlex.split(line)[3:] if word != "-m"]
    parsed = OverridesParser.create().parse_overrides(words)
    values = [list(one.sweep_string_iterator()) if one.is_sweep_override() else [None] for one in parsed]
    found = []
    for row in product(*values):
        each = zip(words, parsed, row, strict=True)
        found.append([word if value is None else f"{one.key_or_group}={value}" for word, one, value in each])
    return found


WORDS = (
    "experiment=demo",
    "experiment=darcy_table3 stage=all paths.data=elsewhere",
    "experiment=darcy_table3 rank.r=16 stage=finetune",
    "data=digits backbone=vit_small rank=uniform rank.r=8 finetune.tag=mine finetune.epochs=3 force=true",
    "data=spectrograms rank=proportional budget.mean_rank=null budget.parameters=9000 adapter=dora predictor=orca",
    "data=digits 'run=x_${seed}' adapter=linear_probe",
)


@pytest.mark.slow  # of composing
@pytest.mark.parametrize("words", WORDS)
def test_each_next_command_composes_keeps_the_options_and_is_new(
    run: Path, composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    def tune(options: list[str]) -> None:
        config = composed(*options)
        sections = {**finetune_config(config)}
        build(config.rank), budget_of(config.budget)
        identity = (key(sections), str(sections["finetune"].pop("tag")))
        assert identity[0] not in done, "done before"
        kept = {name: sections[name] for name in ("data", "backbone", "predictor", "layers", "finetune")}
        kept["data"] = {name: value for name, value in kept["data"].items() if name != "seed"}
        assert not done or kept == first
        first.update(kept)
        done[identity[0]] = options
        assert plain(config.paths.data) == paths[0]
        rule = str(config.rank._target_).rpartition(".")[2]
        spent = int(config.budget.parameters or 3000)
        folder = run / "finetune" / f"t{len(done)}"
        options = [option for option in options if not option.startswith("paths.runs=")]
        monkeypatch.setattr(command, "_given", tuple(options))
        command.leave(folder)
        val = {"proportional": 0.1, "uniform": 0.2, "full": 0.4, "probe": 0.5}
        method = str(config.adapter.method)
        rule = rule if method == "inject" else ""
        finetune(run, folder.name, val[rule or method] + config.seed / 100, rule=rule,
                 seed=config.seed, adapter=spent, options=plain(OmegaConf.create(sections)))  # fmt: skip

    first: dict[str, object] = {}
    done: dict[str, list[str]] = {}
    start = shlex.split(words)
    paths = [composed(*start).paths.data]
    tune(start)
    measure(run)
    for _ in range(8):
        monkeypatch.setattr(command, "_given", ("stage=report", "run=mine"))
        for line in filter(None, said(run).command.split(" && ")):
            if "stage=predict" in line:
                assert composed(*points(line)[0]).finetune.tag in {path.name for path in (run / "finetune").iterdir()}
                return
            for options in points(line):
                tune(options)
    pytest.fail("it never ends")


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
