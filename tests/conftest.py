"""Shared by all tests: one thread, no network, and a config composed as the command line composes it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

# What a module of the package imports while the type-checking import hook runs it is compiled anew in every process
# (the hook's cache of bytecode is another): packages that take seconds are imported before.
import lightning.pytorch  # noqa: F401
import matplotlib.figure  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import sklearn.cluster  # noqa: F401
import timm  # noqa: F401
import torch
import wandb  # noqa: F401
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import orca_rank
from orca_rank.__main__ import CONF
from orca_rank.artifacts.command import TYPED

# Commands that a test starts elsewhere are those of the package that it tests, also where another copy is installed.
_places = [str(Path(orca_rank.__file__).parents[1]), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _places))
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def not_in_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that runs a command line in its process leaves it here for those after it."""
    monkeypatch.delenv(TYPED, raising=False)
    for name in ("_given", "_flags"):  # what a command in this process leaves
        monkeypatch.setattr(f"orca_rank.artifacts.command.{name}", ())


@pytest.fixture
def composed(tmp_path: Path) -> Callable[..., DictConfig]:
    """composed("stage=plan", ...) -> the config of that command line, with runs and cache under tmp_path."""

    def make(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(CONF.absolute()), version_base="1.3"):
            return compose("config", [f"paths.runs={tmp_path / 'runs'}", *overrides])

    return make
