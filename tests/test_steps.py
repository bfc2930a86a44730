"""Optimiser steps of stage=finetune: windows of batches, clipping, averaged weights, half precision, compilation."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import DictConfig
from safetensors.torch import load_file
from shared import TINY_SWIN, apart

from orca_rank.stages import finetune
from orca_rank.training.average import Average, decay_at

# 45 training images: three batches of 16, of which the last has 13.
OPTIONS = (
    "data=digits",
    "data.train_limit=50",
    "data.test_limit=32",
    "data.batch_size=16",
    *TINY_SWIN,
    "+backbone.options.drop_path_rate=0",
    "rank=uniform",
    "rank.r=2",
    "embedder.aligned=false",
    "finetune.tag=mine",
    "finetune.epochs=2",
    "finetune.schedule=constant",
    "finetune.warmup=0",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
)
Result = tuple[torch.Tensor, list[float], dict[str, float]]


@pytest.fixture
def trained(composed: Callable[..., DictConfig]) -> Callable[..., Result]:
    """trained(options) -> what was trained in one vector, the losses, and the metrics."""

    def run(*options: str) -> Result:
        config = composed(*OPTIONS, *options, f"run=r{abs(hash(options))}")
        finetune.run(config)
        folder = Path(config.paths.runs) / config.run / "finetune" / "mine"
        state = load_file(folder / "model.safetensors")
        rows = list(csv.DictReader((folder / "curve.csv").read_text().splitlines()))
        metrics = json.loads((folder / "metrics.json").read_text())
        vector = torch.cat([state[name].flatten() for name in sorted(state)])
        return vector, [float(row["train/loss"]) for row in rows], metrics

    return run


@pytest.mark.parametrize(("small", "accumulate", "large"), [(16, 2, 32), (8, 4, 32)])
def test_small_batches_of_one_step_are_one_large_batch(
    trained: Callable[..., Result], small: int, accumulate: int, large: int
) -> None:
    """Also in an epoch's last step, which has fewer batches, and where its last batch has fewer samples."""
    options = ("finetune.optimizer.lr=0.01", "adapter=dylora")
    mine, losses, _ = trained(*options, f"data.batch_size={small}", f"finetune.accumulate={accumulate}")
    theirs, expected, _ = trained(*options, f"data.batch_size={large}")
    assert apart(mine, theirs) < 1e-5
    assert losses == pytest.approx(expected, rel=1e-4)


def test_clipping_bounds_the_step(trained: Callable[..., Result]) -> None:
    """One step of SGD at rate 1 moves everything together by the clipped norm."""
    sgd = ("optimizer@finetune.optimizer=sgd", "finetune.epochs=1", "data.batch_size=64", "finetune.optimizer.lr=1")
    plain = ("finetune.optimizer.momentum=0", "finetune.optimizer.weight_decay=0")
    start, _, _ = trained(*sgd[:-1], *plain, "finetune.optimizer.lr=1e-30")
    free, clipped = (trained(*sgd, *plain, f"finetune.clip={clip}")[0] for clip in ("null", "0.01"))
    assert float((clipped - start).norm()) == pytest.approx(0.01, rel=1e-3)
    assert float((free - start).norm()) > 0.02


class Fitting(L.Trainer):
    global_step = 0
    state = SimpleNamespace(fn=TrainerFn.FITTING)

    def __init__(self) -> None: ...


def test_the_average_is_what_its_formula_says() -> None:
    weights = {"w": torch.zeros(3), "count": torch.tensor(0)}
    average = Average(0.5, lambda: weights, {"w"})
    trainer, module = Fitting(), L.LightningModule()
    average.on_train_start(trainer, module)
    expected = torch.zeros(3)
    for step in range(1, 12):
        weights["w"] += torch.arange(3.0)
        weights["count"] += 1
        for trainer.global_step in (step - 1, step):  # a batch that ends no step, and one that does
            average.on_train_batch_end(trainer, module, None, None, 0)
        beta = min(0.5, (1 + step) / (10 + step))
        expected = beta * expected + (1 - beta) * weights["w"]
    assert decay_at(1, 0.5) == 2 / 11 and decay_at(10, 0.5) == 0.5
    assert apart(average.values["w"], expected) < 1e-6 and average.values["count"] == 11

    now = weights["w"].clone()
    average.on_validation_start(trainer, module)
    assert torch.equal(weights["w"], average.values["w"])
    average.on_validation_end(trainer, module)
    assert torch.equal(weights["w"], now)
    trainer.state = SimpleNamespace(fn=TrainerFn.VALIDATING)  # of the best epoch, whose weights are the average
    average.on_validation_start(trainer, module)
    assert torch.equal(weights["w"], now)

    again = Average(0.5, lambda: weights, {"w"})
    again.load_state_dict(average.state_dict())
    again.on_train_start(trainer, module)
    assert torch.equal(again.values["w"], average.values["w"]) and again.steps == 11


def test_averaged_weights_are_judged_and_kept(trained: Callable[..., Result]) -> None:
    """At β → 0 the average is the weights; at a real β it is another, validated as it is written."""
    options = ("finetune.optimizer.lr=0.01",)
    plain, averaged, same = (
        trained(*options),
        trained(*options, "finetune.ema=0.9"),
        trained(*options, "finetune.ema=1e-9"),
    )
    assert plain[1] == averaged[1]  # training is not touched
    assert apart(same[0], plain[0]) < 1e-6
    assert apart(averaged[0], plain[0]) > 1e-3
    assert same[2]["val/cross_entropy"] == pytest.approx(plain[2]["val/cross_entropy"], rel=1e-5)
    assert averaged[2]["val/cross_entropy"] != pytest.approx(plain[2]["val/cross_entropy"], rel=1e-5)


def test_bfloat16_trains_close_to_float32(trained: Callable[..., Result]) -> None:
    plain, half = trained(), trained("trainer=bf16")
    assert half[1] == pytest.approx(plain[1], rel=0.05)
    assert half[1] != plain[1]


COMPILED = ("finetune.compile=eager", "finetune.epochs=1")


def test_a_trial_of_the_compiler_changes_nothing(
    trained: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a compiler that compiles nothing the weights are bit for bit those without; it is given both blocks."""
    plain, given = trained("finetune.epochs=1"), []
    monkeypatch.setattr(torch, "compile", lambda forward, backend: given.append((forward, backend)) or forward)
    same = trained(*COMPILED)
    assert torch.equal(same[0], plain[0]) and same[1] == plain[1]
    assert len(given) == 2 and {backend for _, backend in given} == {"eager"}


def test_a_compiler_that_fails_is_one_error_before_training(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no C++ compiler\nand many lines more")

    monkeypatch.setattr(torch, "compile", lambda forward, backend: failing)
    config = composed(*OPTIONS, *COMPILED)
    message = r"^finetune.compile=eager: .*\(RuntimeError: no C\+\+ compiler\); .* or set finetune.compile=null$"
    with pytest.raises(ValueError, match=message):
        finetune.run(config)
    folder = Path(config.paths.runs) / config.run / "finetune" / "mine"
    assert not list(folder.glob("*.ckpt")) and not (folder / "curve.csv").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo looks at .grad of what is no leaf
@pytest.mark.parametrize(("adapter", "backend"), [("lora", "aot_eager"), ("elalora", "eager")])
def test_compiled_steps_are_the_same(trained: Callable[..., Result], adapter: str, backend: str) -> None:
    """The back end aot_eager traces forward and backward pass as inductor does, eager the forward pass; both call
    PyTorch's own kernels."""
    moves = ("adapter.module.every=1", "adapter.module.tinit=0") if adapter == "elalora" else ()
    options = (f"adapter={adapter}", *moves, "finetune.optimizer.lr=0.01")
    plain, compiled = trained(*options), trained(*options, f"finetune.compile={backend}")
    assert apart(compiled[0], plain[0]) < 1e-5
    assert compiled[1] == pytest.approx(plain[1], rel=1e-5)
