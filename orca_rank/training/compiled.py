"""A body whose blocks run under torch.compile, and a trial of the compiler before training begins."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from orca_rank.backbone import OrcaModel
from orca_rank.backbone.families import feature_info
from orca_rank.data.shares import sizes_of
from orca_rank.options import one_of
from orca_rank.processes import world
from orca_rank.training.forwards import replace_forward

BLOCK = re.compile(r"(.*\.)?blocks\.\d+")
VARIANTS = 256  # blocks of one class share what was compiled: one for every width, mask, rank, batch size and mode


def check_backend(backend: str | None) -> None:
    """Raise a ValueError for a back end that torch.compile does not know here."""
    if backend is not None:
        from torch._dynamo import list_backends  # here, because it takes a second

        one_of("finetune.compile", backend, (*list_backends(), "aot_eager", "eager"))


def blocks_of(body: nn.Module) -> list[nn.Module]:
    """The blocks of a body, or its stages where it has none."""
    names = [name for name, _ in body.named_modules() if BLOCK.fullmatch(name)]
    if not names:
        names = [str(stage["module"]) for stage in feature_info(body)]
    inside = tuple(f"{name}." for name in names)
    return [body.get_submodule(name) for name in names if not name.startswith(inside)]


@contextmanager
def compiled(body: nn.Module, backend: str | None) -> Iterator[None]:
    """Within the block, what the forward pass of every block of a body does is compiled.

    Hooks of a block, by which a predictor reads its output, stay outside of what is compiled; the names of modules and
    parameters stay what they are. Afterwards nothing of it is left, neither in the body nor in the process.

    Args:
        backend: of torch.compile; None compiles nothing.
    """
    if backend is None:
        yield
        return
    limits = torch._dynamo.config.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=VARIANTS)
    with ExitStack() as undo:
        undo.callback(torch._dynamo.reset)
        undo.enter_context(limits)
        for block in blocks_of(body):
            undo.callback(replace_forward(block, torch.compile(block.forward, backend=backend)))
        yield


class Trial(Callback):
    """Before the first step: one pass forward and back, and one without gradients, of every batch size of an epoch, so
    that a compiler that fails does so here. Weights, buffers and random numbers stay as they are.

    Args:
        shape: of a sample. backend: for the message.
    """

    def __init__(self, shape: Sequence[int], backend: str) -> None:
        self.shape, self.backend = tuple(shape), backend

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        model: Any = module.model
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            with torch.random.fork_rng(), trainer.precision_plugin.train_step_context():
                for size in self._sizes(trainer.train_dataloader):
                    self._pass(trainer, module, model, size)
        except Exception as error:
            said = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"finetune.compile={self.backend}: the compiler failed on the model ({type(error).__name__}: {said}); "
                f"inductor needs a C++ compiler on a CPU and triton on a GPU: install it, or set finetune.compile=null"
            ) from error
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

    def _pass(self, trainer: L.Trainer, module: L.LightningModule, model: OrcaModel, size: int) -> None:
        x = trainer.precision_plugin.convert_input(torch.zeros(size, *self.shape, device=module.device))
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        torch.autograd.grad(model(x).float().sum(), weights, allow_unused=True)
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()

    def _sizes(self, loader: Any) -> list[int]:
        """The different batch sizes of an epoch, of this process."""
        sizes, (rank, among, _) = sizes_of(loader), world()
        if sizes is None:
            return [1]
        first, last = 0, -(-sizes.samples // sizes.batch_size) - 1
        return sorted({max(1, sizes.own(i, rank, among)) for i in (first, last)}, reverse=True)
