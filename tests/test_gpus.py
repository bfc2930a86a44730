"""Workers of a sweep on a machine with several GPUs: each has one of its own, as far as they go."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from shared import TINY_SWIN

from orca_rank import gpus
from orca_rank.__main__ import main
from orca_rank.artifacts.lock import WAIT


class Beside(BasicLauncher):
    """Another launcher than Hydra's own."""


@pytest.fixture(autouse=True)
def three_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the process sees follows from the variable, as with a driver; locks go to tmp_path."""
    monkeypatch.setenv(gpus.VISIBLE, "0,1,2")  # so that it is as it was afterwards
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(os.environ.get(gpus.VISIBLE, "0,1,2").split(",")))
    monkeypatch.setattr(gpus.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(gpus, "_held", [])


def taken(**trainer: object) -> str | None:
    """What a worker sees after it has taken one; locks of the same process exclude each other too."""
    before = os.environ.get(gpus.VISIBLE)
    gpus.take_one({"accelerator": "auto", "devices": 1, **trainer})
    found = os.environ.pop(gpus.VISIBLE, None)
    if before is not None:
        os.environ[gpus.VISIBLE] = before
    return found


def test_each_worker_has_its_own_and_more_share_those_that_the_fewest_have(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [taken() for _ in range(5)] == ["0", "1", "2", "0", "1"]
    os.close(gpus._held.pop(1))  # a worker ends
    assert [taken() for _ in range(3)] == ["1", "2", "0"]
    monkeypatch.delenv(gpus.VISIBLE)
    assert taken(accelerator="gpu") == "1"


def test_a_worker_keeps_what_it_has() -> None:
    for _ in range(3):
        gpus.take_one({"accelerator": "auto", "devices": 1})
        assert os.environ[gpus.VISIBLE] == "0" and len(gpus._held) == 1


def test_what_is_visible_is_chosen_among(monkeypatch: pytest.MonkeyPatch) -> None:
    taken()
    monkeypatch.setenv(gpus.VISIBLE, "2,0, GPU-a")
    assert [taken() for _ in range(3)] == ["2", "GPU-a", "2"]


@pytest.mark.parametrize("trainer", [{"accelerator": "cpu"}, {"devices": 2}, {"devices": [1]}, {"num_nodes": 2}])
def test_options_that_ask_for_others_are_left(trainer: dict[str, object]) -> None:
    assert taken(**trainer) == "0,1,2" and not gpus._held


def test_without_a_place_for_locks_all_stay_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(gpus.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    assert taken() == "0,1,2"


@pytest.mark.parametrize(("launcher", "seen"), [("hydra_plugins.Beside", "0"), (None, "0,1,2")])
def test_points_that_run_beside_others_take_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str | None, seen: str
) -> None:
    """Any launcher but Hydra's own counts as one that runs points beside each other."""
    monkeypatch.setitem(Plugins.instance().class_name_to_class, "hydra_plugins.Beside", Beside)
    monkeypatch.setenv(WAIT, "")
    monkeypatch.setattr(sys, "argv", ["orca_rank"])
    chosen = [] if launcher is None else [f"hydra.launcher._target_={launcher}"]
    options = ["-m", "stage=plan", "rank.r=1,2", f"paths.runs={tmp_path}", "data=digits", *TINY_SWIN, *chosen]
    assert main(options) == 0
    assert os.environ[gpus.VISIBLE] == seen
