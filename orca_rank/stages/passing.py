"""How images pass through a model that is measured; the processes of a run share every batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from rich.progress import Progress
from torch.utils.data import DataLoader

from orca_rank.backbone import OrcaModel
from orca_rank.data import Data, count
from orca_rank.data.module import InMemory
from orca_rank.data.shares import Sizes, share, sizes_of
from orca_rank.measuring.gradients import Gradients, collect_gradients
from orca_rank.measuring.hidden import hidden_dimensions
from orca_rank.measuring.layers import Side, take_side
from orca_rank.measuring.matrices import matrix_of
from orca_rank.measuring.passes import Shared
from orca_rank.processes import world
from orca_rank.stages.setup import seed_everything


@dataclass(frozen=True)
class Pass:
    """How images pass through a model: their number, the k of their classes where targets are fields, seed, device.

    The methods give every process the same; all together.
    """

    samples: int
    clusters: int
    seed: int
    device: torch.device
    progress: Progress

    def side(self, model: OrcaModel, data: Data, watched: Sequence[str], tokens: int, name: str) -> Side:
        """Images through embedder and body: what reaches every watched module, `tokens` of it for spectra."""
        model, loader, samples, shared = self._ready(model, data)
        modules = {module: model.body.get_submodule(module) for module in watched}
        return take_side(
            lambda x: model.body(model.embedder(x)),
            modules,
            loader,
            samples,
            self.clusters,
            tokens=tokens,
            seed=self.seed,
            device=self.device,
            shared=shared,
            advance=self.bar(f"images: {name}", samples),
        )

    def gradients(
        self, model: OrcaModel, data: Data, watched: Sequence[str], draws: int, moments: bool
    ) -> dict[str, Gradients]:
        """The target's loss at the start of fine-tuning, backward to every watched module."""
        model, loader, samples, shared = self._ready(model, data)
        return collect_gradients(
            model.embedder,
            model.head,
            data.task.loss,
            {module: matrix_of(model.body, module) for module in watched},
            loader,
            samples,
            draws=draws,
            moments=moments,
            seed=self.seed,
            device=self.device,
            shared=shared,
            advance=self.bar("gradients", samples),
        )

    def hidden(self, model: OrcaModel, data: Data, watched: Sequence[str]) -> dict[str, tuple[float, float]]:
        """The target's intrinsic dimension at both ends of every block."""
        model, loader, samples, shared = self._ready(model, data)
        return hidden_dimensions(
            lambda x: model.body(model.embedder(x)),
            {module: matrix_of(model.body, module) for module in watched},
            dict(model.body.named_modules()),
            loader,
            samples,
            device=self.device,
            shared=shared,
            advance=self.bar("hidden states", samples),
        )

    def bar(self, name: str, total: int) -> Callable[..., None]:
        task = self.progress.add_task(name, total=total)
        return lambda steps=1: self.progress.advance(task, steps)

    def _ready(self, model: OrcaModel, data: Data) -> tuple[OrcaModel, DataLoader[Any], int, Shared | None]:
        seed_everything(self.seed)  # the order of the images, whatever ran before
        loader = data.train_dataloader() if labelled(data) else cast(InMemory, data).loader("all", shuffle=True)
        (rank, size, _), samples, shared = world(), min(self.samples, count(loader)), None
        if size > 1:
            if samples < size:
                raise ValueError(
                    f"{samples} images of the {type(data).__name__} data are shared by {size} processes: expected at "
                    f"least one for each, so set trainer=default"
                )
            loader = share(loader, rank, size, "gap.batch_size, or the data's own batch_size")
            shared = Shared(rank, size, cast(Sizes, sizes_of(loader)).batch)
        return model.eval().to(self.device), loader, samples, shared


def labelled(data: Data) -> bool:
    """Whether the data have targets."""
    return getattr(data, "labelled", True)
