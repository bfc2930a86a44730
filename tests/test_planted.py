"""data=planted: a teacher that differs from the body by known ranks in known layers, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from shared import TINY_SWIN, apart

from orca_rank.artifacts.provenance import plain
from orca_rank.backbone import create_model, create_timm
from orca_rank.build import build
from orca_rank.data.planted import Planted, plant
from orca_rank.predictors.multiscale import multiscale

PATTERN = r"^layers\.1\.blocks\.0\.mlp\.fc1$"


@pytest.fixture
def config(composed: Callable[..., DictConfig], tmp_path: Path) -> DictConfig:
    """A planted task on the tiny Swin, whose weights are a file."""
    options = ("data.rank=2", "data.train=40", "data.test=8", "data.k=16")
    made = composed("data=planted", *TINY_SWIN, f"data.pattern='{PATTERN}'", *options)
    torch.manual_seed(0)
    save_file(create_timm(plain(made.backbone)).state_dict(), tmp_path / "weights.safetensors")
    made.backbone.pretrained = str(tmp_path / "weights.safetensors")
    return made


def test_the_update_has_its_rank_and_norm_in_its_layers_alone(config: DictConfig) -> None:
    task = build(config.data).outline
    models = [create_model(plain(config.backbone), task, "pretrained", multiscale) for _ in range(2)]
    plant(models[1], PATTERN, 2, 0.5, seed=3)
    before, after = (model.body.state_dict() for model in models)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["layers.1.blocks.0.mlp.fc1.weight"]
    update = after[changed[0]] - before[changed[0]]
    s = torch.linalg.svdvals(update)
    assert float(s[2] / s[0]) < 1e-5 < float(s[1] / s[0])
    assert float(update.norm() / before[changed[0]].norm()) == pytest.approx(0.5, rel=1e-5)


def test_answers_are_the_teachers_and_repeat(config: DictConfig) -> None:
    data = build(config.data)
    x, y = data.parts.train
    assert x.shape == (36, 3, 16, 16) and y.shape == (36, 1, 16, 16) and len(data.parts.val[0]) == 4
    assert float(y.mean(0).abs().max()) < 1e-4 and float(y.std()) == pytest.approx(1, rel=1e-4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model(plain(config.backbone), data.task, "pretrained", multiscale).eval()
    plant(model, PATTERN, 2, 3.0, seed=0)
    with torch.no_grad():
        raw = model(data.parts.encode(x))
    raw = raw - raw.mean(0)
    assert apart(y, raw / raw.std()) < 1e-4
    again = build({**plain(config.data), "seed": 5})  # a run's seed changes neither fields nor teacher
    assert torch.equal(again.parts.test[1], data.parts.test[1])
    other = build({**plain(config.data), "data_seed": 1})
    assert apart(other.parts.test[1], data.parts.test[1]) > 0.1


def test_a_body_that_no_two_seeds_share_is_refused(config: DictConfig) -> None:
    with pytest.raises(ValueError, match=r"backbone\.pretrained=False: expected shipped"):
        Planted(backbone={**plain(config.backbone), "pretrained": False}, pattern=PATTERN)
    with pytest.raises(ValueError, match="matches none"):
        build({**plain(config.data), "pattern": "nothing"}).parts  # noqa: B018 (the property loads)
