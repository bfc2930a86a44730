"""Every supported family of timm: its maps are timm's own, every shape of target goes through, every adapter learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from shared import apart
from tiny_families import REFUSED, SLOW, TINY, backbone
from torch import nn

from orca_rank.adapters import adapters, inject, probe
from orca_rank.backbone import create_model, create_timm, source_model
from orca_rank.backbone.families import FAMILIES, feature_info
from orca_rank.measuring.activations import collect, module_of
from orca_rank.measuring.matrices import adaptable_layers
from orca_rank.predictors.multiscale import multiscale
from orca_rank.predictors.orca import orca
from orca_rank.stages import align, finetune, measure, plan, predict
from orca_rank.task import Task

TARGET = r"(attn\.(qkv|proj)|mlp\.fc[12])$"
families = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TINY]
)
# Of 1, 2, 5 and 13 channels; square, not square, series; smaller and larger than the body's own size.
TASKS = {
    "classes": (Task("classification", (1, 8, 8), (3,)), orca),
    "field": (Task("dense", (2, 70, 24), (1, 70, 24)), multiscale),
    "segmentation": (Task("segmentation", (13, 12, 20), (3, 12, 20)), orca),
    "labels": (Task("multilabel", (5, 40, 40), (4,)), multiscale),
    "series": (Task("dense", (3, 1, 50), (2, 1, 50)), multiscale),
}


def perturbed(model: nn.Module) -> nn.Module:
    """Some models start with norms or scales at zero, where no branch shows."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@families
def test_maps_are_those_that_timm_gives(family: str) -> None:
    """Of every stage at its places, and of the whole: the embedder and the body together are the timm model."""
    torch.manual_seed(0)
    timms = perturbed(create_timm(backbone(family)))
    torch.manual_seed(0)
    ours = source_model(backbone(family))
    ours.body.load_state_dict(timms.state_dict(), strict=False)
    stem = timms.get_submodule(FAMILIES[type(timms).__name__].stem)
    copied = {name.removeprefix("stem."): value for name, value in ours.embedder.state_dict().items()}
    assert copied.keys() <= stem.state_dict().keys()
    ours.embedder.load_state_dict({name: stem.state_dict()[name.removeprefix("stem.")]
                                   for name in ours.embedder.state_dict()})  # fmt: skip
    x = torch.randn(2, 3, *ours.embedder.image_size)
    count = len(feature_info(ours.body))
    with torch.no_grad():
        maps = ours.maps(ours.embedder(x), range(count))
        expected = timms.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)[-count:]
        # Hiera's own output lies unit by unit; its head is a norm of every token.
        whole = timms.head(expected[-1].flatten(2).mT) if family == "hiera" else timms(x)
    for found, wanted in zip(maps[:-1], expected, strict=False):
        assert apart(found.permute(0, 3, 1, 2), wanted) < 1e-5
    tokens = maps[-1].flatten(1, 2)  # (B, h w, d)
    if whole.ndim == 4:
        whole = (whole if whole.shape[-1] == tokens.shape[-1] else whole.permute(0, 2, 3, 1)).flatten(1, 2)
    assert apart(tokens, whole[:, whole.shape[1] - tokens.shape[1] :]) < 1e-5


@families
@pytest.mark.parametrize("task", TASKS)
def test_every_target_goes_through_and_every_adapter_learns(family: str, task: str) -> None:
    asked, factory = TASKS[task]
    torch.manual_seed(0)
    model = create_model(backbone(family), asked, predictor=factory)
    perturbed(model)
    x = torch.randn(2, *asked.input_shape)
    layers = adaptable_layers(model.body, TARGET, "separate")
    modules = {name: model.body.get_submodule(name) for name in {module_of(la.name, model.body) for la in layers}}
    inputs, _ = collect(lambda x: model.body(model.embedder(x)), modules, [(x, torch.zeros(2))], 2)
    assert all(len(found.pooled) == 2 for found in inputs.values())
    inject(model.body, {layer.name: 1 for layer in layers})
    probe(model.body, lambda: model(x))
    branches = adapters(model.body)
    with torch.no_grad():
        for branch in branches.values():
            branch.lora_B.normal_(0, 0.1)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    output = model(x)
    assert output.shape == (2, *asked.output_shape)
    output.square().mean().backward()
    dead = [name for name, branch in branches.items() if not branch.lora_A.grad.any() or not branch.lora_B.grad.any()]
    assert not dead
    assert all(p.grad is not None for p in model.embedder.parameters())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())  # batch statistics


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY)
def test_from_plan_to_predict(composed: Callable[..., DictConfig], tmp_path: Path, family: str) -> None:
    """Fields of two channels that are not square; aligned to digits, measured, planned, fine-tuned and predicted."""
    random = np.random.default_rng(0)
    x = random.standard_normal((50, 2, 12, 20)).astype(np.float32)
    np.savez(tmp_path / "mine.npz", x=x, y=x[:, :1] + 0.5 * x[:, 1:])
    name, options = TINY[family]
    config = composed(
        "data=arrays", "data.train=mine.npz", f"paths.data={tmp_path}", "source=digits", "source.train_limit=60",
        f"backbone.name={name}", "backbone.pretrained=false", "backbone.options=null",
        *(f"+backbone.options.{key}={list(value) if isinstance(value, tuple) else value}"
          for key, value in options.items()),
        "align.epochs=1", "align.source_samples=50", "rank=proportional", "budget.mean_rank=1", "finetune.epochs=1",
        "gap.samples=40", "data.batch_size=8", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu",
    )  # fmt: skip
    for stage in (plan, align, measure, finetune, predict):
        stage.run(config)
    (path,) = (Path(config.paths.runs) / "default" / "predict").glob("*.npz")
    assert np.load(path)["prediction"].shape[1:] == (1, 12, 20)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_work_says_so_before_any_work(composed: Callable[..., DictConfig], name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]) as refused:
        plan.check_options(composed(f"backbone.name={name}", "backbone.options=null"))
    assert "\n" not in str(refused.value)


def test_every_known_family_is_tried() -> None:
    assert {type(create_timm(backbone(family))).__name__ for family in TINY if family not in SLOW} == {*FAMILIES} - {
        "MultiScaleVit"
    }


def test_an_image_that_the_stages_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 32: backbone\.options\.img_size=\[50, 50\]"):
        create_timm({"name": "pvt_v2_b0", "pretrained": False, "options": {"img_size": 50}})
