"""From feature maps to classes and fields: shapes, what is read, what leaves a field unchanged, and ORCA's weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from orca_rank.adapters import inject
from orca_rank.backbone import OrcaModel, create_model
from orca_rank.build import build
from orca_rank.predictors import Stages
from orca_rank.predictors.linear import TokenMean
from orca_rank.predictors.multiscale import Pyramid, StageMeans, multiscale, spread, upsampled
from orca_rank.predictors.orca import DenseDecoder, orca
from orca_rank.ranks import RankPlan
from orca_rank.task import Task

SWIN = {"embed_dim": 8, "depths": (1, 1, 1), "num_heads": (1, 2, 2), "window_size": 4, "patch_size": 2, "img_size": 16}
SWIN_V2 = {**SWIN, "img_size": (16, 32)}
VIT = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 16, "depth": 6, "num_heads": 2}
BODIES = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swin, odd": ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": (18, 26), "window_size": 3}),
    "swinv2": ("swinv2_tiny_window8_256", SWIN_V2),
    "vit": ("vit_small_patch16_224", VIT),
    "vit, registers": ("vit_small_patch14_reg4_dinov2", VIT),
    "eva": ("eva02_tiny_patch14_224", VIT),
}
CLASSES, FIELD, TALL = (7,), (2, 16, 16), (1, 21, 10)
# What the shipped backbone offers at 64×64, and Swin-B at 224×224.
MICRO = Stages((32, 64, 128, 256), (4, 8, 16, 32), (64, 64))
SWIN_B = Stages((128, 256, 512, 1024), (4, 8, 16, 32), (224, 224))


def backbone(name: str) -> dict:
    timms, options = BODIES[name]
    return {"name": timms, "pretrained": False, "options": options}


def model_of(name: str, factory: Callable[..., nn.Module], output: tuple[int, ...]) -> OrcaModel:
    torch.manual_seed(0)
    kind = "classification" if len(output) == 1 else "dense"
    return create_model(backbone(name), Task(kind, (1, 16, 16), output), predictor=factory).eval()


def weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("output", [CLASSES, FIELD, TALL], ids=str)
@pytest.mark.parametrize("factory", [orca, multiscale])
@pytest.mark.parametrize("name", BODIES)
def test_every_body_meets_every_task(name: str, factory: Callable[..., nn.Module], output: tuple[int, ...]) -> None:
    model = model_of(name, factory, output)
    result = model(torch.randn(2, 1, 16, 16))
    assert result.shape == (2, *output)
    result.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.predictor.parameters())


def test_weights_by_hand() -> None:
    assert weights(orca(SWIN_B, (1, 85, 85))) == 3_148_800
    assert weights(orca(SWIN_B, (100,))) == weights(TokenMean(SWIN_B, (100,))) == 102_500
    assert weights(orca(MICRO, (1, 64, 64))) == 789_504
    laterals, convolutions = 480 * 48 + 4 * 48, 2 * (48 * 48 * 9 + 48)
    assert weights(multiscale(MICRO, (1, 64, 64))) == laterals + convolutions + 49 * 16 == 65_584
    assert weights(multiscale(MICRO, (100,))) == 481 * 100


def test_the_token_mean_is_for_classes() -> None:
    with pytest.raises(ValueError, match="predictor=multiscale"):
        TokenMean(MICRO, (1, 64, 64))
    last = torch.randn(3, 2, 2, 256)
    predictor = TokenMean(MICRO, (5,))
    torch.testing.assert_close(predictor([last]), predictor.fc(last.flatten(1, 2).mean(1)))


def test_which_depths_are_read() -> None:
    assert spread(MICRO) == (0, 1, 2, 3)
    assert spread(Stages((16,) * 12, (16,) * 12, (224, 224))) == (2, 5, 8, 11)
    assert spread(Stages((16,) * 3, (16,) * 3, (224, 224))) == (0, 1, 2)


@pytest.mark.parametrize("name", BODIES)
def test_maps_are_what_the_stages_give(name: str) -> None:
    """The last is what the body returns; those before it are what timm hands on from stage to stage."""
    model = model_of(name, multiscale, FIELD)
    x = torch.randn(2, 1, 16, 16)
    tokens = model.embedder(x)
    count = len(model.body.feature_info)
    maps = model.maps(tokens, range(count))
    last = model.body(tokens)
    h, w = maps[-1].shape[1:3]
    torch.testing.assert_close(maps[-1].flatten(1, 2), last.reshape(2, -1, last.shape[-1])[:, -h * w :])
    seen: list[Tensor] = []
    stages = [model.body.get_submodule(info["module"]) for info in model.body.feature_info]
    handles = [stage.register_forward_hook(lambda _, args, y: seen.append(y)) for stage in stages]
    model.body(tokens)
    for handle in handles:
        handle.remove()
    for found, expected in zip(maps[:-1], seen, strict=False):
        tail = expected.reshape(2, -1, expected.shape[-1])[:, -found.shape[1] * found.shape[2] :]
        assert torch.equal(found.flatten(1, 2), tail)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_predictor_of_the_last_stage_hooks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("swin", orca, FIELD)
    monkeypatch.setattr(nn.Module, "register_forward_hook", None)
    assert model(torch.randn(1, 1, 16, 16)).shape == (1, *FIELD)


def test_a_module_without_reads_receives_what_the_body_returns() -> None:
    model = model_of("vit", lambda stages, output: nn.Flatten(), CLASSES)
    x = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(model(x), model.body(model.embedder(x)).flatten(1))


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_adapters_of_every_stage_learn_through_it(name: str) -> None:
    """Lean blocks keep their own forward pass although stages are listened to."""
    model = model_of(name, multiscale, FIELD).train()
    targets = [n for n, m in model.body.named_modules() if isinstance(m, nn.Linear) and n.endswith("fc1")]
    inject(model.body, RankPlan(dict.fromkeys(targets, 2)))
    with torch.no_grad():
        for parameter_name, parameter in model.body.named_parameters():
            if parameter.requires_grad and "B" in parameter_name:
                parameter.normal_()
    x = torch.randn(2, 1, 16, 16)
    model(x).square().mean().backward()
    trained = {n: p for n, p in model.body.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


def constant_maps(stages: Stages, value: Tensor) -> list[Tensor]:
    sizes = [[-(-pixels // reduction) for pixels in stages.image] for reduction in stages.reductions]
    return [value[:width].expand(1, h, w, width) for width, (h, w) in zip(stages.widths, sizes, strict=True)]


@pytest.mark.parametrize("output", [(1, 64, 64), (1, 48, 50), (2, 64, 30)], ids=str)
def test_no_border_is_seen_where_nothing_changes(output: tuple[int, ...]) -> None:
    """Maps that are constant in space give a field that repeats from token to token up to the border: nothing is
    invented outside. (Zeros outside would change the border.)"""
    torch.manual_seed(0)
    pyramid = Pyramid(MICRO, output)
    pyramid.unfold.weight.data = pyramid.unfold.weight.data[:1].expand_as(pyramid.unfold.weight).clone()
    pyramid.unfold.bias.data.fill_(0.3)
    field = pyramid(constant_maps(MICRO, torch.randn(256)))
    spread_of = field.amax((2, 3)) - field.amin((2, 3))
    assert (spread_of <= 1e-5 * field.abs().amax((2, 3))).all()


@pytest.mark.parametrize("odd", [False, True])
def test_coarse_stages_lie_where_the_fine_ones_lie(odd: bool) -> None:
    """A ramp given at the cell centres of the coarsest stage is a ramp of the same slope in the finest."""
    fine = 15 if odd else 16
    coarse = torch.arange(8.0).add(0.5).mul(2).expand(1, 1, 8, 8)  # cell centres in units of the finer cells
    finer = torch.zeros(1, 1, fine, fine)
    expected = torch.arange(fine) + 0.5
    torch.testing.assert_close(upsampled(coarse, finer)[0, 0, 3, 1:14], expected[1:14])


def test_stage_means_are_normalised_means() -> None:
    predictor = StageMeans(MICRO, (5,))
    maps = [torch.randn(3, 2, 2, width) * 50 + 3 for width in MICRO.widths]
    means = torch.cat([torch.layer_norm(x, x.shape[-1:]).mean((1, 2)) for x in maps], 1)
    torch.testing.assert_close(predictor(maps), predictor.fc(means))


def test_the_dense_decoder_is_linear_in_its_tokens() -> None:
    """ORCA's decoder unfolds every token by itself: a change of one moves its own pixels alone."""
    decoder = DenseDecoder(MICRO, (1, 64, 64))
    x = torch.randn(1, 2, 2, 256)
    other = x.clone()
    other[0, 0, 1] += 1
    change = (decoder([other]) - decoder([x]))[0, 0]
    assert change[:32, 32:].abs().min() > 0
    assert change[32:].abs().max() == change[:, :32].abs().max() == 0


@pytest.mark.parametrize("option", ["orca", "multiscale"])
@pytest.mark.parametrize("output", [CLASSES, FIELD], ids=["classes", "field"])
def test_one_command_line_serves_both_kinds_of_task(
    composed: Callable[..., DictConfig], option: str, output: tuple[int, ...]
) -> None:
    factory = build(composed(f"predictor={option}").predictor.module)
    assert isinstance(factory(MICRO, output), nn.Module)


class Mine(nn.Module):
    """A predictor of a user's own."""

    reads = (0, -1)

    def __init__(self, stages: Stages, output_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.fc = nn.Linear(stages.widths[0] + stages.widths[-1], output_shape[0])

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.fc(torch.cat([x.amax((1, 2)) for x in maps], 1))


def test_a_predictor_of_ones_own_is_one_target(composed: Callable[..., DictConfig]) -> None:
    config = composed("predictor=orca", "predictor.module._target_=test_predictors.Mine")
    model = model_of("swin", build(config.predictor.module), CLASSES)
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, *CLASSES)
