"""stage=rank_curve: one nested fine-tune (DyLoRA, MatryoshkaLoRA) at every rank, instead of a sweep over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from orca_rank.adapters import DyLoRA, evaluate_ranks
from orca_rank.artifacts.files import atomic, read_json, write_csv
from orca_rank.artifacts.lock import locked
from orca_rank.build import targets
from orca_rank.fitted import Fitted, chosen_folder, load
from orca_rank.report.plots import nested_figure, png
from orca_rank.report.rank_curve import NAME, separate_runs
from orca_rank.report.run_folder import RunFolder, read_tunes
from orca_rank.stages.setup import check_same_data, data_for, stage_folder
from orca_rank.stages.tracking import show
from orca_rank.stages.trainer import device_of
from orca_rank.tracking.pages import rank_curve_page

console = Console(highlight=False, markup=False)
Batches = Iterable[tuple[Tensor, Tensor]]


def run(config: DictConfig) -> None:
    """Write finetune/<tag>/rank_curve.csv (rank, parameters, scale, val, test) and rank_curve.png.

    The fine-tune is chosen by finetune.tag; where there is only one with nested adapters, it may stay null. Nothing is
    trained: at rank r every layer uses its first min(r, r_max) rows, and `scale` is that of the layers that have r. The
    figure also shows separate fine-tunes of the same run with uniform ranks, see `separate_runs`.

    Raises:
        ValueError: if the fine-tune has no nested adapter, or the data are of another task. BlockingIOError: another
            process is at work in the folder.
    """
    folder = chosen_folder(stage_folder(config, "finetune").parent, config.finetune.tag)
    with locked(folder):
        fitted = load(folder, trust=targets(config))
        fitted.to(device_of(config.trainer))
        layers = fitted.nested().values()
        check_same_data(config, fitted)
        data = data_for(config.data, fitted, "fit")
        parts: dict[str, Batches] = {"val": data.val_dataloader(), "test": data.test_dataloader()}
        widest = max(layers, key=lambda layer: layer.rank)
        top = widest.rank
        with Progress(console=console, transient=True, disable=not config.trainer.enable_progress_bar) as progress:
            bar = progress.add_task("every rank", total=2 * top)
            found = {
                part: rank_curve(fitted, batches, lambda: progress.advance(bar)) for part, batches in parts.items()
            }
        rows = [
            {
                "rank": rank,
                "parameters": parameters(layers, rank),
                "scale": widest.scale_at(rank),
                "val": found["val"][rank],
                "test": found["test"][rank],
            }
            for rank in found["val"]
        ]
        write_csv(folder / f"{NAME}.csv", rows)
        tunes = read_tunes(RunFolder(folder.parent.parent, "")).tunes
        others = separate_runs(tunes, [tune for tune in tunes if tune.tag == folder.name])
        with atomic(folder / f"{NAME}.png") as temporary:
            temporary.write_bytes(png(nested_figure({folder.name: rows}, others, fitted.task)))
        made_from = read_json(folder / "metrics.json", "stage=finetune")["config"]
        show(config, "rank_curve", folder / "log" / NAME, made_from, lambda: rank_curve_page(folder), folder.name)
    best, metric = min(rows, key=lambda row: row["val"]), fitted.task.metric_name
    mean = sum(row["test"] for row in rows) / len(rows)
    console.print(
        f"ranks 1 to {top}: the lowest validation {metric} is {best['val']:.4g}, at rank {best['rank']} (test "
        f"{best['test']:.4g}); mean test {metric} over ranks {mean:.4g}; written to {folder / NAME}.csv and .png",
        soft_wrap=True,
    )


@torch.inference_mode()
def rank_curve(fitted: Fitted, batches: Batches, advance: Callable[[], object] = lambda: None) -> dict[int, float]:
    """The task's metric, mean over samples, with all layers at rank 1, 2, … the largest r_max.

    Args:
        fitted: a fine-tune with nested adapters. batches: (x, y). advance: called after each rank.
    """
    device = next(fitted.parameters()).device

    def metric() -> float:
        found = [fitted.task.metric(fitted.model(x.to(device)), y.to(device)).cpu() for x, y in batches]
        advance()
        return float(torch.cat(found).double().mean())

    return evaluate_ranks(fitted.model.body, metric)


def parameters(layers: Iterable[DyLoRA], rank: int) -> int:
    """How many the adapters have when all are cut to a rank."""
    return sum(min(rank, layer.rank) * (layer.d_in + layer.d_out) for layer in layers)
