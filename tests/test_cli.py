"""The command line as a newcomer meets it: help, doctor, one clear error, and the commands that the README shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig

from orca_rank.build import build
from orca_rank.stages import doctor

README = Path(__file__).parents[1] / "README.md"


def command(folder: Path, *options: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(README.parent), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "orca_rank", *options], cwd=folder, env=environment, capture_output=True, text=True
    )


def shown_commands() -> list[list[str]]:
    """The options of every `python -m orca_rank ...` in the README."""
    text = README.read_text()
    return [
        match.split("#")[0].split()[3:] for match in re.findall(r"^python -m orca_rank [^`\n]*", text, re.MULTILINE)
    ]


def test_an_error_is_one_message_and_status_1(tmp_path: Path) -> None:
    done = command(tmp_path, "stage=finetune", "data=cifar100", "paths.data=nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith("error: CIFAR-100 is missing")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sweep_leaves_one_result_for_each_rank(tmp_path: Path) -> None:
    tiny = [
        "data=digits",
        "data.train_limit=32",
        "backbone.pretrained=false",
        "embedder.aligned=false",
        "finetune.epochs=1",
        "trainer.enable_progress_bar=false",
    ]
    done = command(tmp_path, "-m", "stage=finetune", "rank=uniform", "rank.r=1,2", *tiny)
    assert done.returncode == 0, done.stderr
    found = sorted(path.parent.name for path in tmp_path.glob("runs/demo/finetune/*/metrics.json"))
    assert [name.split("-s0")[0] for name in found] == ["lora-uniform-r1", "lora-uniform-r2"]


@pytest.mark.slow
def test_help_names_every_stage_and_a_typo_its_neighbours(tmp_path: Path) -> None:
    shown = command(tmp_path, "--help")
    assert shown.returncode == 0
    for stage in ("align", "measure", "plan", "finetune", "report", "predict", "doctor", "pretrain", "all"):
        assert f"stage={stage}" in shown.stdout
    typo = command(tmp_path, "stage=finetun")
    assert typo.returncode == 1
    assert "finetune" in typo.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [o for o in shown_commands() if "-m" not in o], ids=" ".join)
def test_commands_of_the_readme_compose(composed: Callable[..., DictConfig], options: list[str]) -> None:
    try:
        assert composed(*(option for option in options if not option.startswith("--"))).stage is not None
    except HydraException as error:
        pytest.fail(f"the README shows an option that does not exist: {error}")


def test_the_readme_shows_commands() -> None:
    assert len(shown_commands()) > 4


def test_doctor_says_what_it_finds(
    composed: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "cifar10_5k.npz").touch()
    doctor.run(composed("stage=doctor", f"paths.data={tmp_path}"))
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"cifar10_5k\.npz │ yes", shown)
    assert re.search(r"imagenet_1k\.npz │ no", shown)
    assert "writable" in shown


def test_the_chain_runs_the_stages_it_is_given(composed: Callable[..., DictConfig]) -> None:
    config = composed("stage=all", "stage.stages=[plan]", "rank=uniform", "rank.r=1", "plan.rules=[]")
    build(config.stage)(config)
    assert (Path(config.paths.runs) / "demo" / "plan" / "plan.json").exists()
