"""Alignment without a run folder: nothing is logged or kept, the embedder is what comes of it."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import lightning as L
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn

from orca_rank.data.module import Batches, as_it_is
from orca_rank.training.align import Align, AlignOptions, Objective, Target


def train_embedder(
    embedder: nn.Module,
    objective: Objective,
    x: Tensor,
    labels: Tensor,
    options: AlignOptions,
    optimizer: partial,
    seed: int,
) -> None:
    """Train an embedder in place, where it is; its mode and what of it may be trained are left as found.

    Args:
        objective: (features (b, d), labels (b,)) -> scalar. x: target images (n, ...). labels: (n,).
        optimizer: takes parameters.

    Raises:
        FloatingPointError: for a loss that is not finite.
    """
    mode, flags = embedder.training, {name: p.requires_grad for name, p in embedder.named_parameters()}
    device = next(embedder.parameters()).device
    target = Target(Batches(x, labels), as_it_is, labels)
    module = Align(
        embedder, objective, target, x.new_zeros(0), optimizer, options, folder=Path(tempfile.gettempdir()), seed=seed
    )
    trainer = L.Trainer(
        max_epochs=options.epochs,
        accumulate_grad_batches=module.batches_a_step,
        reload_dataloaders_every_n_epochs=1,
        accelerator="cpu" if device.type == "cpu" else "auto",
        devices=1 if device.index is None else [device.index],
        plugins=[LightningEnvironment()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        embedder.requires_grad_(True).train()
        trainer.fit(module)
    finally:
        embedder.train(mode).to(device)
        for name, p in embedder.named_parameters():
            p.requires_grad_(flags[name])
