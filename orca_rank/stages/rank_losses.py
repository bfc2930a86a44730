"""stage=rank_losses: held-out losses of every rank of every layer of a DyLoRA fine-tune, for rank=posterior."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from orca_rank.adapters import DyLoRA, set_rank
from orca_rank.artifacts.files import write_tensors
from orca_rank.artifacts.lock import locked
from orca_rank.build import targets
from orca_rank.data import count
from orca_rank.fitted import Fitted, chosen_folder, load
from orca_rank.stages.setup import check_same_data, data_for, stage_folder
from orca_rank.stages.trainer import device_of

console = Console(markup=False)


def run(config: DictConfig) -> None:
    """Write finetune/<tag>/rank_losses.safetensors, which rank=posterior rank.losses=<it> reads.

    The fine-tune is chosen by finetune.tag; where there is only one, it may stay null. Its model is evaluated on the
    validation images of config.data, layers × ranks times; nothing is trained.

    Raises:
        ValueError: if the fine-tune has no DyLoRA layer, or the data are of another task. BlockingIOError: another
            process is at work in the folder.
    """
    folder = chosen_folder(stage_folder(config, "finetune").parent, config.finetune.tag)
    with locked(folder):
        fitted = load(folder, trust=targets(config))
        fitted.to(device_of(config.trainer))
        check_same_data(config, fitted)
        data = data_for(config.data, fitted, "fit")
        batches = data.val_dataloader()
        with Progress(console=console, transient=True, disable=not config.trainer.enable_progress_bar) as progress:
            bar = progress.add_task("held-out losses of every rank", total=len(batches))
            losses = rank_losses(fitted, batches, lambda: progress.advance(bar))
        path = folder / "rank_losses.safetensors"
        write_tensors(path, losses)
    top, images = int(losses["ranks"][-1]), count(batches)
    console.print(f"{len(losses) - 1} layers at ranks 0 to {top}, {images} images: {path}", soft_wrap=True)


@torch.inference_mode()
def rank_losses(
    fitted: Fitted, batches: Iterable[tuple[Tensor, Tensor]], advance: Callable[[], object] = lambda: None
) -> dict[str, Tensor]:
    """The loss of every image with one layer cut to each rank and all others at full rank.

    Args:
        fitted: a DyLoRA fine-tune. batches: (x, y) of held-out images. advance: called after each batch.

    Returns:
        layer -> losses (ranks, images), and `ranks` = 0 … the largest r_max. A layer of a smaller r_max repeats its
        full rank above it; rank 0 is the layer without its adapter.

    Raises:
        ValueError: if the model has no DyLoRA layer.
    """
    body, layers = fitted.model.body, fitted.nested()
    top = max(layer.rank for layer in layers.values())
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    device = next(fitted.parameters()).device
    for x, y in batches:
        x, y = x.to(device), y.to(device)

        def losses(x: Tensor = x, y: Tensor = y) -> Tensor:
            return fitted.task.losses(fitted.model(x), y).cpu()

        full = losses()
        for name, layer in layers.items():
            rows = [_switched_off(layer, losses)]
            for rank in range(1, layer.rank):
                set_rank(body, {name: rank})
                rows.append(losses())
            set_rank(body, {name: layer.rank})
            rows += [full] * (top + 1 - len(rows))
            found[name].append(torch.stack(rows))
        advance()
    return {"ranks": torch.arange(top + 1)} | {name: torch.cat(parts, dim=1) for name, parts in found.items()}


def _switched_off(layer: DyLoRA, evaluate: Callable[[], Tensor]) -> Tensor:
    """`evaluate()` with ΔW = 0 in this layer."""
    kept = layer.lora_B.detach().clone()
    try:
        layer.lora_B.zero_()
        return evaluate()
    finally:
        layer.lora_B.copy_(kept)
