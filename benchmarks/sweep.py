"""What a sweep costs beside its training: 16 small fine-tunes by one command, in one process, against their bare loops.

    python benchmarks/sweep.py                          # about ten minutes
    python benchmarks/sweep.py --rounds 1 --epochs 2    # short fine-tunes, of which overhead is a larger part

The command is what a user types, `python -m orca_rank -m stage=finetune rank.r=1,2,4,8 seed=0,1,2,3` on the small Darcy
set, and its whole CPU time counts: imports, building models, checkpoints, curves, tests, results, the summary. The bare
loop trains the same models from the same draws, with validation after every epoch, and only its loops count. Both have
one thread and are alternated; the losses of both are compared.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from _machine import machine
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from orca_rank.__main__ import CONF
from orca_rank.build import build
from orca_rank.stages import finetune
from orca_rank.stages.adapted import adapted_model
from orca_rank.stages.setup import ready, seed_everything
from orca_rank.training.finetune import FineTune
from orca_rank.training.optimizers import made

SWEPT = {"rank.r": (1, 2, 4, 8), "seed": (0, 1, 2, 3)}
OPTIONS = ("stage=finetune", "rank=uniform", "data=darcy_small", "embedder.aligned=false", "threads=1")
OPTIONS += ("trainer=cpu", "trainer.enable_progress_bar=false")


def points() -> Iterator[list[str]]:
    for values in product(*SWEPT.values()):
        yield [f"{name}={value}" for name, value in zip(SWEPT, values, strict=True)]


def command(options: list[str]) -> float:
    """CPU seconds of the sweep."""
    swept = [f"{name}={','.join(map(str, values))}" for name, values in SWEPT.items()]
    words = [sys.executable, "-m", "orca_rank", "-m", *swept, *options]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bare(config: DictConfig) -> tuple[float, list[float]]:
    """(CPU seconds of the loops, the losses of the epochs) of one fine-tune."""
    options = finetune.check_options(config)
    seed_everything(config.seed)
    data = ready(config.data)
    task, model = data.task, adapted_model(config, data.task).model
    module = FineTune(model, task, build(config.finetune.optimizer), options, int(config.seed))
    loader, val = data.train_dataloader(), data.val_dataloader()
    optimizer = made(module.make_optimizer, module.parameter_groups(), module)
    course = options.course(options.epochs * len(loader))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: course.factor(step))
    losses, start = [], time.process_time()
    for epoch in range(options.epochs):
        model.train()
        loader.sampler.set_epoch(epoch)
        total, count = torch.zeros(()), 0
        for index, (x, y) in enumerate(loader):
            torch.manual_seed(config.seed * 1_000_003 + epoch * 100_003 + index)  # drop path, as the module draws it
            optimizer.zero_grad()
            loss = task.loss(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            total, count = total + loss.detach() * len(x), count + len(x)
        losses.append(float(total / count))
        model.eval()
        with torch.no_grad():
            errors: list[Tensor] = [task.metric(model(x), y) for x, y in val]
            float(torch.cat(errors).mean())
    return time.process_time() - start, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8, help="of every fine-tune")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ratios = []
    with tempfile.TemporaryDirectory() as name, initialize_config_dir(str(CONF.absolute()), version_base="1.3"):
        common = [*OPTIONS, f"finetune.epochs={arguments.epochs}", f"paths.runs={name}", f"paths.cache={name}/cache"]
        configs = [compose("config", [*common, *point]) for point in points()]
        ready(configs[0].data)  # generated before either is timed
        for number in range(arguments.rounds):
            run = f"round{number}"
            ours = command([*common, f"run={run}"]) if number % 2 == 0 else 0.0
            found = [bare(config) for config in configs]
            ours = ours or command([*common, f"run={run}"])
            theirs = sum(seconds for seconds, _ in found)
            ratios.append(ours / theirs)
            apart = max(map(lambda config, one: _apart(Path(name) / run, config, one[1]), configs, found))
            print(
                f"round {number + 1}: {ours:.1f} s for the sweep of {len(configs)}, {theirs:.1f} for their bare loops; "
                f"ratio {ratios[-1]:.3f}; largest difference of a loss {apart:.1e}",
                flush=True,
            )
    print(f"sweep over bare loops: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    print(machine())


def _apart(run: Path, config: DictConfig, losses: list[float]) -> float:
    """The largest difference to the losses that the sweep's fine-tune wrote."""
    (curve,) = run.glob(f"finetune/*-r{config.rank.r}-s{config.seed}-*/curve.csv")
    with open(curve, newline="") as stream:
        rows = list(csv.DictReader(stream))
    return max(abs(float(row["train/loss"]) - loss) for row, loss in zip(rows, losses, strict=True))


if __name__ == "__main__":
    main()
