"""Every option of every group composes and builds; every experiment runs one tiny step; typos are errors."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from shared import TINY_SWIN

from orca_rank.__main__ import CONF
from orca_rank.build import build
from orca_rank.stages import finetune

OPTIONS = [
    (folder.name, path.stem)
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name not in ("hydra", "experiment")
    for path in sorted(folder.glob("*.yaml"))
]
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# Where a group's option is found in the composed config, if not under the group's own name.
PLACES = {"optimizer": "finetune.optimizer"}
# What the align stage completes an objective with.
SOURCE = {"source": torch.randn(12, 4), "label": torch.arange(12) % 3}
# The smallest version of a run that still goes through everything the experiment chooses.
SMALL_MODEL = (
    *TINY_SWIN,
    "embedder.aligned=false",
    "finetune.epochs=1",
    "trainer.enable_progress_bar=false",
)


def targets(node: object) -> list[DictConfig]:
    """Every node below that names a _target_, outermost first."""
    if not OmegaConf.is_dict(node):
        return []
    here = [node] if "_target_" in node else []
    return here + [found for name in node for found in (targets(node[name]) if OmegaConf.is_dict(node[name]) else [])]


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{group}={option}" for group, option in OPTIONS])
def test_every_option_composes_and_builds(
    composed: Callable[..., DictConfig], tmp_path: Path, group: str, option: str
) -> None:
    place = PLACES.get(group, group)
    override = f"{group}@{place}={option}" if group in PLACES else f"{group}={option}"
    node = OmegaConf.select(composed(override), place)
    if group == "adapter":
        assert node.method in ("inject", "full", "probe", "norm")
        assert (node.method == "inject") == ("module" in node)
    if group == "backbone":
        assert set(node) >= {"name", "pretrained", "options"}
    extra = {"logger": {"save_dir": str(tmp_path)}, "trainer": {"logger": False}}.get(group, {})
    if group == "logger" and option in ("tensorboard", "mlflow") and importlib.util.find_spec(option) is None:
        with pytest.raises(ValueError, match=rf'pip install "orca_rank\[{option}\]"'):
            build(node, **extra)
        return
    for target in targets(node):
        objective = target["_target_"].startswith("orca_rank.distances.objectives")
        assert build(target, **(SOURCE if objective else extra)) is not None


@pytest.mark.parametrize("path", sorted((CONF / "finetune" / "curriculum").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_curriculum_is_read(composed: Callable[..., DictConfig], path: Path) -> None:
    options = finetune.check_options(composed(f"finetune/curriculum={path.stem}")).curriculum
    assert options is not None and options.name == path.stem


def test_there_are_options_to_test() -> None:
    groups = {group for group, _ in OPTIONS}
    assert groups >= {"stage", "data", "source", "backbone", "align", "gap", "rank", "adapter", "trainer", "logger"}
    assert "callbacks" in groups


def opening(experiment: str) -> str:
    """The comment that an experiment's file opens with, lines that end with a backslash joined."""
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    own = [line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines)]
    return "\n".join(own).replace("\\\n", "")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_opens_with_its_command_and_its_cost(
    composed: Callable[..., DictConfig], experiment: str
) -> None:
    package, first, *rest = opening(experiment).splitlines()
    assert package == "@package _global_" and any(line.startswith("Cost: ") for line in rest)
    assert first.startswith("python -m orca_rank")
    for line in (first, *rest):
        if line.startswith("python -m orca_rank") and "<" not in line:
            words = shlex.split(line.partition("&&")[0])[3:]
            assert f"experiment={experiment}" in words or experiment == "demo"
            # Of options that are swept over, the last.
            swept = [word if "[" in word else re.sub(r"=.*,", "=", word) for word in words if word != "-m"]
            assert composed(*swept).stage is not None


def small_data(config: DictConfig, cache: Path) -> list[str]:
    """Options that make the experiment's data small; CIFAR-100, which must be downloaded, becomes digits."""
    if config.data._target_.endswith("Darcy"):
        return ["data.grid=24", "data.stride=2", "data.train=8", "data.test=4", "data.batch_size=4", "data.workers=1"]
    return ["data=digits", "data.train_limit=16", "data.batch_size=8"]


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if not name.startswith("pretrain")])
def test_every_experiment_runs_one_tiny_step(
    composed: Callable[..., DictConfig], tmp_path: Path, experiment: str
) -> None:
    options = [f"experiment={experiment}", *SMALL_MODEL]
    if composed(f"experiment={experiment}").finetune.warmup_epochs:
        options.append("finetune.warmup_epochs=1")
    given = composed(f"experiment={experiment}")
    options += small_data(given, tmp_path)
    if given.budget.mean_rank is None:
        options.append("budget.mean_rank=null")
    if composed(*options).adapter.method == "inject":
        options += ["rank=uniform", "rank.r=2"]
    if composed(*options).finetune.curriculum is not None:
        options += ["source=digits", "source.train_limit=16"]
    config = composed(*options)
    finetune.run(config)
    (path,) = (Path(config.paths.runs) / config.run / "finetune").glob("*/metrics.json")
    metrics = json.loads(path.read_text())
    name = f"test/{metrics['metric']}"
    assert torch.isfinite(torch.tensor(metrics[name]))
    assert (metrics["trainable_parameters"]["predictor"] == 0) == bool(config.predictor.frozen_on_purpose)


def test_the_recipe_of_cifar100_is_orcas(composed: Callable[..., DictConfig]) -> None:
    """Of the rates of ORCA's code: cifar100.yaml and task_configs.py."""
    config = composed("experiment=cifar100_orca")
    objective = build(config.align.objective, **SOURCE)
    features = torch.randn(5, 4, requires_grad=True)
    objective(features, torch.zeros(5, dtype=torch.long)).backward()
    assert features.grad is not None and type(objective).__name__ == "LegacyOTDD"
    (group,) = build(config.align.optimizer)([torch.zeros(1)]).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (1e-3, 0.9, 1e-3)
    tuned = build(config.finetune.optimizer)([torch.zeros(1)]).param_groups[0]
    assert (tuned["lr"], tuned["momentum"], tuned["weight_decay"]) == (1e-4, 0.9, 1e-3)
    options = finetune.check_options(composed("experiment=cifar100_orca", "backbone.pretrained=false"))
    assert options.course(60 * 49).factor(60 * 49) == pytest.approx((200 - 60) / (200 - 5))


def test_typos_are_errors(composed: Callable[..., DictConfig]) -> None:
    with pytest.raises(ConfigCompositionException, match=r"finetune\.epoch"):
        composed("finetune.epoch=3")
    with pytest.raises(MissingConfigException, match="swin_bas"):
        composed("backbone=swin_bas")
    with pytest.raises(ValueError, match="could not build"):
        build(OmegaConf.create({"_target_": "orca_rank.ranks.no_such_rule"}))
    with pytest.raises(ValueError, match="_target_"):
        build(OmegaConf.create({}))
    with pytest.raises(ValueError, match=r"SGD.*'rate'"):
        build(OmegaConf.create({"_target_": "torch.optim.SGD", "_partial_": True, "rate": 1}))


def test_an_error_of_the_target_itself_comes_through_unwrapped() -> None:
    with pytest.raises(ValueError, match="exactly one of mean_rank"):
        build(OmegaConf.create({"_target_": "orca_rank.ranks.Budget"}))


def test_the_examples_of_contributing_work_together(
    composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    examples = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 10
    for name, content in examples:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    mine = [f"{group}=mine" for group in ("data", "gap", "rank", "adapter", "predictor")]
    config = composed(f"hydra.searchpath=[file://{tmp_path / 'conf'}]", *mine, *SMALL_MODEL)
    finetune.run(config)
    (path,) = (Path(config.paths.runs) / config.run / "finetune").glob("*/metrics.json")
    metrics = json.loads(path.read_text())
    assert (metrics["config"]["adapter"]["name"], metrics["metric"]) == ("unit_rows", "error")
    assert metrics["trainable_parameters"]["predictor"] == 2 * 16 + 2  # classes × (widths of the last stage + 1)
    ranks = json.loads((path.parent / "ranks.json").read_text())["ranks"]
    assert list(ranks.values()) == [2] * 6 + [0] * 6
    shift = build(config.gap.metrics.mean_shift)
    assert float(shift(torch.ones(3, 4), torch.zeros(5, 4))) == 4.0
