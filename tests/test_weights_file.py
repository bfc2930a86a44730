"""Weights files of other versions, sizes and makers than the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from orca_rank.weights.file import load_weights

SWIN = {"embed_dim": 8, "depths": (1, 1, 1), "num_heads": (1, 2, 4), "img_size": 32, "patch_size": 2}
VIT = {"embed_dim": 12, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}


def swin(window: int = 4, **options) -> torch.nn.Module:
    options = {**SWIN, "window_size": window, "num_classes": 0, "global_pool": "", **options}
    return timm.create_model("swin_tiny_patch4_window7_224", **options).eval()


def vit(**options) -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, "num_classes": 0, **options}).eval()


def loaded(tmp_path: Path, state, model: torch.nn.Module, name: str = "weights.pth") -> torch.nn.Module:
    torch.save(state, tmp_path / name)
    load_weights(model, tmp_path / name)
    return model


def same(a: torch.nn.Module, b: torch.nn.Module, channels: int = 3, size: int = 32) -> bool:
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return torch.allclose(a(x), b(x), atol=1e-5)


@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict", "module.", "_orig_mod.", "both"])
def test_wrappers_and_prefixes(tmp_path, wrap):
    saved = swin(num_classes=3)
    state = saved.state_dict()
    prefix = {"module.": "module.", "_orig_mod.": "_orig_mod.", "both": "_orig_mod.module."}.get(wrap, "")
    state = {prefix + name: value for name, value in state.items()}
    content = {wrap: state, "epoch": 3} if wrap in ("model", "state_dict") else state
    model = loaded(tmp_path, content, swin())
    assert same(model, swin_without_head(saved))


def swin_without_head(saved: torch.nn.Module) -> torch.nn.Module:
    bare = swin()
    bare.load_state_dict(saved.state_dict(), strict=False)
    return bare


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "net.encoder."])
@pytest.mark.parametrize("make", [swin, vit])
def test_a_model_that_is_part_of_what_was_saved(tmp_path, prefix, make):
    """As in the checkpoint of a LightningModule, with a head, a loss and a table of its own."""
    saved = make()
    state = {prefix + name: value for name, value in saved.state_dict().items()}
    state |= {"loss.weight": torch.ones(3), "head.fc.weight": torch.ones(2, 8), "norm.weight": torch.ones(5)}
    content = {"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.6.1", "callbacks": {"a": {"b": 1.0}}}
    assert same(loaded(tmp_path, content, make(), "last.ckpt"), saved)


def test_several_models_in_a_file_and_none_are_told(tmp_path):
    state = vit().state_dict()
    both = {f"{owner}.{name}": value for owner in ("student", "teacher") for name, value in state.items()}
    with pytest.raises(ValueError, match=r"holds 2 such models, student\., teacher\.: save one in a file"):
        loaded(tmp_path, both, vit())
    with pytest.raises(ValueError, match=r"lacks \d+ tensors of this model.*; it has \['a\.b', 'a\.c'\]"):
        loaded(tmp_path, {"a.b": torch.ones(1), "a.c": torch.ones(1)}, vit())
    with pytest.raises(ValueError, match=r"lacks \d+ tensors of this model, for example .*; it has \['conv1'\]"):
        loaded(tmp_path, {"conv1": torch.ones(1)}, vit())


@pytest.mark.parametrize("head", [True, False])
def test_swin_checkpoints_that_downsample_at_the_end_of_a_stage(tmp_path, head):
    saved = swin(num_classes=3)
    old = {}
    for name, value in saved.state_dict().items():
        for stage in (1, 2):
            name = name.replace(f"layers.{stage}.downsample", f"LAYERS.{stage - 1}.downsample")
        name = name.replace("LAYERS", "layers").replace("head.fc.", "head.")
        if head or not name.startswith("head"):
            old[name] = value
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(3, 3, dtype=torch.long)
    assert "layers.0.downsample.reduction.weight" in old
    assert same(loaded(tmp_path, {"model": old}, swin()), swin_without_head(saved))


def test_files_without_a_head_are_not_taken_for_old_ones(tmp_path):
    saved = swin()
    assert same(loaded(tmp_path, saved.state_dict(), swin()), saved)
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    model = swin()
    load_weights(model, tmp_path / "w.safetensors")
    assert same(model, saved)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:torch.searchsorted")  # in timm's own reading
def test_another_window_or_image_is_resampled_as_timm_does(tmp_path):
    saved = swin(window=4)
    model = loaded(tmp_path, saved.state_dict(), swin(window=8))
    reference = timm.create_model(
        "swin_tiny_patch4_window7_224",
        **{**SWIN, "window_size": 8, "num_classes": 0, "global_pool": ""},
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth"), "hf_hub_id": None, "url": "", "num_classes": 0},
    ).eval()
    assert same(model, reference)
    larger = loaded(tmp_path, saved.state_dict(), swin(img_size=64))  # Swin's weights know no image size
    own = dict(saved.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in larger.named_parameters())
    small, large = vit(), vit(img_size=64)
    loaded(tmp_path, small.state_dict(), large)
    grid = small.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (8, 8), mode="bicubic", antialias=True)
    found = large.pos_embed[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert torch.equal(large.blocks[1].mlp.fc1.weight, small.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize("make", [swin, vit])
def test_input_channels(tmp_path, make):
    grey, colour = make(in_chans=1), make(in_chans=3)
    x = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(loaded(tmp_path, grey.state_dict(), make())(x.expand(-1, 3, -1, -1)), grey(x), atol=1e-5)
        summed = loaded(tmp_path, colour.state_dict(), make(in_chans=1))
        assert torch.allclose(summed(x), colour(x.expand(-1, 3, -1, -1)), atol=1e-5)


def test_weights_that_cannot_be_meant(tmp_path):
    state = vit().state_dict()
    for value in (torch.nan, torch.inf):
        broken = {**state, "blocks.1.norm1.weight": torch.full((12,), value)}
        with pytest.raises(ValueError, match=r"NaN or infinite.*blocks\.1\.norm1\.weight"):
            loaded(tmp_path, broken, vit())
    with pytest.raises(ValueError, match=r"no place, for example \['blocks\.1.*deeper"):
        loaded(tmp_path, state, vit(depth=1))
    whole = {name: (100 * value).to(torch.int8) for name, value in state.items()}
    with pytest.raises(ValueError, match=r"whole numbers where weights are meant.*quantised"):
        loaded(tmp_path, whole, vit())
    with pytest.raises(ValueError, match="lacks"):
        loaded(tmp_path, state, vit(depth=3))
    with pytest.raises(ValueError, match="does not fit"):
        loaded(tmp_path, {**state, "blocks.0.mlp.fc1.weight": torch.zeros(5, 12)}, vit())
    for content in ([1, 2], {"a": 1}, {"model": {"a": "text"}}):
        with pytest.raises(ValueError, match="state dict"):
            loaded(tmp_path, content, vit())
    (tmp_path / "w.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"cannot read .*w\.safetensors.*backbone\.pretrained"):
        load_weights(vit(), tmp_path / "w.safetensors")
