"""stage=doctor: what this installation can do and what it can find."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PACKAGES = ("torch", "timm", "lightning", "hydra-core", "pot", "geomloss", "wandb", "scikit-learn", "safetensors")
EXTRAS = {"peft": "peft", "bitsandbytes": "qlora", "wandb_workspaces": "dashboard"}
DATA = {
    "cifar-100-python/train": "data=cifar100",
    "cifar10_5k.npz": "source=cifar10_5k",
    "imagenet_1k.npz": "source=imagenet_1k",
    "tiny_imagenet.npz": "source=tiny_imagenet",
    "piececonst_r421_N1024_smooth1.mat": "data=darcy_mat",
}


def run(config: DictConfig) -> None:
    """Print versions, devices, optional packages, and which data files are where paths.data points."""
    table = Table("what", "found", "note")
    table.add_row("python", sys.version.split()[0], "")
    for package in PACKAGES:
        table.add_row(package, importlib.metadata.version(package), "")
    for module, extra in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        table.add_row(
            module, "yes" if there else "no", "" if there else escape(f'optional: pip install "orca_rank[{extra}]"')
        )
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    table.add_row("CUDA device", cuda, "" if torch.cuda.is_available() else "everything runs on the CPU")
    table.add_row("CPU threads", str(torch.get_num_threads()), "OMP_NUM_THREADS sets them")
    root = Path(config.paths.data)
    table.add_row("paths.data", str(root), "" if root.is_dir() else "no such folder: set paths.data")
    for name, option in DATA.items():
        there = (root / name).exists()
        table.add_row(name, "yes" if there else "no", option if there else f"{option} needs it")
    runs = Path(config.paths.runs).absolute()
    nearest = next(folder for folder in (runs, *runs.parents) if folder.exists())
    writable = os.access(nearest, os.W_OK)
    table.add_row("paths.runs", str(config.paths.runs), "writable" if writable else "NOT writable: set paths.runs")
    Console().print(table)
