"""stage=doctor: what this installation can do and what it can find."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from orca_rank.artifacts.damaged import DamagedFile
from orca_rank.backbone.families import FAMILIES
from orca_rank.backbone.hub import fetched, place_of
from orca_rank.backbone.the_timm import timm
from orca_rank.weights import shipped

PACKAGES = ("torch", "timm", "lightning", "hydra-core", "pot", "geomloss", "wandb", "scikit-learn", "safetensors")
EXTRAS = {  # module that tells whether an extra of pyproject.toml is installed -> its name
    "peft": "peft",
    "bitsandbytes": "qlora",
    "hydra_plugins.hydra_joblib_launcher": "joblib",
    "hydra_plugins.hydra_submitit_launcher": "slurm",
    "hydra_plugins.hydra_ray_launcher": "ray",
    "hydra_plugins.hydra_optuna_sweeper": "optuna",
    "wandb_workspaces": "dashboard",
    "zarr": "zarr",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "mkdocs": "docs",
}
DATA = {
    "cifar-100-python/train": "data=cifar100",
    "cifar10_5k.npz": "source=cifar10_5k",
    "imagenet_1k.npz": "source=imagenet_1k",
    "tiny_imagenet.npz": "source=tiny_imagenet",
    "piececonst_r421_N1024_smooth1.mat": "data=darcy_mat",
}


def run(config: DictConfig) -> None:
    """Print versions, devices, optional packages, and which data files are where paths.data points."""
    columns = [Column(name, overflow="fold") for name in ("what", "found", "note")]  # nothing is cut
    table = Table(*columns, box=box.SIMPLE_HEAD)
    table.add_row("python", sys.version.split()[0], "")
    for package in PACKAGES:
        table.add_row(package, importlib.metadata.version(package), "")
    for module, extra in EXTRAS.items():
        there = _installed(module)
        table.add_row(
            module.rpartition(".")[2],
            "yes" if there else "no, optional",
            "" if there else escape(f'pip install "orca_rank[{extra}]"'),
        )
    table.add_row(
        "backbone", config.backbone.name, weights_at_hand(OmegaConf.to_container(config.backbone, resolve=True))
    )
    names = ", ".join(family.name for family in FAMILIES.values())
    table.add_row("backbone families", str(names.count(", ") + 1), f"{names}; docs/families.md")
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


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


def weights_at_hand(backbone: Any) -> str:
    """Whether a backbone's weights are on this machine, in words, and what to do where they are not; nothing is fetched
    or loaded.

    Args:
        backbone: its config as plain values.
    """
    source = backbone["pretrained"]
    if source is False:
        return "random weights, none needed"
    if source == "on_source":
        return "trained on the source when first needed, kept in paths.cache"
    if source == "shipped":
        try:
            return f"weights at hand: {shipped(backbone['shipped']).name}, shipped"
        except (KeyError, OSError, ValueError, DamagedFile) as error:
            return f"weights NOT at hand: {error.args[0]}"
    if isinstance(source, str):
        there = Path(source).is_file()
        return f"weights at hand: {source}" if there else f"no file at {source}: set backbone.pretrained to another"
    if not timm.is_model(backbone["name"]):
        return f"timm has no model {backbone['name']}: set backbone.name"
    place = place_of(backbone["name"])
    if place is None:
        return "timm's hub has no weights of it: set backbone.pretrained=false or to a file"
    if fetched(place):
        return f"weights at hand, fetched before from {place}"
    return (
        f"weights NOT at hand: the first use fetches {place} from the hub, which needs a network; without one set "
        f"backbone.pretrained=<path of a weights file>"
    )
