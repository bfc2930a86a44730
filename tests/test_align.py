"""stage=align on a tiny Swin and a few digits: every objective, both schedules, resuming, and what it stops with."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from shared import TINY_SWIN
from sklearn.cluster import KMeans
from torch import Tensor

from orca_rank.data.stored import NpyRows, Stored
from orca_rank.measuring.classes import Labeller
from orca_rank.stages import align
from orca_rank.training import align as training

TINY = (
    "stage=align",
    "data=digits",
    "data.train_limit=60",
    "source=digits",
    "source.train_limit=60",
    *TINY_SWIN,
    "align.epochs=3",
    "align.decay.every=2",
    "align.held_out.resamples=2",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
)
Compose = Callable[..., DictConfig]


def folder(config: DictConfig) -> Path:
    return Path(config.paths.runs) / config.run / "align"


def curve(config: DictConfig) -> list[dict[str, str]]:
    with open(folder(config) / "curve.csv") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("schedule", ["orca", "batch"])
@pytest.mark.parametrize("objective", ["otdd", "mmd", "sliced", "bures", "l2"])
def test_training_lowers_every_objective(composed: Compose, objective: str, schedule: str) -> None:
    config = composed(*TINY, f"align={objective}", f"align.schedule={schedule}")
    align.run(config)
    rows = curve(config)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert list(rows[0]) == ["epoch", "loss", "lr"]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-2, 1e-2, 2e-3])
    metrics = json.loads((folder(config) / "metrics.json").read_text())
    assert metrics["objective"] == objective
    assert set(metrics["distances"]) == {"otdd", "mmd", "sliced"}
    assert metrics["distances"]["sliced"]["after"]["value"] < metrics["distances"]["sliced"]["before"]["value"]
    assert not (folder(config) / "last.ckpt").exists()


def test_none_keeps_the_initial_embedder(composed: Compose) -> None:
    config = composed(*TINY, "align=none")
    align.run(config)
    metrics = json.loads((folder(config) / "metrics.json").read_text())
    assert metrics["epochs"] == 0
    assert metrics["distances"]["otdd"]["before"] == metrics["distances"]["otdd"]["after"]
    assert set(load_file(folder(config) / "embedder.safetensors")) == {
        "proj.weight", "proj.bias", "norm.weight", "norm.bias"
    }  # fmt: skip


@pytest.mark.parametrize("schedule", ["orca", pytest.param("batch", marks=pytest.mark.slow)])
def test_a_resumed_run_ends_the_same(
    composed: Compose, schedule: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*TINY, f"align.schedule={schedule}", "align.batch_size=20", "align.samples_per_class=3",
               "align.random_tokens.start=0.3", "align.random_tokens.pool=4")  # fmt: skip
    whole = composed(*options, "run=whole")
    align.run(whole)

    broken = composed(*options, "run=broken")
    step = training.Align.training_step
    seen = [0]

    def failing(self: training.Align, batch: Any, index: int) -> Tensor:
        seen[0] += self.current_epoch == 2
        if seen[0] == 2:
            raise RuntimeError("power cut")
        return step(self, batch, index)

    monkeypatch.setattr(training.Align, "training_step", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        align.run(broken)
    monkeypatch.setattr(training.Align, "training_step", step)
    with pytest.raises(ValueError, match="unfinished run with other options"):
        align.run(composed(*options, "run=broken", "align.optimizer.lr=1.0e-3"))
    align.run(broken)
    assert "going on from" in capsys.readouterr().out
    assert curve(broken) == curve(whole)
    states = [load_file(folder(config) / "embedder.safetensors") for config in (whole, broken)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    align.run(broken)
    assert "align is done" in capsys.readouterr().out


def test_a_finished_stage_with_other_options_is_an_error_unless_forced(composed: Compose) -> None:
    align.run(composed(*TINY, "align=none"))
    other = composed(*TINY, "align=l2")
    with pytest.raises(ValueError, match="other options"):
        align.run(other)
    other.force = True
    align.run(other)
    assert json.loads((folder(other) / "metrics.json").read_text())["objective"] == "l2"


def test_a_plateau_stops_early(composed: Compose) -> None:
    config = composed(*TINY, "align=l2", "align.epochs=30", "align.patience=1", "align.min_delta=1000")
    align.run(config)
    assert len(curve(config)) == 2


@pytest.mark.parametrize("where", ["features", "objective"])
def test_a_loss_that_is_not_finite_saves_its_batch(
    composed: Compose, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*TINY, "align=l2", "align.schedule=batch", "align.batch_size=20")
    if where == "features":
        monkeypatch.setattr(training, "token_mean", lambda tokens: tokens.flatten(1, -2).mean(1) * float("nan"))
    else:
        monkeypatch.setattr("orca_rank.distances.objectives.L2.__call__", lambda self, x, y: x.sum() * float("inf"))
    with pytest.raises(FloatingPointError, match=r"bad_batch\.safetensors"):
        align.run(config)
    batch = load_file(folder(config) / "bad_batch.safetensors")
    assert batch["x"].shape[0] == batch["label"].shape[0] == batch["features"].shape[0] == 20
    assert not (folder(config) / "metrics.json").exists()


@pytest.mark.parametrize(
    ("option", "message"), [("align.schedule=sgd", "orca or batch"), ("align.random_tokens.start=2", r"\[0, 1\]"),
                            ("align.clusters=0", "clusters")]
)  # fmt: skip
def test_bad_options_are_named(composed: Compose, option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align.run(composed(*TINY, option))


def test_orca_batches_hold_one_class_each_and_weigh_to_one() -> None:
    labels = torch.tensor([4, 4, 4, 4, 4, 9, 9, 2])
    batches = list(training.class_batches(labels, 3, torch.Generator().manual_seed(0)))
    assert sorted(len(batch) for batch in batches) == [1, 2, 3]
    assert all(len(set(labels[batch].tolist())) == 1 for batch in batches)
    orders = {tuple(labels[b[0]].item() for b in training.class_batches(labels, 3, torch.Generator().manual_seed(s)))
              for s in range(8)}  # fmt: skip
    assert len(orders) > 1


def test_the_share_of_random_tokens_falls_to_nothing() -> None:
    shares = [training.RandomTokens(0.8, 0.5, pool=1).fraction(epoch, 8) for epoch in range(8)]
    assert shares == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0])


def test_dense_targets_get_cluster_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    fields = torch.randn(30, 1, 4, 4, generator=generator) * 0.1 + torch.arange(30).view(-1, 1, 1, 1) % 3 * 5
    labels = Labeller(fields, 3, 0)(fields)
    assert all(len(labels[k::3].unique()) == 1 for k in range(3))
    assert len(labels.unique()) == 3
    few = Labeller(fields[:2], 10, 0)(fields[:2])
    assert few.shape == (2,)


def test_a_sample_of_large_fields_is_clustered_and_all_get_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory and on disk, in whatever order, the same; k-means sees no more than it is allowed to."""
    fields = torch.randn(600, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.1
    fields += torch.arange(600).view(-1, 1, 1, 1) % 3 * 5
    np.save(tmp_path / "y.npy", fields.numpy())
    rows = NpyRows(tmp_path / "y.npy", fields.shape, np.dtype(np.float32), os.path.getsize(tmp_path / "y.npy") - 38400)
    stored = Stored(rows, lambda part, _: torch.from_numpy(part), fields.shape, torch.float32)
    order = np.random.default_rng(0).permutation(600)
    monkeypatch.setattr("orca_rank.measuring.classes.SAMPLE", 8 * 16 * 50)
    monkeypatch.setattr("orca_rank.normaliser._CHUNK", 16 * 70)
    seen: list[int] = []
    fit = KMeans.fit
    monkeypatch.setattr(KMeans, "fit", lambda self, x: (seen.append(len(x)), fit(self, x))[1])
    labels = Labeller(fields, 3, 0)(fields)
    assert all(len(labels[k::3].unique()) == 1 for k in range(3)) and len(labels.unique()) == 3
    assert torch.equal(Labeller(stored, 3, 0)(stored), labels)
    some = stored.only(order)
    labels = Labeller(some, 3, 0)(some)
    assert all(len(labels[torch.from_numpy(order % 3 == k)].unique()) == 1 for k in range(3))
    assert seen == [50, 50, 50]


@pytest.mark.parametrize("minibatch", [False, True])
def test_clusters_of_fields_depend_on_no_unit_and_miss_no_value(
    minibatch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orca_rank.measuring.classes.MINI_BATCH", 10 if minibatch else 1000)
    generator = torch.Generator().manual_seed(1)
    fields = torch.randn(60, 2, 4, 4, generator=generator, dtype=torch.float64)
    fields[1::3, 0] += 4  # the first channel tells one class of three, the second another
    fields[2::3, 1] += 4
    labels = Labeller(fields, 3, 0)(fields)
    assert all(len(labels[k::3].unique()) == 1 for k in range(3)) and len(labels.unique()) == 3
    units = torch.tensor([1e-3, 1e5], dtype=torch.float64)[:, None, None]
    for other in (1e-13 * fields, 1e9 * fields, fields + 1e6, -273.15 + 1e-3 * fields, units * fields, 1e200 * fields):
        assert torch.equal(Labeller(other, 3, 0)(other), labels)
    single = (1e-13 * fields).float()
    assert torch.equal(Labeller(single, 3, 0)(single), labels)
    fields[::7, :, 0, 0] = torch.nan
    labels = Labeller(fields, 3, 0)(fields)
    assert all(len(labels[k::3].unique()) == 1 for k in range(3)) and len(labels.unique()) == 3


def test_source_features_are_cached(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed(*TINY)
    first = align.source_features(config, torch.device("cpu"))
    assert first.features.shape == (len(first.labels), 8)
    monkeypatch.setattr(align, "embed", lambda *args: pytest.fail("computed again"))
    again = align.source_features(config, torch.device("cpu"))
    assert torch.equal(first.features, again.features)
    config.align.source_samples = 20
    with pytest.raises(pytest.fail.Exception):
        align.source_features(config, torch.device("cpu"))
