"""The progress bar of a training, on a terminal of 80 columns."""

from __future__ import annotations

import io
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from orca_rank.stages.trainer import trainer_for
from orca_rank.training.bar import Bar


class Line(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val/relative_l2", self.layer(batch[0]).square().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_epochs_count_from_one_and_a_line_stays_a_line(tmp_path: Path) -> None:
    said = io.StringIO()
    config = OmegaConf.create(
        {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "enable_progress_bar": True}
    )
    logger = {"_target_": "lightning.pytorch.loggers.CSVLogger"}
    trainer = trainer_for(
        config, logger, tmp_path, [], max_epochs=2, enable_model_summary=False, num_sanity_val_steps=0,
        enable_checkpointing=False, log_every_n_steps=1,
    )  # fmt: skip
    bar = trainer.progress_bar_callback
    assert isinstance(bar, Bar)
    bar._console_kwargs = {"width": 80, "file": said, "force_terminal": True, "color_system": None}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(3, 1)), batch_size=1)
    trainer.fit(Line(), loader, loader)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.getvalue()).replace("\r", "\n").splitlines()
    epochs = [line.rstrip() for line in drawn if "Epoch 2/2" in line]
    assert epochs and "3/3" in epochs[-1] and "v_num" not in said.getvalue()
    assert "val: " in epochs[-1] and "loss: " in epochs[-1] and len(epochs[-1]) <= 80


@pytest.mark.parametrize("option", [False, True])
def test_a_bar_of_the_user_s_own_or_none_stays(tmp_path: Path, option: bool) -> None:
    config = OmegaConf.create(
        {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "enable_progress_bar": option}
    )
    own = [L.pytorch.callbacks.TQDMProgressBar()] if option else []
    trainer = trainer_for(config, None, tmp_path, own, enable_checkpointing=False)
    assert not isinstance(trainer.progress_bar_callback, Bar)
