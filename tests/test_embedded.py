"""Source features without images: what is stored, that the stages take it for the images, and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from shared import TINY_SWIN

from orca_rank.backbone import source_model
from orca_rank.build import build
from orca_rank.data import photos
from orca_rank.data.digits import Digits
from orca_rank.data.embedded import STEP, Embedded, write_embedded
from orca_rank.stages import align, measure
from orca_rank.stages.setup import resolve_backbone

TINY = (
    *TINY_SWIN,
    "data=digits",
    "data.channels=3",
    "data.invert=true",
    "data.train_limit=256",
    "gap.samples=128",
    "gap.bootstrap=0",
    "gap.permutations=9",
    "align.epochs=2",
    "align.held_out.resamples=2",
    "trainer.enable_progress_bar=false",
)


@pytest.fixture
def stored(composed, tmp_path):
    """A file of tokens of digits, with the random embedder that TINY and seed 0 give."""
    torch.manual_seed(0)
    embedder = source_model(resolve_backbone(composed(*TINY))).embedder
    path = tmp_path / "source.npz"
    write_embedded(path, embedder, Digits().parts, tokens=200, means=500)
    return path, embedder


def test_tokens_come_back_to_within_half_a_step(stored):
    path, embedder = stored
    data = Embedded(file=str(path), batch_size=50)
    data.check(embedder)
    digits = Digits().parts
    images = {tuple(mean.tolist()): None for mean in embedder(digits.encode(digits.train[0])).flatten(1, -2).mean(1)}
    exact = torch.tensor(list(images))  # token means of all digits
    seen = 0
    for tokens, _ in data.train_dataloader():
        assert tokens.shape[1:] == (4, 4, 8)
        means = tokens.flatten(1, -2).mean(1)
        assert torch.cdist(means, exact).amin(1).max() < STEP / 2 * 8**0.5
        seen += len(tokens)
    assert seen == 200
    means, labels = data.means(10_000)
    assert means.shape == (500, 8)
    assert torch.cdist(means, exact).amin(1).max() < 1e-2
    share = np.bincount(labels) / np.bincount(digits.train[1]) * len(digits.train[1]) / 500
    assert np.abs(share - 1).max() < 0.05
    assert data.task.output_shape == (10,)
    assert data.task.input_shape == (3, 8, 8)


def test_the_stages_take_tokens_for_images(composed, stored, tmp_path):
    path, _ = stored
    gaps, distances = {}, {}
    for name, source in (("images", ["source=digits"]), ("tokens", ["source=embedded", f"source.file={path}"])):
        config = composed(*TINY, *source, f"run={name}", "embedder.aligned=false")
        with_nothing_beside = OmegaConf.merge(config, {})
        with_nothing_beside.measure.compare = {}
        align.run(config)
        measure.run(with_nothing_beside)
        folder = tmp_path / "runs" / name
        layers = json.loads((folder / "measure" / "layers.json").read_text())["layers"]
        gaps[name] = np.array([layer["gap"]["mmd"]["value"] for layer in layers])
        distances[name] = json.loads((folder / "align" / "metrics.json").read_text())["distances"]["otdd"]["before"]
    assert np.allclose(gaps["tokens"], gaps["images"], rtol=0.25)  # another sample of the same digits
    assert gaps["images"].min() > 0.3
    assert distances["tokens"]["value"] == pytest.approx(distances["images"]["value"], rel=0.25)


def test_tokens_of_another_backbone_are_refused(composed, stored, tmp_path):
    path, _ = stored
    tokens = ("source=embedded", f"source.file={path}", "data=digits", "measure.compare={}")
    for stage in (align, measure):
        for backbone in (("backbone=swin_micro",), (*TINY, "backbone.options.img_size=32")):
            with pytest.raises(ValueError, match=r"another backbone.*source=digits"):
                stage.run(composed(*backbone, *tokens))
    align.run(composed(*TINY, *tokens, "seed=1"))  # from scratch: tokens of the same shape will do
    with pytest.raises(ValueError, match=r"without images.*source=digits"):
        resolve_backbone(composed("backbone=swin_demo"))
    with pytest.raises(FileNotFoundError, match=r"source\.file"):
        Embedded(file=str(tmp_path / "none.npz"))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"does not hold source tokens.*tokens"):
        Embedded(file=str(tmp_path / "other.npz"))
    (tmp_path / "torn.npz").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="does not hold source tokens"):
        Embedded(file=str(tmp_path / "torn.npz"))


def test_the_shipped_tokens_belong_to_the_shipped_weights(composed):
    config = composed("source=embedded", "backbone=swin_micro")
    data = build(config.source)
    data.check(source_model(resolve_backbone(config)).embedder)
    assert data.path.stat().st_size <= 1_000_000
    tokens = torch.cat([x for x, _ in data.train_dataloader()])
    assert tokens.shape == (256, 16, 16, 32)
    means, labels = data.means(2000)
    assert labels.bincount(minlength=200).tolist() == [10] * 200
    assert torch.allclose(tokens.mean((0, 1, 2)), means.mean(0), atol=0.1)  # two samples of one population


def test_crops_for_testing_come_from_the_right_of_the_photographs(monkeypatch):
    image = np.zeros((427, 640, 3), np.uint8)
    image[:, 480:] = 255
    image[:, :, 2] = 51
    monkeypatch.setattr(photos, "load_sample_images", lambda: SimpleNamespace(images=[image, image]))
    parts = photos.Photos(size=16, train=20, val=6, test=10).parts
    for (x, y), value, count in ((parts.train, 0.0, 20), (parts.val, 0.0, 6), (parts.test, 1.0, 10)):
        assert x.shape == (count, 3, 16, 16)
        assert torch.allclose(x[:, :2], torch.full((), value), atol=1e-6)
        assert torch.allclose(x[:, 2], torch.full((), 0.2), atol=1e-6)
        assert y.bincount().tolist() == [count // 2, count // 2]


def test_photos_are_drawn_from_the_seed_and_refuse_bad_options():
    one, same, other = (photos.Photos(size=8, train=4, val=2, test=2, seed=seed).parts.train[0] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    for options in ({"smallest": 161}, {"size": 0}, {"train": 1}):
        with pytest.raises(ValueError, match="photos need"):
            photos.Photos(**options)
