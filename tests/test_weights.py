"""The weights that come with the package are the ones that were measured."""

import json
from pathlib import Path

import pytest
import timm
import torch

from orca_rank import weights
from orca_rank.weights import record, shipped
from orca_rank.weights.file import load_weights


def test_the_shipped_file_gives_the_recorded_output():
    path, known = shipped("swin_micro"), record("swin_micro")
    assert path.stat().st_size <= 8_000_000
    network = timm.create_model(known["name"], num_classes=200, **known["options"]).eval()
    load_weights(network, path)
    x = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.inference_mode():
        logits = network(x)[0, :8]
    assert torch.allclose(logits, torch.tensor(known["output"]), atol=1e-3)


def test_unknown_weights_name_the_known_ones():
    with pytest.raises(KeyError, match="swin_micro"):
        shipped("swin_huge")


def test_a_changed_or_lost_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "some.json").write_text(json.dumps({"weights": {"file": "some.safetensors", "sha256": "0" * 64}}))
    monkeypatch.setattr(weights, "_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="install"):
        shipped("some")
    (tmp_path / "some.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="not the file that was shipped"):
        shipped("some")
