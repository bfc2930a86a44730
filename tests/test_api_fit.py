"""orca_rank.predict and .align: arrays in, arrays out."""

import numpy as np
import pytest
import torch
from shared import TINY_SWIN, apart
from torch import nn

import orca_rank as orca
from orca_rank.stages import finetune

DARCY = (*TINY_SWIN, "data=darcy_small", "data.grid=24", "data.stride=2", "data.train=8", "data.test=4",
         "data.workers=1", "embedder.aligned=false", "rank=uniform", "rank.r=1", "finetune.epochs=1",
         "trainer.enable_progress_bar=false")  # fmt: skip


def test_predictions_are_those_of_the_fine_tune_on_what_its_files_hold(composed, tmp_path):
    config = composed("stage=finetune", *DARCY, f"data.cache={tmp_path / 'cache'}")
    finetune.run(config)
    fitted = orca.load(tmp_path / "runs" / "default")
    data = finetune.build(config.data)
    x, _ = data.parts.test  # (4, 1, k, k), the coefficient alone
    with torch.no_grad():
        expected = fitted(data.parts.encode(x))
    found = orca.predict(tmp_path / "runs" / "default", x.numpy(), batch_size=3)
    assert isinstance(found, np.ndarray)
    assert apart(torch.from_numpy(found), expected) < 1e-5
    assert apart(torch.from_numpy(orca.predict(fitted, x[:, 0])), expected) < 1e-5
    for wrong, words in ((x[:0], "n >= 1"), (x[0, 0], "expected"), (x[:, :, :5], "other data than the model")):
        with pytest.raises(ValueError, match=words):
            orca.predict(fitted, wrong)


class Patches(nn.Module):
    """Images (B, 1, 4, 4) -> tokens (B, 4, d)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Conv2d(1, width, 2, 2)

    def forward(self, x):
        return self.proj(x).flatten(2).mT


def images(seed: int, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(48) % 2
    draws = torch.randn(48, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return 0.3 * draws + y[:, None, None, None] + shift, y


@pytest.mark.filterwarnings("ignore")  # Lightning's hints
@pytest.mark.parametrize(("objective", "schedule"), [("otdd", "orca"), ("sliced", "batch"), ("l2", "batch")])
def test_alignment_brings_the_target_to_the_source_and_leaves_the_rest(objective, schedule):
    embedder, source_embedder = Patches().eval(), Patches().requires_grad_(False)
    embedder.proj.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in source_embedder.state_dict().items()}
    near, far = images(0, 0.0), images(1, 3.0)
    found = orca.align(
        embedder,
        source_embedder,
        [near],
        [far],
        objective=objective,
        schedule=schedule,
        epochs=30,
        lr=0.05,
        resamples=2,
    )
    assert found.keys() == {"otdd", "mmd", "sliced"}
    assert found["otdd"]["after"]["value"] < 0.5 * found["otdd"]["before"]["value"]
    assert not embedder.training and source_embedder.training
    assert [p.requires_grad for p in embedder.parameters()] == [True, False]
    assert all(torch.equal(value, before[name]) for name, value in source_embedder.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "kl"}, "no objective 'kl'; there are otdd, mmd"),
        ({"epochs": 0}, r"align\.epochs=0"),
        ({"target": images(1, 1.0)[0]}, 'the target has no labels: schedule="batch"'),
        ({"target": images(1, 1.0)[0], "schedule": "batch"}, "needs labels on both sides"),
        ({"target": []}, "the target loader gave no images"),
        ({"source": [{"pixel_values": images(0, 0.0)[0]}]}, "hold named tensors"),
        ({"embedder": Patches(5)}, "width 5, the source's 6"),
    ],
)
def test_what_cannot_be_aligned_says_so(options, words):
    given = {
        "embedder": Patches(),
        "source_embedder": Patches(),
        "source": [images(0, 0.0)],
        "target": [images(1, 3.0)],
    }
    with pytest.raises(ValueError, match=words):
        orca.align(**{**given, **options})
