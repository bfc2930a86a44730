"""What Lightning costs: epochs of stage=finetune under its Trainer against the same epochs in a bare PyTorch loop.

    python benchmarks/lightning_loop.py                 # a few minutes
    python benchmarks/lightning_loop.py --rounds 1 --epochs 3

Same model (swin_micro at 64×64, LoRA r = 2 on every linear map of a block), data, batches of 16, AdamW, schedule and
random draws on both sides, alternated in one process on one thread; both train and validate. The Trainer also writes
checkpoints, curve and log, as the stage does. Process CPU time of every epoch from the second on (the first of a fit
makes the loaders); the losses of both are compared bit by bit.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import lightning as L
import torch
from _machine import machine
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import Tensor

from orca_rank.__main__ import CONF
from orca_rank.data.module import InMemory, Parts
from orca_rank.measuring.matrices import adaptable_layers
from orca_rank.stages.planning import make_plan
from orca_rank.stages.setup import build_model
from orca_rank.stages.trainable import adapter_module, make_trainable
from orca_rank.stages.trainer import trainer_for
from orca_rank.task import Task
from orca_rank.training.curve import Curve
from orca_rank.training.finetune import FineTune, FinetuneOptions, trained_tensors
from orca_rank.training.keep import Keep, fit


class Fields(InMemory):
    """Random smooth fields at 64×64; what they mean does not matter here."""

    def __init__(self, train: int, val: int) -> None:
        super().__init__(batch_size=16, seed=0)
        self.counts = train, val

    def load(self) -> Parts:
        draw = torch.Generator().manual_seed(0)
        task = Task("dense", (3, 64, 64), (1, 64, 64))
        pairs = [
            (torch.randn(n, 3, 64, 64, generator=draw), 1 + torch.randn(n, 1, 64, 64, generator=draw))
            for n in (*self.counts, 16)
        ]
        return Parts(task, *pairs, encode=torch.Tensor.float)


def make(config: DictConfig, data: Fields, epochs: int) -> FineTune:
    model = build_model(config, data.task)
    layers = adaptable_layers(model.body, config.layers.target, config.layers.qkv)
    adapter = adapter_module(dict(config.adapter), layers, Path())
    make_trainable(model, "inject", make_plan(config, layers), adapter, embedder=True, predictor=True)
    return FineTune(model, data.task, partial(torch.optim.AdamW, lr=1e-3), FinetuneOptions(epochs), seed=0)


class Clock(Callback):
    """CPU seconds from the start of every epoch to that of the next."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.times.append(time.process_time())

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.times.append(time.process_time())


def under_lightning(config: DictConfig, data: Fields, epochs: int) -> tuple[list[float], list[float]]:
    module, clock = make(config, data, epochs), Clock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        curve = Curve(folder / "curve.csv")
        keep = Keep(folder, "val/relative_l2", tensors=lambda: trained_tensors(module.model))
        trainer = trainer_for(config.trainer, config.logger, folder, [clock, curve, keep], max_epochs=epochs)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            loaders = {"train_dataloaders": data.train_dataloader(), "val_dataloaders": data.val_dataloader()}
            fit(trainer, module, None, **loaders)
    seconds = [end - start for start, end in zip(clock.times, clock.times[1:], strict=False)]
    return seconds, [row["train/loss"] for row in curve.rows]


def bare(config: DictConfig, data: Fields, epochs: int) -> tuple[list[float], list[float]]:
    module = make(config, data, epochs)
    model, task = module.model, module.task
    loader, val = data.train_dataloader(), data.val_dataloader()
    optimizer = torch.optim.AdamW(module.parameter_groups(), lr=1e-3, fused=True)  # as the stage has it
    course = module.options.course(epochs * len(loader))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: course.factor(step))
    seconds, losses = [], []
    for epoch in range(epochs):
        start = time.process_time()
        model.train()
        loader.sampler.set_epoch(epoch)
        total, count = torch.zeros(()), 0
        for index, (x, y) in enumerate(loader):
            torch.manual_seed(epoch * 100_003 + index)  # drop path, as the module draws it
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
        seconds.append(time.process_time() - start)
    return seconds, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--train", type=int, default=320, help="training samples, as in the demo")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with initialize_config_dir(str(CONF.absolute()), version_base="1.3"):
        config = compose("config", ["rank=uniform", "rank.r=2", "embedder.aligned=false", "trainer=cpu"])
    ratios = []
    for number in range(arguments.rounds):
        order = (under_lightning, bare) if number % 2 == 0 else (bare, under_lightning)
        found = {side: side(config, Fields(arguments.train, 32), arguments.epochs) for side in order}
        (ours, our_losses), (theirs, their_losses) = found[under_lightning], found[bare]
        pairs = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]
        ratios += pairs
        apart = max(abs(a - b) for a, b in zip(our_losses, their_losses, strict=True))
        print(
            f"round {number + 1}: {statistics.median(ours[1:]):.3f} s an epoch under Lightning, "
            f"{statistics.median(theirs[1:]):.3f} bare; ratio {statistics.median(pairs):.3f}; "
            f"largest difference of a loss {apart:.1e}",
            flush=True,
        )
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
    print(f"Lightning over bare, {len(ratios)} epochs: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")
    print(f"{machine()}, lightning {L.__version__}")


if __name__ == "__main__":
    main()
