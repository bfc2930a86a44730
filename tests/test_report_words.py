"""What the report says is what the numbers say: every sentence of a page, word for word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from run_folders import NAMES, align, counts, finetune, layers, measure, plan, words

from orca_rank.artifacts.files import write_json
from orca_rank.report import sections
from orca_rank.stages import report

NOTE = "ρ: Spearman's rank correlation"


@pytest.fixture
def config(composed: Callable[..., DictConfig]) -> DictConfig:
    return composed("stage=report", "run=mine")


@pytest.fixture
def run(config: DictConfig) -> Path:
    return Path(config.paths.runs) / "mine"


def sentences(run: Path) -> list[str]:
    """The texts that are no cell of a table, head or body."""
    return [text for text in words(run) if " " in text and not text.replace(" ", "").startswith(("layers.", "{"))]


def test_every_sentence_of_a_whole_run(config: DictConfig, run: Path) -> None:
    for make in (align, measure, counts):
        make(run)
    finetune(run, "second", 0.5)
    finetune(run, "first", 0.25)
    report.run(config)
    again = f"python -m orca_rank -m stage=finetune run=mine paths.runs={config.paths.runs} seed=0,1"
    assert sentences(run) == [
        "orca_rank: mine",
        "orca_rank: mine",
        "swin, source Near f, target Far",
        "How well does swin do on Far with 321 of 9,000 parameters trained?",
        "LoRA with uniform ranks (mean rank 4) is best on validation, with a test error of 0.3125 (one seed: how much "
        "seeds differ is not known).",
        "The MMD gap to the source has p < 0.05 in 4 of 8 layers (each layer tested by itself).",
        f"Next: repeat it with other seeds: one says nothing of how much they differ (give the command the options "
        f"that it had): {again}",
        "Gap and rank of every layer", "Alignment of the embedder",
        "Test error of fine-tunes with 300 trainable parameters of the adapter, numbered as in the table. The best "
        "validation error, 0.25, is first's; its test error is 0.3125. All of them also train 21 others. One seed: the "
        "spread between seeds is not known.",
        "Sorted by validation error (fraction of images; lower is better)",
        "val error", "test error",
        "Training loss and validation error by epoch",
        "Training loss and validation error by epoch. Each fine-tune is tested at its best validation epoch.",
        "Gap and rank of every layer",
        "Calibrated MMD distance between what the source and a target send into every layer; 0 is what two halves of "
        "the same data would give. Upright lines are 95 % bootstrap intervals; filled marks have p < 0.05 (each layer "
        "tested by itself). Not drawn, because it orders the layers alike: sliced (ρ = 1.00). Below: the rank of every "
        "layer in one plan. Dashed: the rank that costs as many parameters where all layers have it, 3.50.",
        f"{NOTE} of the gap with the layer's place in the network",
        "p < 0.05", "median gap", "largest gap", "in layer", "ρ with depth",
        "target (Far)", "target (Far)",
        "The run's own target passes through the aligned embedder; near through an embedder as it was initialised, "
        "without alignment. Their gaps differ for that reason too.",
        "Rank of every layer beside its MMD gap, blocks under each other and kinds of layers beside each other; all "
        "ranks share one scale.",
        f"{NOTE} between rank and gap; empty where one is constant",
        "mean rank", "layers with rank 0", "adapter parameters", "ρ with the gap",
        "first, second",
        "Alignment of the embedder",
        "Objective OTDD, 2 epochs. Distance between source features and features of held-out target images (in "
        "brackets: 90 % interval from half-samples): OTDD 3.25 [3, 3.5] before, 1.75 [1.5, 2] after. The panels have "
        "different scales.",
        "Trainable parameters by part",
        "Parameters that are trained, by part, those of the adapter on an axis of their own; the whole model has "
        "9,000.",
        "Gaps in other metrics",
        "Calibrated sliced distance of the run's own target. Spearman's rank correlation with the MMD gap over layers: "
        "ρ = 1.00.",
        "Spectra of every layer",
        "What the optimal-transport map asks of the weight: singular values of W(T − I)Σ^½, per layer; each panel from "
        "0 to its largest value (upper right). Dashed: what noise alone reaches. Between 1 and 1 values a layer lie "
        "above it.",
        "Which measurements agree",
        "Rank correlation between depth and the measurements, over 8 layers of the run's own target. Neighbouring "
        "layers resemble each other, so these are descriptions, not tests.",
        "All layers as a table",
        "d_in × d_out", "MMD gap", "p (MMD)", "sliced gap", "p (sliced)",
        *[text for i in range(8) for text in ("8 × 8", *[f"{1 + i} [{0.9 + i:.4g}, {1.1 + i:.4g}]"] * 2)],
        "Every option of first",
    ]  # fmt: skip


def test_tables_say_what_the_files_say(config: DictConfig, run: Path) -> None:
    for make in (align, measure, counts):
        make(run)
    finetune(run, "one", 0.25)
    report.run(config)
    found = words(run)

    def row(start: str, after: str, length: int) -> list[str]:
        place = found.index(start, found.index(after))
        return found[place : place + length]

    gaps = "ρ with depth"
    assert row("target (Far)", gaps, 8) == ["target (Far)", "MMD", "8", "4", "4.5", "8", NAMES[-1], "1"]
    assert row("near", gaps, 8) == ["near", "MMD", "8", "4", "0.45", "0.8", NAMES[-1], "1"]
    ranks = "ρ with the gap"
    planned = ["plan.json", "proportional", "mean_rank=4", "3.5", "0", "7", "1", "500", "1"]
    assert row("plan.json", ranks, 9) == planned
    assert row("one", ranks, 8) == ["one", "uniform", "mean_rank=4", "4", "4", "4", "0", "300"]
    parts = (
        "Parameters that are trained, by part, those of the adapter on an axis of their own; the whole model has 9,000."
    )
    assert row("plan.json", parts, 6) == ["plan.json", "500", "100", "100", "0", "700"]
    assert row("one", parts, 6) == ["one", "300", "0", "21", "0", "321"]
    tunes = row("one", "Sorted by validation error (fraction of images; lower is better)", 10)
    assert tunes == ["one", "lora", "uniform", "mean_rank=4", "7", "321", "0.25", "0.3125", "3", "2.5"]


def test_p_values_for_all_layers_together_are_called_so(config: DictConfig, run: Path) -> None:
    measure(run, family=True)
    report.run(config)
    together = "permutation test for all layers together"
    assert f"The MMD gap to the source has p < 0.05 in 4 of 8 layers ({together})." in sentences(run)
    assert any(f"filled marks have p < 0.05 ({together})." in text for text in sentences(run))
    assert not any("each layer tested by itself" in text for text in words(run))


@pytest.mark.parametrize(
    ("config_of_layers", "expected"),
    [
        ({"backbone": {"name": "swin"}, "source": {"_target_": "x.Near"}, "data": {"_target_": "x.Far"}},
         "swin, source Near, target Far"),
        ({"source": {"_target_": "x.Near", "file": "my data of 2024"}, "data": {"_target_": "x.Far"}},
         "source Near my data of 2024, target Far"),
        ({"backbone": {"name": "swin"}}, "swin"),
        ({"data": {"_target_": "x.Far"}}, "target Far"),
        ({"backbone": {"name": "swin_tiny", "pretrained": "shipped", "shipped": "swin_micro"}}, "swin_micro"),
        ({"backbone": {"name": "swin_tiny", "pretrained": True, "shipped": "swin_micro"}}, "swin_tiny"),
    ],
)  # fmt: skip
def test_the_lead_names_backbone_source_and_target(
    config: DictConfig, run: Path, config_of_layers: dict, expected: str
) -> None:
    write_json(run / "measure/layers.json", {"layers": layers(1.0)}, config=config_of_layers)
    report.run(config)
    assert words(run)[2] == expected


def test_without_alignment_nothing_is_said_of_an_aligned_embedder(config: DictConfig, run: Path) -> None:
    measure(run)
    write_json(run / "measure/layers.json", {"layers": layers(1.0)}, config={"embedder": {"aligned": False}})
    report.run(config)
    assert not any("passes through the aligned embedder" in text for text in words(run))
    assert not any("Rank correlation between depth" in text for text in words(run))  # no agreement was measured
    assert "target" in words(run)  # without a class to name


def test_spectra_without_a_null_say_nothing_of_noise(config: DictConfig, run: Path) -> None:
    records = layers(1.0)
    for record in records:
        record["activation"] = {"singular_values": [2.0], "null": None, "energy": 4.0, "rank": None}
        record["gradient"] = record.pop("ot_map")
    write_json(run / "measure/layers.json", {"layers": records})
    report.run(config)
    found = [text for text in sentences(run) if "singular values" in text]
    assert found == [
        "The target loss's gradient at the start: singular values, per layer; each panel from 0 to its largest value "
        "(upper right). Dashed: what noise alone reaches. Between 1 and 1 values a layer lie above it.",
        "The target's inputs: singular values, per layer; each panel from 0 to its largest value (upper right).",
    ]


def test_files_that_changed_are_named_with_the_command(config: DictConfig, run: Path) -> None:
    measure(run)
    counts(run)
    write_json(run / "measure/layers.json", {"layers": layers(2.0)})
    report.run(config)
    (note,) = [text for text in words(run) if "changed after" in text]
    layers_json, plan_json = run / "measure/layers.json", run / "plan/plan.json"
    assert note.startswith(
        f"{layers_json} changed after {plan_json} was made from it: run `python -m orca_rank stage=plan"
    )


def test_many_changed_or_unfinished_files_are_counted(config: DictConfig, run: Path) -> None:
    measure(run)
    for i in range(7):
        finetune(run, f"t{i}", 0.5)
        metrics = run / f"finetune/t{i}/metrics.json"
        metrics.write_text(metrics.read_text().replace('"inputs": {}', '"inputs": {"../measure/layers.json": "0"}'))
        (run / f"finetune/u{i}").mkdir()
    report.run(config)
    found = words(run)
    assert sum("changed after" in text for text in found) == 5
    assert "2 more files were made from others that changed since." in found
    missing = found.index("Not there yet:")
    assert found[missing + 1].startswith("the alignment: python -m orca_rank stage=align run=mine")
    assert found[missing + 3].startswith(
        "the result of the fine-tune u0, started but not finished (give the command the options it had): python -m"
    )
    assert found[missing + 6] == "4 more of the last kind"


def test_what_is_missing_has_a_name(config: DictConfig, run: Path) -> None:
    align(run)
    report.run(config)
    found = words(run)
    place = found.index("Not there yet:")
    names = [text.partition(": ")[0] for text in found[place + 1 : place + 4]]
    assert names == ["the gap of every layer", "the rank plan and the parameter counts", "a finished fine-tune"]


def test_a_plan_of_many_fine_tunes_is_named_by_three(config: DictConfig, run: Path) -> None:
    for i in range(5):
        finetune(run, f"t{i}", 0.5, seed=i)
    report.run(config)
    assert "t0, t1, t2 and 2 more" in words(run)


def test_baselines_are_compared_with_in_words(
    config: DictConfig, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    finetune(run, "one", 0.25, "relative_l2", {"_target_": "a.b.Far"})
    monkeypatch.setattr(report, "_from_data", lambda *_: (None, {"solver on the coarse grid": 0.0625}))
    report.run(config)
    assert "For comparison: solver on the coarse grid 0.0625." in sentences(run)
    assert any("The best validation relative L2, 0.25, is one's; its test" in text for text in sentences(run))
    assert "for comparison, solver on the coarse grid: relative L2 0.0625" in capsys.readouterr().out


@pytest.mark.parametrize(("count", "said"), [(7, "1 more plan is"), (8, "2 more plans are")])
def test_plans_that_are_not_drawn_are_counted(config: DictConfig, run: Path, count: int, said: str) -> None:
    for i in range(count):
        finetune(run, f"t{i}", 0.5, rule="given", adapter=100 + i)
        write_json(run / f"finetune/t{i}/ranks.json", plan("given", [i, *range(7)]))
    report.run(config)
    assert (
        "Rank of every layer, blocks under each other and kinds of layers beside each other; all ranks share one "
        f"scale. {said} in the table only."
    ) in sentences(run)


def test_the_axes_of_distances_say_which_distance(
    config: DictConfig, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = {"before": {"value": 2.0}, "after": {"value": 1.0}}
    payload = {"objective": "mmd", "distances": dict.fromkeys(("otdd", "mmd", "sliced", "own"), pair)}
    write_json(run / "align/metrics.json", payload)
    drawn: list[list[str]] = []
    figure = sections.alignment_figure

    def watch(curve: Any, distances: Any, objective: str) -> Any:
        drawn.append([*distances, objective])
        return figure(curve, distances, objective)

    monkeypatch.setattr(sections, "alignment_figure", watch)
    report.run(config)
    labels = ["OTDD, full cost", "MMD², unbiased", "d · sliced W₂²", "own", "MMD (training)"]
    assert drawn == [labels]
