"""Options that mean nothing: one sentence that names option, value and what is expected, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import DictConfig
from shared import TINY_SWIN

from orca_rank.options import flag, number, one_of, read, whole
from orca_rank.stages import align, finetune, pretrain

COMMON = [
    ("embedder.train=maybe", "embedder.train=maybe"),
    ("predictor.frozen_on_purpose=maybe", "predictor.frozen_on_purpose=maybe: expected true or false"),
    ("trainer.devices=2", "trainer.devices=2 .*one process.*trainer.devices=1"),
    ("trainer.devices=[0,1]", "one process"),
    ("+trainer.num_nodes=2", "trainer.num_nodes=2.*one process"),
    ("trainer.precision=3", "trainer: "),
    ("+trainer.max_epochs=3", r"trainer\.max_epochs.*finetune\.epochs"),
]
FINETUNE = [
    ("finetune.epochs=-1", "finetune.epochs=-1: expected a whole number of at least 1"),
    ("finetune.epochs=0", "finetune.epochs=0"),
    ("finetune.epochs=1.5", "finetune.epochs=1.5: expected a whole number"),
    ("finetune.epochs=null", "finetune.epochs=null"),
    ("finetune.accumulate=0", "finetune.accumulate=0"),
    ("finetune.accumulate=-2", "finetune.accumulate=-2"),
    ("finetune.clip=-1", "finetune.clip=-1: expected a number above 0 or null"),
    ("finetune.patience=-1", "finetune.patience=-1"),
    ("finetune.warmup_epochs=-3", r"finetune.warmup_epochs=-3: expected a number in \[0, "),
    ("finetune.warmup=1.5", r"finetune.warmup=1.5: expected a number in \[0, 1\]"),
    ("finetune.schedule=step", "finetune.schedule=step: expected linear, cosine, constant or wsd"),
    ("finetune.optimizer.lr=0", "finetune.optimizer.lr=0: expected a number above 0"),
    ("finetune.optimizer.betas=[0.9,2]", "finetune.optimizer: "),
    ("finetune.predictor_lr=-1", "finetune.predictor_lr=-1"),
    ("finetune.tag=../x", r"finetune.tag=\.\./x: expected the name of one folder"),
    ("+finetune.epoch=3", "finetune has no option epoch: expected epochs, "),
    ("adapter.module.alpha=0", "adapter.module.alpha=0: expected a number above 0"),
    ("+adapter.lr_ratio=0", "adapter.lr_ratio=0"),
    ("budget.mean_rank=-4", "mean_rank"),
]
ALIGN = [
    ("align.epochs=0", "align.epochs=0"),
    ("align.epochs=null", "align.epochs=null"),
    ("align.schedule=sgd", "align.schedule=sgd: expected orca or batch"),
    ("align.decay.factor=nan", r"align.decay.factor=nan: expected a number in \(0, 1\]"),
    ("align.decay.every=0", "align.decay.every=0"),
    ("align.patience=-1", "align.patience=-1"),
    ("align.batch_size=0", "align.batch_size=0"),
    ("align.curriculum.start=2", r"align.curriculum.start=2: expected a number in \[0, 1\]"),
    ("align.clusters=0", "align.clusters=0"),
    ("align.held_out.resamples=-1", "align.held_out.resamples=-1"),
    ("align.optimizer.lr=nan", "align.optimizer.lr=nan"),
]
PRETRAIN = [
    ("++backbone.recipe={epochs: 0}", "recipe.epochs=0"),
    ("++backbone.recipe={epocs: 1}", "backbone.recipe has no option epocs"),
    ("++backbone.recipe={augmentation: 3}", "backbone.recipe.augmentation=3: expected options among crop_scale"),
]


@pytest.mark.parametrize(
    ("stage", "option", "message"),
    [
        *((finetune, *case) for case in [*COMMON, *FINETUNE]),
        *((align, *case) for case in [*COMMON[:2], *ALIGN]),
        *((pretrain, *case) for case in [*COMMON[:1], *PRETRAIN]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_option_is_named_before_anything_is_written(
    composed: Callable[..., DictConfig], tmp_path: Path, stage: object, option: str, message: str
) -> None:
    config = composed("data=digits", "source=digits", *TINY_SWIN, "embedder.aligned=false", option)
    with pytest.raises(ValueError, match=message) as caught:
        stage.run(config)  # type: ignore[attr-defined]  # one of the stages
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Inner:
    size: int

    def __post_init__(self) -> None:
        whole("outer.inner.size", self.size)


@dataclass(frozen=True)
class Outer:
    share: float
    inner: Inner
    other: Inner | None = None


def test_options_are_read_with_those_inside_them() -> None:
    assert read(Outer, {"share": 0.5, "inner": {"size": 2}}, "outer") == Outer(0.5, Inner(2))
    assert read(Outer, {"share": 0.5, "inner": {"size": 2}, "other": {"size": 3}}, "outer").other == Inner(3)
    for wrong, message in (
        ({"share": 1}, "inner"),
        ({"share": 1, "inner": {"size": 0}}, "outer.inner.size=0"),
        ({"share": 1, "inner": {"size": 1}, "shape": 2}, "outer has no option shape: expected share, inner"),
        (3, "outer=3: expected options among share, inner"),
    ):
        with pytest.raises(ValueError, match=message):
            read(Outer, wrong, "outer")


def test_checks_take_what_fits_and_say_what_would() -> None:
    whole("n", 3, 1, 3)
    number("x", 1, least=1, most=1)
    number("x", None, null=True)
    flag("f", False)
    one_of("w", "a", ("a", "b"))
    for check, message in (
        (lambda: whole("n", True), "n=true: expected a whole number of at least 1"),
        (lambda: whole("n", 4, 1, 3), "n=4: expected a whole number from 1 to 3"),
        (lambda: number("x", 1, above=1), "x=1: expected a number above 1"),
        (lambda: number("x", 2, below=2), "x=2: expected a number below 2"),
        (lambda: number("x", float("inf")), "x=inf: expected a finite number"),
        (lambda: number("x", "2", least=0, below=3), r"x=2: expected a number in \[0, 3\)"),
        (lambda: flag("f", 1), "f=1: expected true or false"),
        (lambda: one_of("w", None, ("a", "b", "c")), "w=null: expected a, b or c"),
    ):
        with pytest.raises(ValueError, match=message):
            check()
