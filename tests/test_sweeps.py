"""Sweeps whose points run beside each other, by joblib and by submitit on this machine, and what they share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from shared import TINY_SWIN

from orca_rank.artifacts.lock import WAIT, locked

ROOT = Path(__file__).parents[1]
OPTIONS = (
    "data=digits",
    "data.train_limit=48",
    "data.test_limit=32",
    "data.batch_size=16",
    "source=digits",
    "source.train_limit=48",
    *TINY_SWIN,
    "rank=uniform",
    "gap.samples=24",
    "align.epochs=1",
    "align.held_out.resamples=0",
    "finetune.epochs=1",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_points_beside_each_other_share_what_comes_before_the_fine_tune(tmp_path: Path, launcher: str) -> None:
    """Both wait for the same alignment, measured once; the third fails, which does not keep the others from ending."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    options = [f"hydra/launcher={launcher}", *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else [])]
    command = [sys.executable, "-m", "orca_rank", "-m", *options, "stage=all", "rank.r=1,2,-1", *OPTIONS]
    inherited = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": inherited, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"paths.runs={tmp_path}"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    run = tmp_path / "default"
    said = done.stdout + "".join(path.read_text() for path in run.rglob("*_log.out"))
    assert done.returncode == 1
    summary = done.stderr[done.stderr.index("1 of the sweep's points failed:") :]
    assert "rank.r=-1" in summary and "must not be negative" in summary
    assert said.count("objective otdd") == 1 and said.count("align is done") == 1
    ranks = [json.loads(path.read_text())["ranks"] for path in run.glob("finetune/*/ranks.json")]
    assert sorted(max(one.values()) for one in ranks) == [1, 2]
    assert len(list(run.glob("finetune/*/metrics.json"))) == 2
    assert not list(run.glob(".failed*"))


def test_points_of_a_sweep_wait_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def hold() -> None:
        with locked(tmp_path):
            order.append("first")
            held.set()
            time.sleep(0.2)
            order.append("first ends")

    held = threading.Event()
    other = threading.Thread(target=hold)
    other.start()
    held.wait(10)
    with pytest.raises(BlockingIOError), locked(tmp_path):
        pass
    monkeypatch.setenv(WAIT, "1")
    with locked(tmp_path):
        order.append("second")
    other.join()
    assert order == ["first", "first ends", "second"]
