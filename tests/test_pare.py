"""PaRe as its authors define it: how many tokens, which ones, their gradient and the loss; and what a fine-tune makes
of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from safetensors.torch import load_file
from shared import TINY_FINETUNE, apart
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from orca_rank import load
from orca_rank.__main__ import CONF
from orca_rank.backbone import OrcaModel
from orca_rank.data.module import Batches, as_it_is
from orca_rank.stages import finetune, plan
from orca_rank.task import Task
from orca_rank.training.pare import (
    Lender,
    PaRe,
    PareOptions,
    Place,
    one_hot_top,
    relaxed_top,
    replace,
    straight_through_top,
    trained_parts,
)

Compose = Callable[..., DictConfig]
PAPER = {"name": "pare", "begin": 1000 / 3136, "end": 500 / 3136, "weight": 0.3, "drawn": 0.1, "temperature": 0.9}
OPTIONS = PareOptions(**PAPER, replaced="worst")  # type: ignore[arg-type]
T, D, SOURCES = 12, 5, 7


def test_k_falls_from_1000_towards_500_of_3136_tokens_over_the_epochs() -> None:
    """As the public configuration of Darcy has it: int(1000 - 500 * epoch / 100)."""
    assert [OPTIONS.count(epoch, 100, 3136) for epoch in range(100)] == [1000 - 5 * epoch for epoch in range(100)]
    whole = PareOptions("pare", 1.0, 0.0, 0.3, 0.1, 0.9, "worst")
    assert [whole.count(epoch, 4, 8) for epoch in range(4)] == [8, 6, 4, 2]


def test_the_relaxed_top_k_sums_to_k_and_hardens_as_it_cools() -> None:
    scores = torch.randn(3, T, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(relaxed_top(scores, 1, 0.7), torch.softmax(scores / 0.7, 1))
    for k in (0, 1, 5, T):
        assert relaxed_top(scores, k, 0.9).sum(1).tolist() == pytest.approx([k] * 3)
    assert apart(relaxed_top(scores, 4, 1e-5), one_hot_top(scores, 4)) < 1e-6
    one, two = torch.softmax(scores, 1), torch.softmax(scores + torch.log(1 - torch.softmax(scores, 1)), 1)
    assert apart(relaxed_top(scores, 2, 1.0), one + two) < 1e-12


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    scores = torch.randn(2, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    hard = straight_through_top(scores, 4, 0.9)
    assert torch.equal(hard, one_hot_top(relaxed_top(scores, 4, 0.9), 4))
    assert set(hard.flatten().tolist()) == {0.0, 1.0} and hard.sum(1).tolist() == [4, 4]
    weight = torch.randn(2, T, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (found,) = torch.autograd.grad((weight * hard).sum(), scores)
    (soft,) = torch.autograd.grad((weight * relaxed_top(scores, 4, 0.9)).sum(), scores)
    assert torch.equal(found, soft)
    step = 1e-6 * torch.eye(T, dtype=torch.float64)
    with torch.no_grad():
        differences = [
            (weight[0] * (relaxed_top(scores[:1] + s, 4, 0.9) - relaxed_top(scores[:1] - s, 4, 0.9))).sum() / 2e-6
            for s in step
        ]
    assert apart(found[0], torch.stack(differences)) < 1e-6


def test_lent_tokens_take_the_free_places_in_order() -> None:
    target, source = torch.arange(12.0).view(1, 6, 2), 100 + torch.arange(12.0).view(1, 6, 2)
    kept, lent = torch.tensor([[1.0, 0, 1, 1, 0, 0]]), torch.tensor([[0.0, 1, 1, 0, 0, 1]])
    mixed = replace(target, source, kept, lent)
    expected = torch.stack([target[0, 0], source[0, 1], target[0, 2], target[0, 3], source[0, 2], source[0, 5]])
    assert torch.equal(mixed[0], expected)
    assert torch.equal(replace(target, source, torch.ones(1, 6), torch.zeros(1, 6)), target)
    assert torch.equal(replace(target, source, torch.zeros(1, 6), torch.ones(1, 6)), source)


class Means(OrcaModel):
    """Two target classes, and a map, from the mean token."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def output_and_last(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        mean = tokens.flatten(1, -2).mean(1)  # (B, d)
        return mean[:, :2] ** 2, mean[:, None, None]


def pare(task: Task | None = None, epochs: int = 10, **options: Any) -> PaRe:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(SOURCES, 3, 4, D, generator=generator)
    dataset = Batches(tokens, torch.arange(SOURCES) % 3)
    torch.manual_seed(6)
    chosen = PareOptions(**{**PAPER, "replaced": "worst", **options})  # type: ignore[arg-type]
    task = task or Task("classification", (1, 8, 8), (2,))
    parts = trained_parts(D, D, 3)
    return PaRe(chosen, task, Lender(dataset, as_it_is, 0), nn.Identity(), parts, epochs, seed=3)


def batch(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 4, D, generator=torch.Generator().manual_seed(7)), torch.arange(n) % 2


@pytest.mark.parametrize("epoch", [0, 9])
def test_the_term_is_weighted_by_the_shares_of_target_and_source(epoch: int) -> None:
    module, (tokens, y), place = pare(begin=0.5, end=0.2), batch(), Place(epoch, 1, 4)
    x_source, y_source = module.lender.take(place, 4)
    count = module.options.count(epoch, 10, T)
    assert count == {0: 6, 9: round(12 * 0.23)}[epoch]
    mixed = module.mix(tokens.flatten(1, 2), x_source.flatten(1, 2), count, place).mean(1)
    scores = torch.cat([mixed[:, :2] ** 2, module.parts["head"](mixed)], 1)  # one softmax over 2 + 3 classes
    on_target, on_source = F.cross_entropy(scores, y), F.cross_entropy(scores, 2 + y_source)
    expected = 0.3 * ((1 - count / T) * on_target + count / T * on_source)
    found = module(Means(), tokens, y, place, 4)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_targets_without_classes_leave_the_source_to_a_head_of_its_own() -> None:
    task = Task("dense", (1, 8, 8), (1, 2, 1))
    module = pare(task)
    output, scores, y = torch.tensor([[[[1.0], [2]]]]), torch.tensor([[0.0, 1, 2]]), torch.tensor([[[[2.0], [2]]]])
    on_target, on_source = module.losses(output, scores, y, torch.tensor([2]))
    assert float(on_target) == pytest.approx(1 / 8**0.5)  # relative L2
    assert float(on_source) == pytest.approx(float(torch.logsumexp(scores, 1)) - 2)


def test_the_gate_learns_while_tokens_are_drawn_and_then_rests() -> None:
    module, (tokens, y) = pare(), batch()
    tokens.requires_grad_()
    for epoch, learns in ((0, True), (1, False)):
        module.zero_grad()
        module(Means(), tokens, y, Place(epoch, 0, 4), 4).backward()
        gradient = module.parts["gate"].weight.grad
        assert (gradient is not None and float(gradient.norm()) > 0) == learns
        assert float(module.parts["head"].weight.grad.norm()) > 0
    assert tokens.grad is not None and float(tokens.grad.norm()) > 0


@pytest.mark.parametrize("replaced", ["worst", "best"])
def test_once_nothing_is_drawn_the_best_source_tokens_take_the_places_of_the_worst_or_best(replaced: str) -> None:
    module, (tokens, _) = pare(drawn=0.0, replaced=replaced), batch()
    target, source = tokens.flatten(1, 2), torch.randn(4, T, D, generator=torch.Generator().manual_seed(8))
    mixed = module.mix(target, source, 5, Place(0, 0, 4))
    for i in range(4):
        order = module.scores(target)[i].argsort().tolist()
        free = sorted(order[:5] if replaced == "worst" else order[-5:])
        lent = sorted(module.scores(source)[i].argsort().tolist()[-5:])
        expected = target[i].clone()
        expected[free] = source[i][lent]
        assert torch.equal(mixed[i], expected)


def test_noise_decides_among_equal_scores_and_is_that_of_the_epoch_and_batch() -> None:
    module, (tokens, _) = pare(drawn=1.0), batch()
    target, source = tokens.flatten(1, 2), torch.zeros(4, T, D)

    def kept(place: Place) -> Tensor:
        return (module.mix(target, source, 5, place) != 0).any(2)

    first = kept(Place(0, 0, 4))
    assert torch.equal(first, kept(Place(0, 0, 4)))
    assert not torch.equal(first, kept(Place(0, 1, 4))) and not torch.equal(first, kept(Place(1, 0, 4)))
    often = torch.stack([kept(Place(0, i, 4)) for i in range(150)]).float().mean((0, 1))
    assert often.min() > 0.4 and often.max() < 0.75  # 7 of 12 on average, the scores being near to each other


@pytest.mark.parametrize("samples", [5, 1])
def test_processes_draw_together_what_one_draws(samples: int) -> None:
    module, (tokens, _) = pare(), batch(samples)
    whole = module.lender.take(Place(0, 2, samples), 6)
    target = tokens.flatten(1, 2)
    mixed = module.mix(target, whole[0].flatten(1, 2), 4, Place(0, 2, samples))
    for rank in range(2):
        place = Place(0, 2, samples, rank, 2)
        x, y = module.lender.take(place, 6)
        rows = torch.arange(samples)[rank::2] if samples > rank else torch.tensor([0])
        assert torch.equal(x, whole[0][rows]) and torch.equal(y, whole[1][rows])
        assert torch.equal(module.mix(target[rows], x.flatten(1, 2), 4, place), mixed[rows])


def test_a_source_that_ends_begins_again_and_has_another_order_in_every_epoch() -> None:
    lender = Lender(Batches(torch.arange(float(SOURCES)), torch.arange(SOURCES)), as_it_is, 0)
    epochs = [torch.cat([lender.take(Place(e, i, 4), 4)[1] for i in range(4)]).tolist() for e in range(3)]
    for labels in epochs:
        assert sorted(labels[:SOURCES]) == list(range(SOURCES)) and labels[SOURCES:14] == labels[:SOURCES]
    assert len({tuple(labels) for labels in epochs}) == 3
    plain = TensorDataset(torch.arange(float(SOURCES)), torch.arange(SOURCES))
    assert Lender(plain, default_collate, 0).take(Place(0, 1, 4), 4)[1].tolist() == epochs[0][4:8]


TINY = (*TINY_FINETUNE, "stage=finetune", "source=digits", "source.train_limit=40", "rank=uniform", "rank.r=2")
WITH = "finetune/curriculum=pare"


def result(config: DictConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    folder = Path(config.paths.runs) / config.run / "finetune" / finetune.tag(config)
    return load_file(folder / "model.safetensors"), json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_weight_of_0_is_plain_fine_tuning_exactly(composed: Compose, clip: float | None) -> None:
    """Gate and head are counted, and are no part of the model that is written and loaded. Clipped it is so to rounding:
    their zeros change the order in which some processors add up the norm."""
    options = (
        *TINY,
        "adapter.module.dropout=0.2",
        "finetune.epochs=2",
        f"finetune.clip={'null' if clip is None else clip}",
    )
    alike, plain = composed(*options, WITH, "finetune.curriculum.weight=0"), composed(*options)
    for config in (alike, plain):
        finetune.run(config)
    (tensors, metrics), (others, expected) = result(alike), result(plain)
    assert tensors.keys() == others.keys()
    same = torch.equal if clip is None else partial(torch.allclose, rtol=1e-4, atol=1e-6)
    assert all(same(tensors[name], others[name]) for name in tensors)
    assert metrics["test/error"] == expected["test/error"]
    width, features, classes = 8, 16, 10
    other = width + 1 + (features + 1) * classes
    counts, before = metrics["trainable_parameters"], expected["trainable_parameters"]
    assert counts == {**before, "other": other, "total": before["total"] + other}
    assert load(Path(alike.paths.runs) / alike.run, finetune.tag(alike)).metrics["test/error"] == metrics["test/error"]
    plan.run(composed(*options, WITH))
    planned = json.loads((Path(alike.paths.runs) / alike.run / "plan" / "plan.json").read_text())
    assert planned["trainable_parameters"] == counts

    finetune.run(changed := composed(*options, WITH))
    assert not torch.equal(result(changed)[0]["predictor.fc.weight"], others["predictor.fc.weight"])


ADAPTERS = sorted(path.stem for path in (CONF / "adapter").glob("*.yaml"))
MEASURED = ("dylora_ibp", "gora", "matryoshka_ibp", "gated_ibp", "lora_directions")  # take something from stage=measure


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name not in MEASURED])
def test_every_adapter_trains_so(composed: Compose, adapter: str) -> None:
    qkv = "fused" if "PeftAdapter" in (CONF / "adapter" / f"{adapter}.yaml").read_text() else "separate"
    often = ["adapter.module.every=1"] if adapter == "elalora" else []  # of a few steps
    config = composed(*TINY, WITH, f"adapter={adapter}", f"layers.qkv={qkv}", "trainer.accelerator=cpu", *often)
    finetune.run(config)
    tensors, metrics = result(config)
    assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())
    assert metrics["trainable_parameters"]["other"] >= 179


def test_a_source_that_cannot_lend_is_refused_before_any_work(composed: Compose, tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((12, 3, 8, 8), np.float32)
    np.savez(tmp_path / "fields.npz", x=x, y=x[:, 0])
    np.savez(tmp_path / "grey.npz", x=x[:, :1], y=np.arange(12) % 2)
    arrays = ("source=arrays", f"source.root={tmp_path}")
    with pytest.raises(ValueError, match=r"images with a class each: the source is a dense task; set source to tiny"):
        finetune.run(composed(*TINY, WITH, *arrays, "source.train=fields.npz", "source.channels=first"))
    with pytest.raises(ValueError, match=r"the source has no labels; set source to"):
        finetune.run(composed(*TINY, WITH, *arrays, "source.train=fields.npz", "source.y=null"))
    with pytest.raises(ValueError, match=r"images have 1 channels, the pretrained embedder reads 3; set source to"):
        finetune.run(composed(*TINY, WITH, *arrays, "source.train=grey.npz", "source.channels=first"))
    with pytest.raises(ValueError, match=r"finetune.curriculum=pare: .* finetune/curriculum=pare"):
        finetune.run(composed(*TINY, "finetune.curriculum=pare"))
    with pytest.raises(ValueError, match=r"finetune.curriculum.end=0.5: expected a number in \[0, 0.3189\]"):
        finetune.run(composed(*TINY, WITH, "finetune.curriculum.end=0.5"))
    assert not (tmp_path / "runs").exists()


def test_the_tokens_that_come_with_swin_micro_can_be_lent(composed: Compose) -> None:
    from orca_rank.stages.curriculum import labelled_source

    source = labelled_source(composed(WITH, "source=embedded", "backbone=swin_micro"))
    assert source is not None and source.classes == 200
    x, y = next(iter(source.data.train_dataloader()))
    assert source.embedder(x).shape[1:] == (16, 16, 32) and len(y) == len(x)
