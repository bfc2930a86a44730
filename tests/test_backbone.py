"""Embedder | body | predictor: shapes, weights and the errors of bad choices."""

from __future__ import annotations

import json
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from orca_rank.backbone import create_model, create_timm, hub, source_model
from orca_rank.measuring.matrices import adaptable_layers
from orca_rank.task import Normaliser, Task, relative_l2

TINY = {
    "name": "swin_tiny_patch4_window7_224",
    "pretrained": False,
    "options": {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (1, 1),
        "num_heads": (2, 4),
    },
}
VIT = {
    "name": "vit_small_patch16_224",
    "pretrained": False,
    "options": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
}
CLASSES = Task("classification", (1, 8, 8), (7,))
FIELD = Task("dense", (3, 20, 20), (2, 20, 20))


@pytest.mark.parametrize("backbone", [TINY, VIT], ids=["swin", "vit"])
@pytest.mark.parametrize("task", [CLASSES, FIELD], ids=["classes", "field"])
def test_output_has_the_shape_of_the_task(backbone: dict, task: Task) -> None:
    model = create_model(backbone, task)
    assert model(torch.randn(2, *task.input_shape)).shape == (2, *task.output_shape)


@pytest.mark.parametrize("backbone", [TINY, VIT], ids=["swin", "vit"])
def test_three_channels_and_pretrained_patches_give_timms_own_features(backbone: dict) -> None:
    torch.manual_seed(0)
    timms = create_timm(backbone).eval()
    torch.manual_seed(0)
    ours = source_model(backbone)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), timms.forward_features(x))


def test_patch_weights_are_tiled_over_the_channels() -> None:
    torch.manual_seed(0)
    pretrained = create_timm(TINY).patch_embed.proj.weight
    torch.manual_seed(0)
    five = create_model(TINY, Task("classification", (5, 32, 32), (2,))).embedder.proj.weight
    torch.testing.assert_close(five, pretrained[:, [0, 1, 2, 0, 1]])


def test_q_k_v_separate_or_fused() -> None:
    body = create_timm(TINY)
    fused = adaptable_layers(body, r"attn\.qkv$", "fused")
    separate = adaptable_layers(body, r"attn\.qkv$", "separate")
    assert [(layer.d_in, layer.d_out) for layer in fused] == [(16, 48), (32, 96)]
    assert [layer.name for layer in separate[:3]] == [f"layers.0.blocks.0.attn.qkv.{part}" for part in "qkv"]
    assert all(layer.d_in == layer.d_out for layer in separate)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_come_from_a_local_file(tmp_path: Path, suffix: str) -> None:
    saved = timm.create_model(TINY["name"], num_classes=10, **TINY["options"])
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(saved.state_dict(), path)
    else:
        torch.save({"state_dict": saved.state_dict()}, path)
    loaded = create_timm({**TINY, "pretrained": str(path)})
    name = "layers.1.blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(loaded.state_dict()[name], saved.state_dict()[name])


def test_bad_choices_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="close: swin_tiny_patch4_window7_224"):
        create_timm({**TINY, "name": "swin_tiny_patch4_window7_22"})
    with pytest.raises(ValueError, match=r"backbone\.options"):
        create_timm({**TINY, "options": {"no_such_option": 1}})
    with pytest.raises(ValueError, match="patch_embed"):
        create_timm({"name": "resnet18", "pretrained": False, "options": {}})
    with pytest.raises(FileNotFoundError, match=r"backbone\.pretrained"):
        create_timm({**TINY, "pretrained": str(tmp_path / "none.safetensors")})
    with pytest.raises(ConnectionError, match=r"backbone\.pretrained=false"):
        create_timm({"name": "swin_tiny_patch4_window7_224.ms_in1k", "pretrained": True, "options": {}})
    garbage = tmp_path / "garbage.pth"
    garbage.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="state dict"):
        create_timm({**TINY, "pretrained": str(garbage)})
    other = tmp_path / "other.safetensors"
    save_file({"layers.0.blocks.0.attn.qkv.weight": torch.zeros(3, 3)}, other)
    with pytest.raises(ValueError, match="lacks"):
        create_timm({**TINY, "pretrained": str(other)})
    body = create_timm(TINY)
    with pytest.raises(ValueError, match="matches none"):
        adaptable_layers(body, "no_such_layer")
    with pytest.raises(ValueError, match="regular expression"):
        adaptable_layers(body, "(")
    with pytest.raises(ValueError, match="fused"):
        adaptable_layers(body, "qkv", "apart")
    with pytest.raises(ValueError, match="random"):
        create_model(TINY, CLASSES, "zeros")
    with pytest.raises(ValueError, match="channels"):
        create_model(TINY, CLASSES)(torch.randn(1, 3, 8, 8))


def test_task_losses_and_metrics() -> None:
    with pytest.raises(ValueError, match="output_shape"):
        Task("dense", (1, 8, 8), (10,))
    with pytest.raises(ValueError, match="kind"):
        Task("painting", (1, 8, 8), (10,))
    u = torch.rand(4, 2, 20, 20) + 1
    torch.testing.assert_close(relative_l2(1.5 * u, u), torch.full((4,), 0.5))
    normaliser = Normaliser.fit(u)
    torch.testing.assert_close(normaliser.decode(normaliser.encode(u)), u)
    task = Task("dense", (3, 20, 20), (2, 20, 20), normaliser)
    torch.testing.assert_close(task.loss(normaliser.encode(2 * u), u), torch.tensor(1.0))
    scores = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    assert CLASSES.metric(scores, torch.tensor([0, 0])).tolist() == [0.0, 1.0]


def test_a_task_comes_back_from_its_file():
    task = Task("dense", (3, 8, 9), (1, 8, 9))
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task
    for values in ({}, {**task.to_dict(), "input_shape": [3, 8]}, {**task.to_dict(), "kind": "painting"}):
        with pytest.raises(ValueError, match="not the description of a task"):
            Task.from_dict(values)


def test_without_a_network_the_hub_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody at the address, somebody who takes the call and says nothing, a hub that is switched off; then one that
    answers, whatever it says."""
    tried = []
    monkeypatch.setattr(hub.timm, "create_model", lambda *_, **__: tried.append("hub") or nn.Identity())
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "SECONDS", 0.1)

    def get(port: int) -> None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        hub.from_hub("swin_tiny_patch4_window7_224", {})

    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        for _ in range(2):
            with pytest.raises(ConnectionError, match=r"does not answer: \w+\).*backbone.pretrained=<path"):
                get(mute.getsockname()[1])
            mute.listen()
    assert not tried
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "fetched before")
    get(1)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # which knows no method: 501
        Thread(target=server.handle_request).start()
        get(server.server_port)
    assert len(tried) == 2
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"HF_HUB_OFFLINE is set\).*backbone.pretrained=<path"):
        get(1)
