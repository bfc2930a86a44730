"""stage=report on run folders made by hand: what is there is shown, what is missing is named with its command."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from run_folders import align, counts, finetune, layers, measure, page
from torch import nn

from orca_rank.artifacts.files import write_json
from orca_rank.data.darcy import Darcy
from orca_rank.report.draw import Picture
from orca_rank.report.page import Page, cell
from orca_rank.report.run_folder import read_run
from orca_rank.report.tables import summary
from orca_rank.stages import gallery, report
from orca_rank.task import Task

COLUMNS = [
    "tag", "adapter", "rule", "budget", "mean_rank", "scale", "seed", "trainable_total", "trainable_adapter",
    "trainable_embedder", "trainable_predictor", "trainable_other", "total_parameters", "metric", "val", "test",
    "seconds", "epochs", "data", "backbone",
]  # fmt: skip


@pytest.fixture
def config(composed: Callable[..., DictConfig]) -> DictConfig:
    return composed("stage=report", "run=mine")


@pytest.fixture
def run(config: DictConfig) -> Path:
    return Path(config.paths.runs) / "mine"


def figures(text: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", text, re.S)


def test_a_whole_run_makes_one_self_contained_page(config: DictConfig, run: Path) -> None:
    for make in (align, measure, counts):
        make(run)
    finetune(run, "second", 0.5)
    finetune(run, "first", 0.25)
    report.run(config)
    text = page(run)

    assert not re.search(r'(src|href)="(?!data:(image/png;base64|text/csv)|#)', text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "") and "@import" not in text and "url(" not in text
    names = ("alignment", "layers", "ranks", "comparison_error", "curves_error", "parameters", "agreement",
             "gaps_sliced", "spectra_ot_map")  # fmt: skip
    wanted = {f"{n}.{end}" for n in names for end in ("svg", "csv")} | {"index.json"}
    assert {path.name for path in (run / "report").iterdir()} == wanted
    embedded = figures(text)
    assert len(embedded) == len(names) and all('role="img" aria-label="' in figure for figure in embedded)
    for name in names:
        alone = (run / f"report/{name}.svg").read_text()
        assert alone.partition("</style>")[2] in text  # the same marks
        with open(run / f"report/{name}.csv", newline="") as stream:
            assert f'download="{name}.csv"' in text and list(csv.DictReader(stream))
    order = [text.index(f'id="{anchor}"') for anchor in ("finetunes", "layers", "alignment", "details")]
    assert text.index('class="answer"') < order[0] and order == sorted(order)
    assert set(re.findall(r'href="#(\w+)"', text)) | {"say"} == set(re.findall(r' id="(\w+)"', text))

    plain = re.sub(r"<svg.*?</svg>", "", text, flags=re.S)
    for said in ("3.25 [3, 3.5]", "1.75 [1.5, 2]", "4 of 8", "first", "0.3125", "321", "700", "9,000", "near"):
        assert said in plain, said
    assert "Not there yet" not in plain
    assert plain.index("<td>first</td>") < plain.index("<td>second</td>")  # sorted by validation


def test_summary_has_one_row_a_fine_tune(config: DictConfig, run: Path) -> None:
    finetune(run, "b", 0.5, scale=4.0)
    finetune(run, "a", 0.25, scale={"min": 1.0, "max": 2.5})
    finetune(run, "c", 0.75)  # of before scales were written
    report.run(config)
    with open(run / "summary.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == COLUMNS
    assert [(row["tag"], row["scale"]) for row in rows] == [("a", "1 to 2.5"), ("b", "4"), ("c", "")]
    assert rows[0] | {"tag": "", "scale": ""} == {
        "tag": "", "adapter": "lora", "rule": "uniform", "budget": "mean_rank=4", "mean_rank": "4.0", "scale": "",
        "seed": "7", "trainable_total": "321", "trainable_adapter": "300", "trainable_embedder": "0",
        "trainable_predictor": "21", "trainable_other": "0", "total_parameters": "9000", "metric": "error",
        "val": "0.25", "test": "0.3125", "seconds": "2.5", "epochs": "3", "data": "a.b.Far", "backbone": "swin",
    }  # fmt: skip


def test_an_empty_run_is_an_error_that_names_the_command(config: DictConfig) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing to report: run `python -m orca_rank stage=all run=mine"):
        report.run(config)
    assert not (Path(config.paths.runs) / "mine").exists()


@pytest.mark.parametrize("make", [align, measure, counts])
def test_what_is_missing_is_named_with_its_command(
    config: DictConfig, run: Path, make: Callable[[Path], None], capsys: pytest.CaptureFixture
) -> None:
    make(run)
    report.run(config)
    text, printed = page(run), capsys.readouterr().out
    made = {align: "align", measure: "measure", counts: "plan"}[make]
    assert not (run / "summary.csv").exists()
    for stage in ("align", "measure", "plan", "finetune"):
        command = f"python -m orca_rank stage={stage} run=mine paths.runs={config.paths.runs}"
        assert (command in text) == (stage != made)
        assert (command in printed) == (stage != made)


def test_an_unfinished_fine_tune_is_named(config: DictConfig, run: Path) -> None:
    counts(run)
    (run / "finetune/half").mkdir(parents=True)
    report.run(config)
    assert "the fine-tune half, started but not finished" in page(run)


def test_names_are_escaped(config: DictConfig, run: Path) -> None:
    finetune(run, "<b>&x", 0.25)
    report.run(config)
    assert "&lt;b&gt;&amp;x" in page(run) and "<b>&x" not in page(run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("measure/layers.json", "{", r"layers\.json is damaged .* stage=measure run=mine .*force=true"),
        ("measure/layers.json", '{"schema": 1}', r"layers\.json lacks layers: run .*stage=measure"),
        ("plan/plan.json", '{"schema": 0}', r"plan\.json has schema 0.*stage=plan"),
        ("plan/plan.json", '{"schema": 1}', r"plan\.json lacks layers: run .*stage=plan"),
        ("measure/layers.json", '{"schema": 1, "layers": [{"name": "a"}]}', r"layers\.json is damaged .*d_in"),
        ("align/curve.csv", "epoch,loss\n0,high\n", r"curve\.csv is damaged .*stage=align"),
        ("align/curve.csv", "epoch\n0\n", r"curve\.csv lacks loss: .*stage=align"),
        ("finetune/one/metrics.json", '{"schema": 1, "metric": "error"}', r"metrics\.json lacks task.*stage=finetune"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_command(
    config: DictConfig, run: Path, name: str, content: str, message: str
) -> None:
    align(run)
    measure(run)
    counts(run)
    finetune(run, "one", 0.25)
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        report.run(config)
    assert not (run / "report.html").exists()


def test_a_plan_older_than_its_measurement_is_pointed_out(config: DictConfig, run: Path) -> None:
    measure(run)
    counts(run)
    write_json(run / "measure/layers.json", {"layers": layers(2.0)})
    report.run(config)
    assert "layers.json changed after" in page(run)


def test_a_figure_that_is_no_longer_made_is_removed(config: DictConfig, run: Path) -> None:
    counts(run)
    (run / "report").mkdir()
    (run / "report/old.png").write_bytes(b"")
    report.run(config)
    assert {path.name for path in (run / "report").iterdir()} == {
        f"{name}.{end}" for name in ("layers", "parameters", "ranks") for end in ("svg", "csv")
    }


def test_a_gallery_is_left_out_where_the_data_cannot_be_had(
    config: DictConfig, run: Path, capsys: pytest.CaptureFixture
) -> None:
    data = {"_target_": "orca_rank.data.darcy.Darcy", "source": "mat", "cache": "c", "root": "no-such-folder"}
    finetune(run, "one", 0.25, "relative_l2", data)
    report.run(config)
    assert "no gallery of predictions" in capsys.readouterr().out
    assert "relative L2" in page(run)


class FirstChannel(nn.Module):
    """A fitted model that predicts its input's first channel plus one."""

    task = Task("dense", (3, 8, 8), (1, 8, 8))

    @staticmethod
    def model(x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] + 1


def test_gallery_and_baselines_of_darcy(
    config: DictConfig, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"cache": str(tmp_path), "train": 6, "test": 5, "grid": 15, "stride": 2, "workers": 1, "batch_size": 5}
    finetune(run, "one", 0.25, "relative_l2", {"_target_": "orca_rank.data.darcy.Darcy", **options})
    monkeypatch.setattr(gallery, "load", lambda *_: FirstChannel())
    config.data.cache = str(tmp_path)
    report.run(config)
    assert (run / "report/predictions.svg").exists()
    assert "solver on the coarse grid" in page(run) and "repeated to the fine grid" in page(run)

    data = Darcy(**options)
    shown = gallery.predictions(run, "one", data)
    x, _ = next(iter(data.test_dataloader()))
    assert shown.inputs.shape == (4, 8, 8) and set(np.unique(shown.inputs)) <= {3.0, 12.0}
    assert np.array_equal(shown.predictions, x[:4, 0].numpy() + 1)
    assert np.array_equal(shown.targets, data.arrays("test").solution[:4])
    found = gallery.baselines(data)
    assert len(found) == 2 and all(0 < value < 1 for value in found.values())
    errors = ", ".join(map(cell, shown.metric))
    assert (
        "The first 4 test samples, predicted by one (the best on validation). All targets and predictions share one "
        f"colour scale, all differences another; relative L2 errors: {errors}."
    ) in page(run)


def test_predictions_and_baselines_are_made_once(
    config: DictConfig, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"cache": str(tmp_path), "train": 6, "test": 5, "grid": 15, "stride": 2, "workers": 1, "batch_size": 5}
    data = {"_target_": "orca_rank.data.darcy.Darcy", **options}
    finetune(run, "one", 0.25, "relative_l2", data)
    monkeypatch.setattr(gallery, "load", lambda *_: FirstChannel())
    config.data.cache = str(tmp_path)
    report.run(config)
    first = page(run)

    with monkeypatch.context() as patch:
        patch.setattr(gallery, "test_data", lambda *_: pytest.fail("the data were loaded again"))
        report.run(config)
        assert page(run) == first

    finetune(run, "one", 0.125, "relative_l2", data)  # another fine-tune: other predictions, the same baselines
    monkeypatch.setattr(gallery, "classical_baseline", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(FirstChannel, "model", staticmethod(lambda x: x[:, :1]))
    report.run(config)
    drawn = (run / "report/predictions.svg").read_text()
    assert drawn.partition("</style>")[2] not in first

    finetune(run.parent / "other", "one", 0.125, "relative_l2", data)  # and so in another run
    config.run = "other"
    report.run(config)
    assert "solver on the coarse grid" in page(run.parent / "other")


def test_summary_of_full_fine_tuning_has_no_plan(run: Path) -> None:
    finetune(run, "full", 0.25)
    (run / "finetune/full/ranks.json").unlink()
    (row,) = summary(read_run(run, "run=mine").tunes)
    assert (row["rule"], row["budget"], row["mean_rank"]) == ("", "", "")


def test_page_marks_numbers_and_folds() -> None:
    made = Page("t", "l")
    made.table([{"a": 1234567, "b": "x", "empty": ""}, {"a": 0.123456, "b": 2}], folded="more", keys=2)
    with made.fold("nothing"):
        pass
    with made.fold("something"):
        made.text("inside")
    text = made.html()
    assert '<td class="number">1,234,567</td><td>x</td>' in text and '<td class="number">0.1235</td>' in text
    assert "<details><summary>more</summary>" in text and '<table class="keys2">' in text and ">empty<" not in text
    assert "nothing" not in text and text.index("something</summary>") < text.index("<p>inside</p>")
    assert [cell(value) for value in (None, True, 12345.6, -0.5, "a")] == ["", "True", "12,346", "-0.5", "a"]


def test_large_data_lie_beside_the_page_only() -> None:
    made = Page("t", "l")
    made.figure("small", Picture(10, 10), "c", [{"a": 1, "b": "x, y"}])
    made.figure("large", Picture(10, 10), "c", [{"a": "0" * 100}] * 2000)
    text = made.html()
    assert 'download="small.csv" href="data:text/csv;charset=utf-8,a,b%0A1,%22x, y%22%0A"' in text
    assert "CSV: report/large.csv" in text and len(text) < 100_000 < len(made.files["large.csv"])


@pytest.mark.slow
def test_a_sweep_of_200_runs_is_a_small_page(config: DictConfig, run: Path) -> None:
    measure(run)
    for i in range(200):
        finetune(run, f"t{i:03}", 0.5 + i / 1000, seed=i % 2, adapter=300 + 10 * (i // 2))
    report.run(config)
    assert (run / "report.html").stat().st_size < 5_000_000
    assert page(run).count("<svg") < 20
