"""What several test files need."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from orca_rank.stages import finetune

# Options for a Swin of two blocks and a few thousand parameters, with random weights.
TINY_SWIN = (
    "backbone=swin_demo",
    "backbone.pretrained=false",
    "backbone.options.embed_dim=8",
    "backbone.options.depths=[1,1]",
    "backbone.options.num_heads=[1,2]",
    "backbone.options.img_size=16",
    "budget.mean_rank=4",
)
# A fine-tune of that Swin on digits, of a second or two.
TINY_FINETUNE = (
    "data=digits",
    "data.train_limit=60",
    "data.test_limit=40",
    "data.batch_size=16",
    "predictor=linear",
    *TINY_SWIN,
    r"layers.target='(attn\.qkv|mlp\.fc1)$'",
    "embedder.aligned=false",
    "finetune.epochs=1",
    "finetune.warmup_epochs=0",
    "finetune.optimizer.lr=0.01",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
)


def apart(value: Tensor, expected: Tensor) -> float:
    """‖value − expected‖ / ‖expected‖: it hardly depends on the processor, where a single entry's error does."""
    assert value.shape == expected.shape, f"{tuple(value.shape)} against {tuple(expected.shape)}"
    norm = float(expected.detach().double().norm())
    return float((value.detach().double() - expected.detach().double()).norm()) / max(norm, 1e-300)


@torch.no_grad()
def move_trained(model: nn.Module) -> None:
    """Random steps of everything that is trained, as if it had been."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))


def break_off(monkeypatch: pytest.MonkeyPatch, config: DictConfig, *, epoch: int, batch: int = 0) -> None:
    """Run a fine-tune that fails in a batch of an epoch."""
    step = finetune.FineTune.training_step

    def failing(self: finetune.FineTune, given: object, batch_index: int) -> Tensor:
        if (self.current_epoch, batch_index) == (epoch, batch):
            raise RuntimeError("the machine went away")
        return step(self, given, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.FineTune, "training_step", failing)
        with pytest.raises(RuntimeError, match="went away"):
            finetune.run(config)


NO_ZARR = importlib.util.find_spec("zarr") is None
ZARR = pytest.param("zarr", marks=pytest.mark.skipif(NO_ZARR, reason="the package zarr is not installed"))


def write_zarr(
    path: Path,
    version: int = 3,
    fill_value: float = 0,
    attributes: dict[str, Any] | None = None,
    **arrays: np.ndarray,
) -> None:
    """Arrays in a group, seven rows a chunk; a__b is b in the group a. attributes: of x, which is there then."""
    import zarr

    group = zarr.open_group(path, mode="a", zarr_format=version if arrays else None)
    for name, array in arrays.items():
        group.create_array(
            name.replace("__", "/"),
            data=array,
            chunks=(min(7, len(array)), *array.shape[1:]),
            fill_value=fill_value if name == "x" else 0,
        )
    if attributes:
        group["x"].attrs.update(attributes)
