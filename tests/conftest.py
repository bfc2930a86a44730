"""Shared by all tests: one thread, no network, and a config composed as the command line composes it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from orca_rank.__main__ import CONF

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


@pytest.fixture
def composed(tmp_path: Path) -> Callable[..., DictConfig]:
    """composed("stage=plan", ...) -> the config of that command line, with runs and cache under tmp_path."""

    def make(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(CONF.absolute()), version_base="1.3"):
            return compose("config", [f"paths.runs={tmp_path / 'runs'}", *overrides])

    return make
