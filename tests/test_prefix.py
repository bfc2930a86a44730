"""What frozen first stages give is computed once a sample, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from shared import TINY_FINETUNE, apart
from tiny_families import SLOW, TINY, backbone
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from orca_rank.adapters import inject
from orca_rank.backbone import OrcaModel, create_model
from orca_rank.backbone.families import feature_info
from orca_rank.measuring.matrices import adaptable_layers
from orca_rank.predictors.multiscale import multiscale
from orca_rank.ranks import RankPlan
from orca_rank.stages import finetune
from orca_rank.stages.trainable import make_trainable
from orca_rank.task import Task
from orca_rank.training.prefix import FrozenPrefix, before_chance, frozen_stages

TARGET = r"(attn\.(qkv|proj)|mlp\.fc[12]|conv|linear)"
FIELD = Task("dense", (2, 32, 32), (1, 32, 32))
families = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TINY]
)


def adapted(family: str, stages: int = 1) -> OrcaModel:
    """A model whose last stages have adapters, everything before them frozen, and that draws nothing at random."""
    torch.manual_seed(0)
    model = create_model(backbone(family), FIELD, "pretrained", multiscale)
    names = [str(stage["module"]) for stage in feature_info(model.body)]
    last = tuple(f"{name}." for name in names[len(names) - stages :])
    ranks = {layer.name: 2 for layer in adaptable_layers(model.body, TARGET) if layer.name.startswith(last)}
    for module in model.modules():
        for name in {"p", "drop_prob"} & vars(module).keys():
            setattr(module, name, 0.0)
    model.requires_grad_(False)
    inject(model.body, RankPlan(ranks))
    model.predictor.requires_grad_(True)
    return model.train()


def loader(x: Tensor) -> Callable[[], DataLoader]:
    return lambda: DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=4)


def calls(model: OrcaModel) -> list[str]:
    """Grows by the name of every leaf module of the body that computes."""
    found: list[str] = []
    for name, module in model.body.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: found.append(name))
    return found


@families
def test_the_model_is_the_same_function(family: str) -> None:
    model, x = adapted(family), torch.randn(9, 2, 32, 32)
    names = frozen_stages(model)
    assert names == [str(stage["module"]) for stage in feature_info(model.body)[:-1]]
    shuffled = torch.randperm(9)[:5]
    expected = model(x[shuffled])
    wanted = torch.autograd.grad(expected.square().sum(), [p for p in model.parameters() if p.requires_grad])
    prefix = FrozenPrefix([loader(x[:6]), loader(x[6:])], 1.0)
    prefix.fill(model, names)
    assert bool(prefix.kept) == (family != "mvit")  # whose stages give their grid beside the tokens
    assert model.training
    computed = calls(model)
    found = model(x[shuffled])
    gradients = torch.autograd.grad(found.square().sum(), [p for p in model.parameters() if p.requires_grad])
    assert apart(found, expected) < 1e-5
    assert apart(torch.cat([g.flatten() for g in gradients]), torch.cat([g.flatten() for g in wanted])) < 1e-4
    before = tuple(f"{name}." for name in names)
    assert computed and any(name.startswith(before) for name in computed) == (not prefix.kept)


def test_what_was_not_seen_is_computed() -> None:
    model, x = adapted("swin"), torch.randn(8, 2, 32, 32)
    other = torch.cat([x[:2], torch.randn(2, 2, 32, 32)])
    expected = model(other)
    own = [name for name, module in model.named_modules() if "forward" in vars(module)]
    prefix = FrozenPrefix([loader(x)], 1.0)
    prefix.fill(model, frozen_stages(model))
    computed = calls(model)
    assert apart(model(other), expected) < 1e-6 and any(name.startswith("layers.0.") for name in computed)
    prefix.close()
    computed.clear()
    assert apart(model(x), model(x)) == 0 and any(name.startswith("layers.0.") for name in computed)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == own
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_one_bit_makes_another_sample() -> None:
    prefix, x = FrozenPrefix([], 1.0), torch.zeros(1, 3, 16, 16)
    changed = x.repeat(3 * 16 * 16 * 32, 1, 1, 1)
    bits = changed.view(torch.int32).flatten(1)
    for i in range(len(bits)):
        bits[i, i // 32] ^= torch.tensor(1, dtype=torch.int32) << (i % 32)
    assert len({*prefix._keys(changed), *prefix._keys(x)}) == len(bits) + 1


def test_what_would_be_too_much_is_not_kept() -> None:
    model, said = adapted("swin"), []
    prefix = FrozenPrefix([loader(torch.randn(8, 2, 32, 32))], 1e-9, said.append)
    prefix.fill(model, frozen_stages(model))
    assert not prefix.kept and not prefix.undo
    assert len(said) == 1 and "more than finetune.cache=1e-09" in said[0]


@pytest.mark.parametrize("what", ["embedder", "norm", "full"])
def test_stages_before_which_something_trains_are_not_frozen(what: str) -> None:
    model = adapted("swin")
    if what == "embedder":
        model.embedder.requires_grad_(True)
    else:
        make_trainable(model, what, None, None, embedder=False, predictor=True)
    assert frozen_stages(model) == []


def test_stages_that_draw_are_not_kept_and_what_would_help_is_said(
    composed: Callable[..., DictConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted("swin", stages=0)
    assert before_chance(model, frozen_stages(model)) == ["layers.0", "layers.1"]
    model.body.get_submodule("layers.1").add_module("drop", nn.Dropout(0.1))
    assert before_chance(model, frozen_stages(model)) == ["layers.0"]
    model.embedder.add_module("drop", nn.Dropout(0.1))
    assert before_chance(model, frozen_stages(model)) == []
    options = [option for option in OPTIONS if "drop_path" not in option]
    finetune.run(composed(*options, "+backbone.options.proj_drop_rate=0.1"))
    assert "+backbone.options.drop_path_rate=0" in " ".join(capsys.readouterr().out.split())


def test_a_probe_of_a_frozen_model_keeps_all_stages() -> None:
    model = adapted("swin")
    make_trainable(model, "probe", None, None, embedder=False, predictor=True)
    assert len(frozen_stages(model)) == len(feature_info(model.body))


OPTIONS = (
    *TINY_FINETUNE,
    "+backbone.options.drop_path_rate=0",
    "predictor=multiscale",
    "embedder.init=pretrained",
    "embedder.train=false",
    "layers.target='^layers.1.*(qkv|fc1)$'",
    "rank.r=2",
    "finetune.tag=mine",
    "finetune.epochs=3",
)


def outcome(config: DictConfig) -> tuple[Tensor, dict[str, float]]:
    folder = Path(config.paths.runs) / config.run / "finetune" / "mine"
    state = load_file(folder / "model.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state)]), json.loads(
        (folder / "metrics.json").read_text()
    )


def test_a_fine_tune_is_the_same_with_it(
    composed: Callable[..., DictConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, kept = composed(*OPTIONS, "run=plain", "finetune.cache=0"), composed(*OPTIONS, "run=kept")
    finetune.run(plain)
    assert "frozen" not in capsys.readouterr().out
    finetune.run(kept)
    assert "1 of 2 stages are frozen: computed once" in capsys.readouterr().out
    (expected, wanted), (found, metrics) = outcome(plain), outcome(kept)
    assert apart(found, expected) < 1e-5
    assert metrics["test/error"] == pytest.approx(wanted["test/error"], rel=1e-5)
