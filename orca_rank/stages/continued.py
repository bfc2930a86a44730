"""finetune.from: begin where another fine-tune of the run ended, with its adapters cut to this one's ranks."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from orca_rank.adapters import DyLoRA, LoRA, adapters
from orca_rank.backbone import OrcaModel
from orca_rank.fitted import Fitted, load
from orca_rank.task import Task


@torch.no_grad()
def go_on_from(model: OrcaModel, folder: Path, task: Task, weights: str, trust: Collection[str]) -> None:
    """Give embedder, predictor and adapters the values of a finished fine-tune.

    Of a nested adapter (DyLoRA, MatryoshkaLoRA) a layer takes its first r rows and columns, of any other with a
    low-rank ΔW the best approximation of rank r (Eckart and Young). Where r is larger than what is there, the rows
    beyond it start as new ones do, at ΔW = 0.

    Args:
        model: with its own adapters in place. folder: <run>/finetune/<tag>. task: of the data. weights: hash of the
            body before it was adapted. trust: see `load`.

    Raises:
        ValueError: if it was trained on another backbone or task, or its adapters have no low-rank form.
            FileNotFoundError: nothing finished there.
    """
    before = load(folder, trust=trust)
    if before.metrics["backbone"]["hash"] != weights:
        raise ValueError(f"{folder} was trained on another backbone's weights: choose another finetune.from")
    _check(model, before, folder, task)
    model.embedder.load_state_dict(before.model.embedder.state_dict())
    model.predictor.load_state_dict(before.model.predictor.state_dict())
    found = adapters(before.model.body)
    for name, adapter in adapters(model.body).items():
        own = found.get(name)
        adapter.lora_B.zero_()  # where its own start is not at ΔW = 0
        if own is None:  # a rank of 0 there
            continue
        a, b = _product(own, adapter.rank)
        adapter.lora_A[: len(a)] = a.to(adapter.lora_A)
        adapter.lora_B[:, : len(a)] = b.to(adapter.lora_B) / adapter.scale


def _check(model: OrcaModel, before: Fitted, folder: Path, task: Task) -> None:
    theirs = before.task
    if (theirs.kind, theirs.input_shape, theirs.output_shape) != (task.kind, task.input_shape, task.output_shape):
        raise ValueError(
            f"{folder} was trained for {theirs.kind} {theirs.input_shape} -> {theirs.output_shape}, the data are "
            f"{task.kind} {task.input_shape} -> {task.output_shape}: choose another finetune.from"
        )
    first = next(iter(adapters(model.body).values()), None)
    if not isinstance(first, LoRA) or type(first) is not LoRA or first.moves_base or not adapters(before.model.body):
        raise ValueError(
            "finetune.from goes on with plain LoRA from a fine-tune with adapters: set adapter=lora (with an init that "
            f"leaves the weights as they are), and finetune.from to such a fine-tune, received {folder}"
        )


def _product(adapter: LoRA, rank: int) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
    """A and sB of at most this rank."""
    if isinstance(adapter, DyLoRA):
        adapter.set_rank(min(rank, adapter.rank))
        a, b, scale = adapter.plain()
        return a, scale * b
    a, b, scale = adapter.plain()
    if len(a) <= rank:
        return a, scale * b
    outer, inner = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(scale * outer.R @ inner.R.T)  # (r, r)
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]) @ inner.Q.T, outer.Q @ u[:, :rank] * root
