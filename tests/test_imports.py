"""What a command must not import: packages that take a second or more, and that it does not use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from shared import TINY_FINETUNE

NOTHING_HEAVY = {"torch", "numpy", "scipy", "timm", "lightning", "matplotlib", "sklearn"}
NO_TRAINING = {"lightning", "torchmetrics", "transformers", "wandb", "sklearn", "scipy.stats", "matplotlib", "peft"}


def loaded(program: str, folder: Path) -> set[str]:
    """Full names of the modules that a program has imported when it ends."""
    ends = "import atexit, json, sys\natexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules))))"
    done = subprocess.run(
        [sys.executable, "-c", f"{ends}\n{program}"], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = set(json.loads(done.stdout.splitlines()[-1]))
    assert "sys" in found
    return found


def command(*options: str) -> str:
    return f"from orca_rank.__main__ import main\nassert main({list(options)!r}) == 0"


def test_the_package_and_its_help_import_nothing_heavy(tmp_path: Path) -> None:
    assert not loaded("import orca_rank", tmp_path) & (NOTHING_HEAVY | {"hydra"})
    assert not loaded(command("--help"), tmp_path) & NOTHING_HEAVY


def test_a_plan_imports_nothing_that_trains(tmp_path: Path) -> None:
    found = loaded(command("stage=plan", "paths.runs=runs"), tmp_path)
    assert (tmp_path / "runs/default/plan/plan.json").is_file()
    assert "timm" in found and not found & NO_TRAINING


def test_a_fine_tune_that_writes_csv_imports_no_tracking_service(tmp_path: Path) -> None:
    found = loaded(command("stage=finetune", *TINY_FINETUNE, "rank.r=1", "paths.runs=runs"), tmp_path)
    assert list((tmp_path / "runs/default/finetune").glob("*/log/metrics.csv"))
    assert not found & {"wandb", "mlflow", "tensorboard"}


def test_stages_that_train_nothing_import_nothing_that_trains(tmp_path: Path) -> None:
    stages = ", ".join(f"orca_rank.stages.{name}" for name in ("measure", "predict", "rank_losses"))
    data = ", ".join(f"orca_rank.data.{name}" for name in ("darcy_data", "embedded", "arrays"))
    assert not loaded(f"import {stages}, {data}", tmp_path) & NO_TRAINING


def test_a_report_imports_no_models(tmp_path: Path) -> None:
    assert not loaded("import orca_rank.stages.report", tmp_path) & {"timm", "torchvision", "lightning", "matplotlib"}
