"""Options that mean nothing: one sentence that names option, value and what is expected, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from shared import TINY_SWIN

from orca_rank.build import build
from orca_rank.job import check as check_top
from orca_rank.options import flag, number, one_of, read, whole
from orca_rank.stages import align, finetune, measure, plan, pretrain

COMMON = [
    ("embedder.train=maybe", "embedder.train=maybe"),
    ("predictor.frozen_on_purpose=maybe", "predictor.frozen_on_purpose=maybe: expected true or false"),
    ("trainer.devices=2", "trainer.devices=2 .*asks for 2 processes.*this is one of 1.*trainer.devices=1"),
    ("trainer.devices=[0,1]", "asks for 2 processes"),
    ("trainer.devices=many", "trainer.devices=many .*expected whole numbers"),
    ("+trainer.num_nodes=2", "trainer.num_nodes=2 asks for 2 processes"),
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
    ("finetune.reduction=max", "finetune.reduction=max: expected mean, sum or batches"),
    ("finetune.clip=-1", "finetune.clip=-1: expected a number above 0 or null"),
    ("finetune.patience=-1", "finetune.patience=-1"),
    ("finetune.ema=1", r"finetune.ema=1: expected a number in \(0, 1\)"),
    ("finetune.compile=fast", "finetune.compile=fast: expected .*inductor"),
    ("finetune.warmup_epochs=-3", r"finetune.warmup_epochs=-3: expected a number in \[0, "),
    ("finetune.warmup=1.5", r"finetune.warmup=1.5: expected a number in \[0, 1\]"),
    ("finetune.decay_epochs=0.5", r"finetune.decay_epochs=0.5: expected a number of at least \d+ or null"),
    ("finetune.schedule=step", "finetune.schedule=step: expected linear, cosine, constant or wsd"),
    ("finetune.optimizer.lr=0", "finetune.optimizer.lr=0: expected a number above 0"),
    ("finetune.optimizer.betas=[0.9,2]", "finetune.optimizer: "),
    ("finetune.predictor_lr=-1", "finetune.predictor_lr=-1"),
    ("finetune.tag=../x", r"finetune.tag=\.\./x: expected the name of one folder"),
    ("finetune.tag=''", "finetune.tag=: expected the name of one folder"),
    ("+finetune.epoch=3", "finetune has no option epoch: expected epochs, "),
    ("adapter.module.alpha=0", "adapter.module.alpha=0: expected a number above 0"),
    ("+adapter.lr_ratio=0", "adapter.lr_ratio=0"),
    ("budget.mean_rank=-4", "mean_rank"),
    ("adapter.method=injekt", "adapter.method=injekt: expected inject, full, norm or probe"),
    ("budget.total_rank=8", "exactly one of mean_rank, total_rank, parameters"),
]
ALIGN = [
    ("align.epochs=0", "align.epochs=0"),
    ("align.epochs=null", "align.epochs=null"),
    ("align.schedule=sgd", "align.schedule=sgd: expected orca or batch"),
    ("align.decay.factor=nan", r"align.decay.factor=nan: expected a number in \(0, 1\]"),
    ("align.decay.every=0", "align.decay.every=0"),
    ("align.patience=-1", "align.patience=-1"),
    ("align.batch_size=0", "align.batch_size=0"),
    ("align.random_tokens.start=2", r"align.random_tokens.start=2: expected a number in \[0, 1\]"),
    ("align.clusters=0", "align.clusters=0"),
    ("align.held_out.resamples=-1", "align.held_out.resamples=-1"),
    ("align.optimizer.lr=nan", "align.optimizer.lr=nan"),
    ("embedder.init=zeros", "embedder.init=zeros: expected pretrained or random"),
    ("align.objective.inner=best", "inner"),
    ("+align.objective.blur=1", "blur"),
    ("backbone.name=swim", "no model 'swim'"),
    ("layers.target=nothing", "layers.target"),
    ("layers.target='(attn'", "layers.target"),
    ("layers.qkv=both", "layers.qkv"),
]
KINDS = [  # of another kind than the target says, in groups that check nothing of it themselves
    ("data.invert=maybe", "Digits: invert=maybe: expected true or false"),
    ("data.split_seed=abc", "split_seed"),
    ("rank.allow_above_full=3", "uniform: allow_above_full=3: expected true or false"),
    ("trainer.log_every_n_steps=abc", "Trainer: log_every_n_steps=abc: expected a whole number or null"),
    ("trainer.deterministic=maybe", "Trainer: deterministic=maybe: expected true or false or warn or null"),
    ("layers.target=null", "layers.target=None: expected a regular expression"),
    ("backbone.pretrained=null", "backbone.pretrained=None: expected true, false or"),
]
MEASURE = [
    ("measure.compare=null", "measure.compare=None: expected names with a data config each"),
    ("measure.fitted=3", "measure.fitted=3: expected the folder of a fine-tune, or null"),
    ("gap.metrics.sliced.projections=abc", "sliced_wasserstein: projections=abc: expected a whole number"),
    ("budget.mean_rank=1e9", r"budget.mean_rank=1e\+09: expected a number of at most \d+\.?\d*, the full rank of all"),
    ("align.clusters=1.5", "align.clusters=1.5: expected a whole number"),
    ("gap.samples=3", "gap.samples"),
    ("embedder.aligned=perhaps", "embedder.aligned=perhaps: expected true or false"),
    ("rank=gradient", "gap.measurements.gradient"),
    ("+measure.compare.mine._target_=orca_rank.data.nothing.Nothing", "nothing"),
]
PLAN = [
    ("plan.rules=null", "plan.rules=None: expected a list of rules"),
    ("budget.mean_rank=1e9", "budget.mean_rank"),
    ("plan.rules=[unifrom]", "plan.rules names 'unifrom'"),
    ("embedder.train=maybe", "embedder.train=maybe"),
]
# Of the last stages, which stage=all refuses before the first has begun.
ALL = [
    *FINETUNE,
    *MEASURE,
    *PLAN,
    ("adapter.module.init=nonsense", "init"),
    ("+adapter.module.colour=red", "colour"),
    ("rank.r=-1", "-1"),
    ("report.runs=[no_such_run]", "report.runs=no_such_run"),
    ("layers.group=heads", "layers.group"),
]
PRETRAIN = [
    ("++backbone.recipe={epochs: 0}", "recipe.epochs=0"),
    ("++backbone.recipe={epocs: 1}", "backbone.recipe has no option epocs"),
    ("++backbone.recipe={augmentation: 3}", "backbone.recipe.augmentation=3: expected options among crop_scale"),
]


@pytest.mark.parametrize(
    ("stage", "option", "message"),
    [
        *((finetune, *case) for case in [*COMMON, *FINETUNE, *KINDS]),
        *((align, *case) for case in [*COMMON[:2], *ALIGN]),
        *((pretrain, *case) for case in [*COMMON[:1], *PRETRAIN]),
        *((measure, *case) for case in MEASURE),
        *((plan, *case) for case in PLAN),
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


@pytest.mark.parametrize(("option", "message"), ALL, ids=lambda value: value)
def test_all_stages_are_checked_before_the_first_begins(
    composed: Callable[..., DictConfig], tmp_path: Path, option: str, message: str
) -> None:
    config = composed("stage=all", "data=digits", "source=digits", *TINY_SWIN, option)
    with pytest.raises(ValueError, match=message) as caught:
        build(config.stage)(config)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("threads=abc", "threads must be null or a whole number of at least 1, received 'abc'"),
        ("threads=0", "threads must be"),
        ("seed=-1", "seed must be"),
        ("force=maybe", "force must be"),
        ("run=../../x", "run must be"),
    ],
)
def test_options_of_every_stage(composed: Callable[..., DictConfig], option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_top(composed(option))


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data=arrays", "data.train=3"], "Arrays: train=3: expected a word or a list of words"),
        (["data=arrays", "data.train=[x.npy,3]"], "Arrays: train=.*expected a word or a list of words"),
        (["data=arrays", "data.root=null"], "Arrays: root=null: expected a word or a path"),
        (["adapter=elalora", "adapter.module.room=abc"], "ElaLoRA: room=abc: expected a number"),
        (["adapter=elalora", "adapter.module.moved=nan"], "ElaLoRA: moved=nan: expected a whole number"),
        (["adapter=matryoshka", "adapter.module.r_min=null"], "MatryoshkaLoRA: r_min=null: expected a whole number"),
        (["adapter=delta_lora", "adapter.module.ratio=abc"], "DeltaLoRA: ratio=abc: expected a number"),
    ],
)
def test_values_of_another_kind_are_refused_wherever_they_are_built(
    composed: Callable[..., DictConfig], options: list[str], message: str
) -> None:
    config = composed(*options)
    place = options[0].split("=")[0]
    node = {"data": "data", "adapter": "adapter.module", "align": "align.objective"}[place]
    with pytest.raises(ValueError, match=message):
        build(OmegaConf.select(config, node))


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
    for refuse, message in (
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
            refuse()
