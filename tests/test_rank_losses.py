"""stage=rank_losses: held-out losses of every rank of a DyLoRA fine-tune, and the posterior made from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from safetensors.torch import load_file
from shared import TINY_SWIN

from orca_rank import load
from orca_rank.adapters import DyLoRA, adapters, cut, inject
from orca_rank.artifacts.provenance import plain
from orca_rank.backbone import create_model
from orca_rank.build import build
from orca_rank.fitted import Fitted
from orca_rank.ranks import Budget, Layer, posterior
from orca_rank.stages import finetune, rank_losses
from orca_rank.stages.planning import make_plan
from orca_rank.task import Task

TINY = (
    "data=digits",
    "data.train_limit=200",
    "data.batch_size=32",
    "predictor=linear",
    *TINY_SWIN,
    r"layers.target='(attn\.qkv|mlp\.fc1)$'",
    "embedder.aligned=false",
    "finetune.epochs=2",
    "finetune.warmup_epochs=0",
    "finetune.optimizer.lr=0.01",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
)


def held_out(config: DictConfig) -> tuple[torch.Tensor, torch.Tensor]:
    data = build(config.data)
    data.prepare_data()
    data.setup("fit")
    x, y = zip(*data.val_dataloader(), strict=True)
    return torch.cat(x), torch.cat(y)


def test_rows_are_the_losses_of_the_cut_model_and_the_posterior_reads_them(composed: Callable[..., DictConfig]) -> None:
    config = composed(*TINY, "rank=uniform", "rank.r=3", "adapter=dylora")
    finetune.run(config)
    run_folder = Path(config.paths.runs) / config.run
    rank_losses.run(config)
    (path,) = run_folder.glob("finetune/*/rank_losses.safetensors")
    found = load_file(path)
    x, y = held_out(config)
    body = load(run_folder).model.body
    names = list(adapters(body))
    assert found.pop("ranks").tolist() == [0, 1, 2, 3]
    assert sorted(found) == sorted(names)
    for losses in found.values():
        assert losses.shape == (4, len(y))
        assert torch.equal(losses[3], found[names[0]][3])  # at full rank all layers say the same
    for name, rank in ((names[0], 0), (names[-1], 2), (names[1], 1)):
        fitted = load(run_folder)
        cut(fitted.model.body, {other: rank if other == name else 3 for other in names})
        with torch.inference_mode():
            expected = F.cross_entropy(fitted.model(x), y, reduction="none")
        torch.testing.assert_close(found[name][rank], expected, rtol=1e-4, atol=1e-5)

    layers = [Layer(name, adapter.d_in, adapter.d_out) for name, adapter in adapters(body).items()]
    plan = posterior(layers, losses=path, tempering=1000.0, a=3.0).check(layers)
    decided = 0
    for name, losses in found.items():
        total = losses.sum(1)
        if total.sort().values.diff()[0] > 0.01:  # e^(1000 · 0.01) outweighs the prior
            assert plan[name] == total.argmin()
            decided += 1
    assert decided
    assert posterior(layers, Budget(mean_rank=2), losses=path).total_rank == 2 * len(layers)
    planned = make_plan(composed(*TINY, "rank=posterior", f"rank.losses={path}"), layers)
    assert planned.rule == "posterior"


def test_a_layer_repeats_its_full_rank_above_it_and_is_left_as_it_was(composed: Callable[..., DictConfig]) -> None:
    config = composed(*TINY)
    data = build(config.data)
    data.prepare_data()
    data.setup("fit")
    model = create_model(plain(config.backbone), data.task)
    first, second = "layers.0.blocks.0.mlp.fc1", "layers.1.blocks.0.mlp.fc1"
    inject(model.body, {first: 2, second: 4}, adapter=DyLoRA)
    for adapter in adapters(model.body).values():
        torch.nn.init.normal_(adapter.lora_B)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = Fitted(model, data.task, {}).eval().requires_grad_(False)
    seen: list[int] = []
    found = rank_losses.rank_losses(fitted, data.val_dataloader(), lambda: seen.append(1))
    assert len(seen) == len(data.val_dataloader())
    assert found["ranks"].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(found[first][2], found[first][4])
    assert not torch.allclose(found[second][2], found[second][4])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert [adapter.active for adapter in adapters(model.body).values()] == [2, 4]


def test_other_adapters_are_refused(composed: Callable[..., DictConfig]) -> None:
    task = Task("classification", (1, 8, 8), (10,))
    fitted = Fitted(create_model(plain(composed(*TINY).backbone), task), task, {})
    with pytest.raises(ValueError, match="adapter=dylora"):
        rank_losses.rank_losses(fitted, [])
