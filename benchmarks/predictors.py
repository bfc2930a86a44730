"""What the predictor costs and gains: multiscale beside ORCA's decoder, and what ranks do once it is no bottleneck.

    python benchmarks/predictors.py                                  # every part but classes, about an hour of one core
    python benchmarks/predictors.py --only demo --seeds 5            # one part, more seeds
    python benchmarks/predictors.py --only classes --data data       # CIFAR-100 (data/cifar-100-python)

Every fine-tune is one row of --table, so that a run can be stopped at any time and goes on where it stopped; the tables
are printed from it, mean ± standard error over the seeds. The body is the shipped swin_micro, the embedder is not
aligned, adapters are plain LoRA on every linear map of every block at the constant scale 4.

    darcy    Darcy flow 64×64 (solved at 253), 500 samples of which 50 validate, 100 test; ten epochs; multiscale at
             ranks 0 (embedder and predictor alone) to 16 and fully fine-tuned, ORCA's decoder at rank 8.
    demo     Darcy flow 32×32 (solved at 125), 320 samples of which 32 validate, 64 test; as experiment=demo, rank 2.
    long     darcy for thirty epochs, rank 8 and full.
    classes  CIFAR-100, 10,000 images of which 1,000 validate, 2,000 test; rank 4.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from orca_rank.__main__ import CONF
from orca_rank.build import build
from orca_rank.data.darcy import classical_baseline
from orca_rank.stages import finetune

PARTS = ("darcy", "demo", "long", "classes")
RANKS = ("0", "1", "2", "4", "8", "16", "full")
console = Console(width=110)


class Run(NamedTuple):
    """One fine-tune. rank: a number, or "full"."""

    part: str
    predictor: str
    rank: str
    seed: int

    @property
    def options(self) -> list[str]:
        darcy = ["experiment=darcy_micro", "finetune.epochs=10", "finetune.optimizer.lr=3e-3"]
        options = {
            "darcy": darcy,
            "long": [*darcy, "finetune.epochs=30"],
            "demo": ["experiment=demo"],
            "classes": ["experiment=cifar100_micro", "data.test_limit=2000", "finetune.epochs=3",
                        "finetune.optimizer.lr=2e-3", "data.batch_size=64"],
        }[self.part]  # fmt: skip
        if self.rank == "full":
            adapter = ["adapter=full", "finetune.optimizer.lr=2e-3"]
        elif self.rank == "0":
            adapter = ["adapter=linear_probe"]
        else:
            adapter = [
                "rank=uniform",
                f"rank.r={self.rank}",
                "adapter.module.scaling=constant",
                "adapter.module.alpha=4",
            ]
        fixed = [
            "embedder.aligned=false",
            "finetune.warmup_epochs=1",
            "trainer.enable_progress_bar=false",
            "logger=csv",
        ]
        return [*options, *adapter, *fixed, f"predictor={self.predictor}", f"seed={self.seed}", f"run={self.part}"]


def wanted(parts: list[str], seeds: int) -> Iterator[Run]:
    """Every run of the chosen parts, seed by seed, so that an interrupted table is a table of fewer seeds."""
    kinds = {
        "darcy": [("orca", "8"), *(("multiscale", rank) for rank in RANKS)],
        "demo": [(name, "2") for name in ("orca", "multiscale")],
        "long": [("multiscale", rank) for rank in ("8", "full")],
        "classes": [(name, "4") for name in ("linear", "multiscale")],
    }
    for seed in range(seeds):
        for part in parts:
            yield from (Run(part, predictor, rank, seed) for predictor, rank in kinds[part])


def finetuned(run: Run, options: argparse.Namespace) -> dict[str, str]:
    """Fine-tune and give the row of the table."""
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(CONF.absolute()), version_base="1.3"):
        paths = [f"paths.runs={folder}", f"paths.cache={options.cache}", f"paths.data={options.data}"]
        config = compose("config", [*run.options, *paths, "finetune.tag=run"])
        began = time.process_time()
        finetune.run(config)
        seconds = time.process_time() - began
        metrics = json.loads((Path(folder) / run.part / "finetune" / "run" / "metrics.json").read_text())
    return {
        **run._asdict(),
        "trained_predictor": metrics["trainable_parameters"]["predictor"],
        "trained": metrics["trainable_parameters"]["total"],
        "val": metrics[f"val/{metrics['metric']}"],
        "test": metrics[f"test/{metrics['metric']}"],
        "cpu_seconds": round(seconds, 1),
    }


def read(path: Path) -> dict[Run, dict[str, str]]:
    """The rows that are there."""
    if not path.exists():
        return {}
    with open(path, newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {Run(row["part"], row["predictor"], row["rank"], int(row["seed"])): row for row in rows}


def append(path: Path, row: dict[str, str]) -> None:
    new = not path.exists()
    with open(path, "a", newline="") as stream:
        writer = csv.DictWriter(stream, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def classical(part: str, options: argparse.Namespace) -> dict[str, float]:
    """Mean relative L2 on the test set of solvers that see what the network sees."""
    with initialize_config_dir(str(CONF.absolute()), version_base="1.3"):
        experiment = "demo" if part == "demo" else "darcy_micro"
        data = build(compose("config", [f"experiment={experiment}", f"paths.cache={options.cache}"]).data)
    names = {"solver on the coarse grid": False, "solver on the input repeated to the fine grid": True}
    return {name: classical_baseline(data, fine) for name, fine in names.items()}


def show(rows: dict[Run, dict[str, str]], parts: list[str], options: argparse.Namespace) -> None:
    for part in parts:
        table = Table("predictor", "rank", "its weights", "all trained", "test error", "seeds", "CPU s", title=part)
        groups: dict[tuple[str, str], list[dict[str, str]]] = {}
        for run, row in rows.items():
            if run.part == part:
                groups.setdefault((run.predictor, run.rank), []).append(row)
        for (predictor, rank), found in groups.items():
            errors = np.array([float(row["test"]) for row in found])
            spread = f" ± {errors.std(ddof=1) / len(errors) ** 0.5:.4f}" if len(errors) > 1 else ""
            seconds = np.mean([float(row["cpu_seconds"]) for row in found])
            table.add_row(predictor, rank, f"{int(found[0]['trained_predictor']):,}", f"{int(found[0]['trained']):,}",
                          f"{errors.mean():.4f}{spread}", str(len(errors)), f"{seconds:.0f}")  # fmt: skip
        for name, error in classical(part, options).items() if part in ("demo", "long") else ():
            table.add_row(name, "", "", "", f"{error:.4f}", "", "")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS[:-1]), help="parts (default: all but classes)"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", type=Path, default=Path("runs/predictors.csv"), help="rows, kept and added to")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="generated Darcy data")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder that holds cifar-100-python/")
    parser.add_argument("--show", action="store_true", help="only print the tables of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.table.parent.mkdir(parents=True, exist_ok=True)
    for run in wanted(options.only, 0 if options.show else options.seeds):
        if run not in read(options.table):
            append(options.table, finetuned(run, options))
    show(read(options.table), options.only, options)


if __name__ == "__main__":
    main()
