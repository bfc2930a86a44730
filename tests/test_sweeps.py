"""Sweeps whose points run beside each other, by joblib and by submitit on this machine, and what they share."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import run_folders
from omegaconf import OmegaConf
from shared import TINY_SWIN

from orca_rank.__main__ import main
from orca_rank.artifacts.files import read_json
from orca_rank.artifacts.lock import WAIT, locked
from orca_rank.report import kept, run_folder, tables
from orca_rank.report.run_folder import RunFolder, read_tunes
from orca_rank.stages import sweep

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
    assert not list(run.glob(".failed*")) and not list(run.glob(".ended*"))
    assert re.search(r"3 of 3 points done: rank\.r=-?\d", said) and "1 of 3 points done, about " in said
    assert re.search(r"points done.*: rank\.r=-1 failed", said) and said.count(" failed") == 1
    with open(run / "summary.csv") as stream:
        assert sorted(row["budget"] for row in csv.DictReader(stream)) == ["r=1", "r=2"]


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


def test_a_sweep_says_how_far_it_is_and_its_summary_grows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    grow = sweep.grow

    def growing(path: Path, *, last: bool) -> None:
        run_folders.finetune(path, f"t{len(seen)}", 0.25, seed=len(seen))
        grow(path, last=last)
        seen.append(((path / "summary.csv").read_text().count("\n") - 1, last))

    monkeypatch.setattr(sweep, "grow", growing)
    monkeypatch.setattr(sys, "argv", ["orca_rank"])
    options = ["-m", "stage=plan", "rank.r=1,2", "seed=range(1)", f"paths.runs={tmp_path}", "data=digits", *TINY_SWIN]
    assert main(options) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("point ")]
    assert said[0] == "point 1 of 2: rank.r=1 seed=0"
    assert said[1].startswith("point 2 of 2, about ") and said[1].endswith(" left: rank.r=2 seed=0")
    assert seen == [(1, False), (2, True)]


@pytest.mark.parametrize("stage", ["all", "align"])
def test_a_sweep_of_the_config_s_own_aligns_no_folder_twice_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """What a config says to sweep over (hydra.sweeper.params) counts like what is typed: refused before any work."""
    (tmp_path / "experiment").mkdir()
    params = {"seed": "0,1", "rank.r": "2"}  # one value is no sweep
    text = OmegaConf.to_yaml({"hydra": {"sweeper": {"params": params}}})
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    monkeypatch.setattr(sys, "argv", ["orca_rank"])
    command = ["-m", "--config-dir", str(tmp_path), "experiment=mine", f"stage={stage}", f"paths.runs={tmp_path}"]
    assert main([*command, *OPTIONS]) == 1
    said = capsys.readouterr()
    assert "point 1 of 2: seed=0\n" in said.out
    assert "2 of the sweep's points failed" in said.err and "the sweep over seed asks for several" in said.err
    assert not list((tmp_path / "default").glob("*/"))


def test_the_time_left_is_that_of_the_points_that_ran_last() -> None:
    moments = [0.0] * 6 + [60.0 * point for point in range(1, 11)]  # five that were done before, ten of a minute
    assert sweep.Progress(30, moments).next() == "point 16 of 30, about 15 min left"
    assert sweep.Progress(30, moments).done() == "15 of 30 points done, about 15 min left"
    assert sweep.Progress(15, moments).done() == "15 of 15 points done"
    assert sweep.Progress(None, [0.0, 1.0]).next() == "point 2"


def test_points_in_processes_of_their_own_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time, each of a minute: the pace is that of both together. The summary knows which is the last."""
    now, grown = [1000.0], []
    monkeypatch.setattr(sweep.time, "time", lambda: now[0])
    monkeypatch.setattr(sweep, "grow", lambda path, last: grown.append(last))
    shared, said = tmp_path / "run" / ".ended", []
    for _ in range(3):
        turns = [sweep.Turn(tmp_path, 6, [], shared) for _ in range(2)]
        now[0] += 60
        said += [turn.ends() for turn in turns]
    assert said[1] == "2 of 6 points done, about 2 min left" and said[3] == "4 of 6 points done, about 60 s left"
    assert said[5] == "6 of 6 points done" and grown == [False] * 5 + [True] and not shared.exists()


def test_a_folder_of_many_fine_tunes_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(6):
        run_folders.finetune(tmp_path, f"t{seed}", 0.25, seed=seed)
    opened = []
    monkeypatch.setattr(run_folder, "read_json", lambda path, made: opened.append(path.name) or read_json(path, made))

    def tags() -> list[tuple[str, float]]:
        opened.clear()
        return sorted((tune.tag, tune.val) for tune in read_tunes(RunFolder(tmp_path, "run=x")).tunes)

    first = tags()
    assert len(opened) == 12 and tags() == first and not opened
    run_folders.finetune(tmp_path, "t3", 0.5, seed=3)
    run_folders.finetune(tmp_path, "t6", 0.5, seed=6)
    assert dict(tags()) == {**dict(first), "t3": 0.5, "t6": 0.5} and len(opened) == 4
    (tmp_path / kept.NAME).write_text('{"schema": 1, "files": {"finetune/t0/metrics.json": 7}')
    assert len(tags()) == 7 and len(opened) == 14


def test_groups_are_compared_with_the_uniform_ones_of_their_options_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in range(40):
        rule, lr = ("uniform", "proportional")[place % 2], 0.001 * (place // 2)
        options = {"finetune": {"optimizer": {"lr": lr}}}
        run_folders.finetune(tmp_path, f"t{place}", 0.25 + 0.01 * (place % 2), rule=rule, options=options)
    compared = []
    to_uniform = tables._to_uniform
    monkeypatch.setattr(tables, "_to_uniform", lambda one, others: compared.extend(others) or to_uniform(one, others))
    found = tables.groups(read_tunes(RunFolder(tmp_path, "run=x")).tunes)
    assert len(compared) == 40 and sum(group.difference is not None for group in found) == 20


@pytest.mark.slow
def test_optuna_searches_for_the_lowest_validation_metric(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    searched = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    options = ["stage=finetune", "embedder.aligned=false", *OPTIONS, f"paths.runs={tmp_path}"]
    command = [sys.executable, "-W", "ignore", "-m", "orca_rank", "-m", *searched, *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    lr = "finetune.optimizer.lr=interval(0.001,0.1)"
    done = subprocess.run([*command, lr], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "point 3 of 3, about " in done.stdout
    run = tmp_path / "default"
    values = [json.loads(path.read_text())["val/error"] for path in run.glob("finetune/*/metrics.json")]
    found = OmegaConf.load(run / "optimization_results.yaml")
    assert len(values) == 3 and found.best_value == min(values)
