"""What the stages show beside their curves: the pages, W&B's offline files read back, and what a server is sent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import run_folders
from omegaconf import DictConfig
from shared import TINY_FINETUNE, break_off
from wandb_files import Run, read_all
from wandb_server import serving

from orca_rank.artifacts.command import TYPED, remember, swept
from orca_rank.measuring.records import Layer
from orca_rank.stages import align, dashboard, finetune, measure, plan
from orca_rank.tracking import pages
from orca_rank.tracking.page import Job

Compose = Callable[..., DictConfig]
TRACKED = ("stage=finetune", *TINY_FINETUNE, "rank=uniform", "rank.r=2", "logger=wandb")


def runs_of(config: DictConfig) -> list[Run]:
    return read_all(Path(config.paths.runs))


def kinds(run: Run) -> dict[str, str]:
    """Name -> how a run is with its artifact, but those that W&B makes of tables."""
    return {name: "used" if used else "made" for name, kind, used, _, _ in run.artifacts if kind != "run_table"}


def test_a_broken_off_fine_tune_goes_on_with_its_page_and_others_have_their_own(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "local-" + "0" * 40)
        config = composed(*TRACKED, "finetune.epochs=2", "finetune.tag=one")
        break_off(monkeypatch, config, epoch=1)
        other = composed(*TRACKED, "rank.r=1", "finetune.tag=other")
        finetune.run(other)
        finetune.run(config)
        assert server.requests == 0
    broken, second, resumed = runs_of(config)
    assert (broken.exit, second.exit, resumed.exit) == (1, 0, 0)
    assert broken.id == resumed.id != second.id
    assert {run.group for run in (broken, second)} == {"default"} and second.job_type == "finetune"
    assert (broken.name, second.name) == ("one", "other")
    epochs = [row["epoch"] for run in (broken, resumed) for row in run.history if "train/loss" in row]
    assert epochs == [0, 1]


def test_the_page_of_a_fine_tune(composed: Compose) -> None:
    config = composed(*TRACKED, "data.test_limit=24")
    finetune.run(config)
    (run,) = runs_of(config)
    options = {name: value for name, value in run.config.items() if not name.startswith("_wandb")}
    assert not [name for name, value in options.items() if isinstance(value, dict | list) or "." in name]
    assert (options["finetune/optimizer/lr"], options["lr"], options["rule"], options["mean_rank"]) == (
        0.01, 0.01, "uniform", 2,
    )  # fmt: skip
    (path,) = (Path(config.paths.runs) / "default/finetune").glob("*/metrics.json")
    metrics = json.loads(path.read_text())
    assert (run.summary["test"], run.summary["val"]) == (metrics["test/error"], metrics["val/error"])
    assert run.summary["trainable/total"] == metrics["trainable_parameters"]["total"]
    assert run.lowest >= {"val/*", "test/*", "train/*", "loss"}
    assert run.summary["val/error"] == {"min": metrics["val/error"]}
    assert {"lr/base", "lr/lora_B", "lr/embedder", "lr/predictor"} <= {name for row in run.history for name in row}
    (table,) = path.parent.glob("log/wandb/offline-run-*/files/media/table/layers_*.json")
    written = json.loads(table.read_text())
    assert written["columns"] == ["layer", "depth", "d_in", "d_out", "rank", "parameters"]
    assert {row[4] for row in written["data"]} == {2}
    assert run.history[-1]["ranks_table/_type"] == "table-file"  # the chart's
    assert kinds(run) == {"default-plan": "used", f"default-{path.parent.name}": "made"}


@pytest.mark.slow
def test_what_is_synced_is_one_page_a_stage_with_the_lineage_of_its_files(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("logger=wandb", *TINY_FINETUNE, "embedder.aligned=true", "source=digits", "source.train_limit=60",
               "align.epochs=2", "align.held_out.resamples=2", "gap.samples=24", "rank=proportional")  # fmt: skip
    config = composed(*options, "finetune.epochs=3")
    for stage in (align, measure, plan):
        stage.run(config)
    break_off(monkeypatch, config, epoch=2)
    finetune.run(config)
    folders = [str(path) for path in Path(config.paths.runs).rglob("offline-run-*")]
    assert len(folders) == 5
    with serving() as server:
        environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "local-" + "0" * 40}
        environment.pop("WANDB_MODE")
        command = [sys.executable, "-m", "wandb", "sync", "--yes", *folders]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    by_stage = {run["jobType"]: name for name, run in server.runs.items()}
    assert by_stage.keys() == {"align", "measure", "plan", "finetune"} and len(server.runs) == 4
    assert {run["groupName"] for run in server.runs.values()} == {"default"}
    losses = [row["epoch"] for row in server.rows(by_stage["finetune"]) if "train/loss" in row]
    assert losses == [0, 1, 2]
    steps = [row["_step"] for row in server.rows(by_stage["finetune"])]
    assert steps == sorted(set(steps))
    assert [row["lr"] for row in server.rows(by_stage["align"]) if "lr" in row] == [0.01, 0.01]
    artifact = {kind: name for (_, kind, _), name in server.artifacts.items()}  # one of each kind: contents are equal
    assert sum(kind != "run_table" for _, kind, _ in server.artifacts) == 4
    used = {
        (stage, kind) for stage in by_stage for kind in artifact if (by_stage[stage], artifact[kind]) in server.used
    }
    assert used == {("measure", "embedder"), ("plan", "measurement"), ("finetune", "embedder"),
                    ("finetune", "measurement"), ("finetune", "plan")}  # fmt: skip


def test_pages_are_read_from_the_files_of_a_run(tmp_path: Path) -> None:
    run_folders.align(tmp_path)
    page = pages.align_page(tmp_path)
    assert page.summary["distance/otdd"] == 1.75 and page.tables["distances"][0]["before_high"] == 3.5
    run_folders.measure(tmp_path, family=True)
    page = pages.measure_page(tmp_path, ["align/embedder.safetensors"])
    row = page.tables["layers"][1]
    assert (row["mmd_gap"], row["mmd_low"], row["mmd_p"]) == (2.0, pytest.approx(1.9), 0.01)
    assert [files.kind for files in (*page.used, *page.made)] == ["embedder", "measurement"]
    assert "compare/near" in page.tables
    run_folders.counts(tmp_path)
    page = pages.plan_page(tmp_path)
    assert [row["rank"] for row in page.tables["layers"]] == list(range(8))
    assert page.config == {"rule": "proportional", "budget": "mean_rank=4", "mean_rank": 3.5}
    run_folders.finetune(tmp_path, "dense", 0.25, "relative_l2")
    layers = [Layer.from_dict(one) for one in run_folders.layers(1.0)]
    page = pages.finetune_page(tmp_path / "finetune/dense", layers, {"predictions": b"png"})
    assert page.summary["test"] == 0.3125 and page.pictures == {"predictions": b"png"}
    assert {chart.kind for chart in page.charts.values()} == {"bar", "scatter"}
    (adapter,) = page.made
    assert set(adapter.files) == {"metrics.json", "ranks.json"}


def test_a_point_of_a_sweep_is_named_by_what_the_sweep_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = "-m stage=finetune rank.r=1,2 seed=range(3) 'layers.target=(a,b)$' force=true data.x=[1,2] 'run=\"a,b\"'"
    monkeypatch.setenv(TYPED, typed)
    remember(["stage=finetune", "rank.r=2", "seed=0", "layers.target=(a,b)$", "force=True", "data.x=[1,2]", "added=1"])
    assert swept() == ["rank.r=2", "seed=0", "added=1"]
    assert Job("run", "finetune", Path(), "tag", swept()).name == "tag rank.r=2 seed=0 added=1"
    remember([])


def test_a_dashboard_needs_its_logger_package_and_owner(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="add logger=wandb"):
        dashboard.run(composed("stage=dashboard"))
    with pytest.raises(ValueError, match=r"logger\.entity"):
        dashboard.run(composed("stage=dashboard", "logger=wandb", "logger.offline=false"))
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ValueError, match=r'pip install "orca_rank\[dashboard\]"'):
        dashboard.run(composed("stage=dashboard", "logger=wandb"))


@pytest.mark.filterwarnings("ignore")  # of the package's own
def test_the_dashboard_of_a_run_is_written(composed: Compose, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces")
    config = composed("stage=dashboard", "logger=wandb", "run=sweep")
    dashboard.run(config)
    assert "logger.entity=" in capsys.readouterr().out
    spec = json.loads((Path(config.paths.runs) / "sweep/dashboard.json").read_text())["spec"]["section"]
    (chosen,) = spec["runSets"][0]["filters"]["filters"]
    assert (chosen["key"], chosen["value"]) == ({"section": "run", "name": "group"}, "sweep")
    sections = {one["name"]: one["panels"] for one in spec["panelBankConfig"]["sections"]}
    kinds = [panel["viewType"] for panel in sections["Fine-tunes"]]
    assert kinds == ["Scatter Plot", "Bar Chart", "Parallel Coordinates Plot", "Parameter Importance"]
    assert "test" in json.dumps(sections["Fine-tunes"]) and "trainable/total" in json.dumps(sections["Fine-tunes"])


@pytest.mark.parametrize("logger", ["tensorboard", "mlflow"])
@pytest.mark.filterwarnings("ignore")  # of the package's own
def test_other_loggers_get_the_curve(composed: Compose, logger: str) -> None:
    pytest.importorskip(logger)
    config = composed(*TRACKED, f"logger={logger}")
    Path(config.paths.runs).mkdir()
    finetune.run(config)
    (folder,) = (Path(config.paths.runs) / "default/finetune").iterdir()
    assert list((folder / "log").glob("events.out*" if logger == "tensorboard" else "mlflow-id"))


def test_callbacks_of_ones_own(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "+callbacks.mine._target_=lightning.pytorch.callbacks."
    plain, config = composed(*TRACKED), composed(*TRACKED, f"{own}LambdaCallback")
    assert finetune.tag(plain) != finetune.tag(config) and "callbacks" not in finetune.finetune_config(plain)
    assert [type(one).__name__ for one in finetune.callbacks_of(config)] == ["LambdaCallback"]
    with pytest.raises(ValueError, match=r"callbacks\.mine: torch\.nn\.Identity is no lightning"):
        finetune.run(composed(*TRACKED, "+callbacks.mine._target_=torch.nn.Identity"))


def test_nobody_logged_in_is_one_sentence(composed: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wandb

    def refuse(**options: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"logger\.offline=false: .*No API key.*wandb login"):
        finetune.run(composed(*TRACKED, "logger.offline=false"))
