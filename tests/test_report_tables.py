"""Sweeps that can be read: which options differ, means over seeds, paired differences, several run folders."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from run_folders import FAR, finetune, words
from scipy import stats

from orca_rank.report.run_folder import read_run
from orca_rank.report.sections import spearman
from orca_rank.report.tables import differing, groups, means, summary
from orca_rank.stages import report


def optimised(lr: float, **more: Any) -> dict[str, Any]:
    return {"finetune": {"tag": None, "optimizer": {"_target_": "torch.optim.AdamW", "lr": lr}, **more}}


def ranked(rule: str, **options: Any) -> dict[str, Any]:
    return {"rank": {"_target_": f"orca_rank.ranks.{rule}", "_partial_": True, **options}}


def tunes(run: Path) -> list[Any]:
    return read_run(run, "run=mine").tunes


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def config(composed: Callable[..., DictConfig]) -> DictConfig:
    return composed("stage=report", "run=mine")


@pytest.fixture
def run(config: DictConfig) -> Path:
    return Path(config.paths.runs) / "mine"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (optimised(0.001), optimised(0.001), []),
        (optimised(0.001), optimised(0.003), ["finetune.optimizer.lr"]),
        (optimised(0.001, predictor_lr=None), optimised(0.001, predictor_lr=0.01), ["finetune.predictor_lr"]),
        (optimised(0.001, tag="a"), optimised(0.001, tag="b"), []),  # a name, no option of the result
        (optimised(0.001, epochs=3), optimised(0.001, epochs=6), ["finetune.epochs"]),
        (ranked("proportional", gamma=1.0), ranked("proportional", gamma=0.5), ["rank.gamma"]),
        (ranked("proportional", metric="mmd"), ranked("proportional", metric="sliced"), ["rank.metric"]),
        (ranked("shuffled", permutation=3), ranked("shuffled", permutation=4), ["rank.permutation"]),
        (ranked("proportional", gamma=1.0), ranked("uniform"), []),  # the rule says it
        (ranked("uniform", r=2), ranked("uniform", r=4), []),  # the budget says it
        ({"layers": {"target": "fc"}}, {"layers": {"target": "qkv"}}, ["layers.target"]),
        ({"data": FAR | {"grid": 32}}, {"data": FAR | {"grid": 64}}, ["data.grid"]),
        ({"data": FAR | {"grid": 32}}, {"data": {"_target_": "a.Near", "grid": 64}}, []),  # the data's class says it
        ({"data": FAR | {"cache": "a"}}, {"data": FAR | {"cache": "b"}}, []),  # where files lie
        ({"embedder": {"train": False}}, {"embedder": {"train": True}}, ["embedder.train"]),
        ({"trainer": {"devices": 1}}, {"trainer": {"devices": 2}}, []),
        (
            {"adapter": {"name": "lora", "module": {"alpha": 16, "rows": 1}}},
            {"adapter": {"name": "dora", "module": {"alpha": 4, "rows": 2}}},
            ["adapter.module.alpha"],  # a scale is always shown; what else an adapter brings with it is not
        ),
        ({"align": {"steps": [1, 2]}}, {"align": {"steps": [1, 3]}}, ["align.steps"]),
    ],
)
def test_options_that_differ(run: Path, first: dict, second: dict, expected: list[str]) -> None:
    finetune(run, "a", 0.25, options=first, seed=0)
    finetune(run, "b", 0.5, options=second, seed=1)
    assert differing(tunes(run)) == expected


def test_a_copy_of_the_seed_is_no_option_of_its_own(run: Path) -> None:
    for seed, other in ((0, 5), (1, 6)):
        data = FAR | {"seed": seed, "data_seed": other}
        finetune(run, f"t{seed}", 0.25, seed=seed, data=data)
    assert differing(tunes(run)) == ["data.data_seed"]


def test_summary_and_table_show_what_differs(config: DictConfig, run: Path) -> None:
    finetune(run, "slow", 0.5, options=optimised(0.001))
    finetune(run, "fast", 0.25, options=optimised(0.003) | {"layers": {"target": "fc"}})
    report.run(config)
    first, second = rows(run / "summary.csv")
    assert (first["tag"], first["finetune.optimizer.lr"], second["finetune.optimizer.lr"]) == ("fast", "0.003", "0.001")
    assert "layers.target" not in first  # only one of them has it
    found = words(run)
    head = found.index("lr")
    assert found[head - 1 : head + 2] == ["seed", "lr", "trainable"]
    assert not (run / "means.csv").exists()


def test_two_options_with_one_last_name_keep_their_whole_names(config: DictConfig, run: Path) -> None:
    for tag, lr in (("a", 0.1), ("b", 0.2)):
        finetune(run, tag, lr, options=optimised(lr) | {"align": {"optimizer": {"lr": 2 * lr}, "epochs": int(10 * lr)}})
    report.run(config)
    assert {"finetune.optimizer.lr", "align.optimizer.lr", "align.epochs"} <= set(words(run))


def sweep(run: Path, uniform: list[float], proportional: list[float], options: dict[str, Any] | None = None) -> None:
    for rule, values in (("uniform", uniform), ("proportional", proportional)):
        for seed, value in enumerate(values):
            finetune(run, f"{rule}{seed}", value - 0.0625, rule=rule, seed=seed, **(options or {}).get(rule, {}))


def test_means_over_seeds_have_students_interval(run: Path) -> None:
    sweep(run, [0.2, 0.3, 0.7], [0.1])
    (first, second) = groups(tunes(run))
    assert (first.first.rule, second.first.rule) == ("proportional", "uniform")
    assert second.test.mean == pytest.approx(0.4)
    expected = stats.t.interval(0.95, 2, 0.4, stats.sem([0.2, 0.3, 0.7]))
    assert second.test.interval() == pytest.approx(expected)
    assert first.test.interval() == (-float("inf"), float("inf"))


def test_there_is_no_difference_in_per_cent_of_no_error(config: DictConfig, run: Path) -> None:
    sweep(run, [0.0, 0.0], [0.0, 0.1])
    (group,) = [group for group in groups(tunes(run)) if group.first.rule == "proportional"]
    assert group.difference is None
    report.run(config)
    assert all(not row.get("to_uniform_percent") for row in rows(run / "means.csv"))


def test_differences_to_uniform_are_paired_by_seed(config: DictConfig, run: Path) -> None:
    sweep(run, [0.2, 0.4, 0.9], [0.21, 0.43])
    (group,) = [group for group in groups(tunes(run)) if group.first.rule == "proportional"]
    expected = stats.t.interval(0.95, 1, 100 * 0.02 / 0.3, 100 / 0.3 * stats.sem([0.01, 0.03]))
    assert group.difference is not None
    assert (group.difference.mean, group.difference.runs) == (pytest.approx(100 * 0.02 / 0.3), 2)
    assert group.difference.interval() == pytest.approx(expected)

    report.run(config)
    proportional, uniform = rows(run / "means.csv")
    assert (proportional["rule"], proportional["seeds"], proportional["pairs"]) == ("proportional", "2", "2")
    assert float(proportional["to_uniform_percent"]) == pytest.approx(100 * 0.02 / 0.3)
    assert [float(proportional[f"to_uniform_{end}"]) for end in ("low", "high")] == pytest.approx(expected)
    assert (uniform["seeds"], uniform["to_uniform_percent"], uniform["pairs"]) == ("3", "", "")
    assert float(uniform["test_mean"]) == pytest.approx(0.5)
    found = words(run)
    assert (
        "Means over seeds, in brackets 95 % intervals of Student's t. Difference to uniform: in per cent of uniform's "
        "error, paired by seed, at the same other options and as many adapter parameters (within 5 %); negative is "
        "better"
    ) in found
    place = found.index("pairs") + 1
    head = ["#", "adapter", "rule", "budget", "epochs", "seeds", "adapter parameters", "test error",
            "difference to uniform (%)"]  # fmt: skip
    assert found[place - 10 : place - 1] == head
    assert found[place : place + 9] == ["1", "lora", "proportional", "mean_rank=4", "3", "2", "300",
                                        "0.32 [-1.078, 1.718]",
                                        f"6.667 [{expected[0]:.4g}, {expected[1]:.4g}]"]  # fmt: skip
    assert any(
        "Test error of fine-tunes with 300 trainable parameters of the adapter; a small point a seed, a ring their "
        "mean with its 95 % interval, numbered as in the table of means. The best"
        in text
        and text.endswith("3 seeds.")
        for text in found
    )


@pytest.mark.parametrize(
    "options",
    [
        {"proportional": {"adapter": 330}},  # more parameters
        {
            "proportional": {"options": {"layers": {"target": "fc"}}},
            "uniform": {"options": {"layers": {"target": "q"}}},
        },
        {"proportional": {"options": {"adapter": {"name": "dora"}}}},
    ],
)
def test_only_like_is_compared_with_uniform(run: Path, options: dict[str, Any]) -> None:
    sweep(run, [0.2, 0.4], [0.2, 0.4], options)
    assert all(group.difference is None for group in groups(tunes(run)))


def test_rules_of_other_options_are_compared_with_the_same_uniform(run: Path) -> None:
    sweep(run, [0.2, 0.4], [])
    for gamma in (0.5, 1.0):
        for seed in range(2):
            options = ranked("proportional", gamma=gamma)
            finetune(run, f"p{gamma}{seed}", 0.2 + gamma, rule="proportional", seed=seed, options=options)
    found = {group.values["rank.gamma"]: group for group in groups(tunes(run))}
    assert found[0.5].difference is not None and found[1.0].difference is not None
    assert found[0.5].difference.mean < found[1.0].difference.mean
    assert len(means(tunes(run))) == 3


def test_a_longer_run_is_no_other_seed(run: Path) -> None:
    for seed, epochs in ((0, 3), (1, 3), (0, 6)):
        finetune(run, f"t{seed}{epochs}", 0.25, seed=seed, options=optimised(0.1, epochs=epochs))
    assert sorted(len(group.tunes) for group in groups(tunes(run))) == [1, 2]


def test_a_repetition_is_no_other_seed(config: DictConfig, run: Path) -> None:
    for folder, value in ((run, 0.25), (run.parent / "again", 0.5)):
        for seed in range(2):
            finetune(folder, f"t{seed}", value, seed=seed)
    finetune(run, "copy", 0.75, data=FAR | {"other": 1}, seed=0)
    finetune(run, "copy_of_copy", 0.75, data=FAR | {"other": 1}, seed=0)
    both = [*tunes(run), *read_run(run.parent / "again", "run=again").tunes]
    found = groups(both)
    assert [(len(group.tunes), group.values.get("run"), group.values.get("tag")) for group in found] == [
        (2, "mine", None), (2, "again", None), (1, None, "copy"), (1, None, "copy_of_copy"),
    ]  # fmt: skip


def test_several_run_folders_make_one_table(config: DictConfig, run: Path) -> None:
    finetune(run, "own", 0.5)
    finetune(run.parent / "sweep_a", "x", 0.25)
    finetune(run.parent / "sweep_b", "x", 0.75, seed=8)
    (run.parent / "sweep_c").mkdir()  # without a fine-tune
    config.report.runs = ["sweep_*", "sweep_a"]
    report.run(config)
    found = rows(run / "summary.csv")
    assert [(row["run"], row["tag"]) for row in found] == [("sweep_a", "x"), ("mine", "own"), ("sweep_b", "x")]
    assert next(iter(found[0])) == "run"
    assert {"sweep_a", "sweep_b", "mine"} <= set(words(run))
    assert len(means(tunes(run))) == 0


def test_a_run_without_anything_of_its_own_can_report_others(config: DictConfig, run: Path) -> None:
    finetune(run.parent / "a", "x", 0.25)
    config.report.runs = "a"
    report.run(config)
    assert rows(run / "summary.csv")[0]["tag"] == "x"
    assert not any("started but not finished" in text for text in words(run))


def test_a_name_that_fits_no_run_is_an_error(config: DictConfig, run: Path) -> None:
    finetune(run, "own", 0.5)
    config.report.runs = ["typo_*"]
    with pytest.raises(ValueError, match=r"report\.runs=typo_\*: no run with fine-tunes .* there are mine"):
        report.run(config)
    assert not (run / "report.html").exists()


def test_long_tables_are_cut_and_say_so(config: DictConfig, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orca_rank.report.tune_sections._ROWS", 2)
    monkeypatch.setattr("orca_rank.report.tune_sections._CURVES", 2)
    monkeypatch.setattr("orca_rank.report.details._COUNTS", 2)
    for i in range(3):
        finetune(run, f"t{i}", 0.25 + i, options=optimised(0.1 + i))
    report.run(config)
    found = words(run)
    assert (
        "Sorted by validation error (fraction of images; lower is better); the first 2 of 3, all are in summary.csv"
        in found
    )
    assert (
        "Training loss and validation error by epoch. The best 2 of 3. Each fine-tune is tested at its best validation "
        "epoch."
    ) in found
    assert (
        "Parameters that are trained, by part, those of the adapter on an axis of their own; the whole model has "
        "9,000. 1 more fine-tune is in summary.csv."
    ) in found
    assert len(summary(tunes(run))) == 3


@pytest.mark.parametrize(
    ("x", "y"), [([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]), ([1, 1, 2, 3, 3, 3], [0.5, 2.0, 2.0, 1.0, 7.0, 7.0])]
)
def test_spearman_is_scipys(x: list[float], y: list[float]) -> None:
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_spearman_of_a_constant_is_empty() -> None:
    assert spearman([1, 2], [3, 3]) == "" == spearman([3, 3], [1, 2])
