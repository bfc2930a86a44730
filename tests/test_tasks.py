"""Vectors, labels and segmentations: what files mean, losses and metrics in closed form, splits, predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from shared import TINY_SWIN

from orca_rank import load, scoring
from orca_rank.data.arrays import Arrays
from orca_rank.data.targets import Targets
from orca_rank.measuring.classes import Labeller, class_shares
from orca_rank.normaliser import Normaliser
from orca_rank.stages import finetune, predict
from orca_rank.task import KINDS, Task

N = 40
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((N, 1, 16, 16)).astype(np.float32)
CLASS = np.arange(N) % 4
LABELS = RANDOM.random((N, 3)) < 0.4
MASKS = (X[:, 0] > 0.5).astype(np.int64) + (X[:, 0] > 1.2)
VECTORS = np.stack([1e6 + 1e3 * X.mean((1, 2, 3)), X.std((1, 2, 3))], 1)
FIELDS = (2 + X).astype(np.float64)


def read(folder: Path, y: np.ndarray, x: np.ndarray = X, **options: object) -> Arrays:
    np.savez(folder / "data.npz", x=x, y=y)
    return Arrays(root=folder, train="data.npz", **options)


# ---------------------------------------------------------------- what targets mean


@pytest.mark.parametrize(
    ("y", "kind", "shape"),
    [
        (CLASS, "classification", (4,)),
        (CLASS + 0.5, "regression", (1,)),
        (VECTORS, "regression", (2,)),
        (np.eye(4)[CLASS], "classification", (4,)),
        (LABELS, "multilabel", (3,)),
        (LABELS.astype(np.float32), "multilabel", (3,)),
        (MASKS, "segmentation", (3, 16, 16)),
        (MASKS[:, None].astype(np.uint8), "segmentation", (3, 16, 16)),
        (MASKS[..., None] > 0, "segmentation", (2, 16, 16)),
        (np.array([0, 255])[MASKS.clip(max=1)], "segmentation", (2, 16, 16)),
        (FIELDS, "dense", (1, 16, 16)),
        (np.concatenate([FIELDS, FIELDS], 1), "dense", (2, 16, 16)),
    ],
)
def test_targets_say_what_they_are(tmp_path: Path, y: np.ndarray, kind: str, shape: tuple[int, ...]) -> None:
    data = read(tmp_path, y)
    assert (data.task.kind, data.task.output_shape) == (kind, shape)
    given = read(tmp_path, y)
    given.given_kind = kind
    given.given_classes = data.task.classes or (tuple(range(shape[0])) if "classes" in KINDS[kind].output else None)
    assert torch.equal(given.everything()[1], data.everything()[1]) and len(data.everything()[1]) == N


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (3 * np.eye(4, dtype=np.int64)[CLASS], r"set data.task=regression for numbers"),
        (MASKS.astype(np.float32), "data.task=segmentation for .*data.task=dense for"),
        (np.arange(N * 256).reshape(N, 16, 16), "data.task=segmentation for .*data.task=dense for"),
        (np.repeat(MASKS[:, None], 2, 1), "data.task=dense"),
        (np.zeros((N, 2, 2, 2, 2)), r"expected integer labels.*\(classification\)"),
    ],
)
def test_targets_that_do_not_say_what_they_are_are_asked_about(tmp_path: Path, y: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ = read(tmp_path, y).task


def test_what_is_asked_for_must_fit(tmp_path: Path) -> None:
    assert read(tmp_path, CLASS, task="regression").task.output_shape == (1,)
    assert read(tmp_path, MASKS.astype(np.float32), task="segmentation").task.output_shape == (3, 16, 16)
    assert read(tmp_path, MASKS, task="dense").task.output_shape == (1, 16, 16)
    assert read(tmp_path, np.eye(4)[CLASS], task="multilabel").task.output_shape == (4,)
    for y, task in ((VECTORS, "multilabel"), (CLASS, "dense"), (FIELDS, "segmentation"), (LABELS, "dense")):
        with pytest.raises(ValueError, match=f"with data.task={task} expected"):
            _ = read(tmp_path, y, task=task).task
    with pytest.raises(ValueError, match="task must be one of"):
        read(tmp_path, CLASS, task="detection")


def test_what_cannot_be_learned_is_refused_and_what_lacks_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the same in every training sample"):
        read(tmp_path, np.full((N, 2), 0.5)).setup()
    with pytest.raises(ValueError, match="number 3"):
        read(tmp_path, np.where(np.arange(N)[:, None] == 3, np.nan, VECTORS)).setup()
    rare = LABELS.copy()
    rare[:, 1] = False
    rare[0] = (True, False, True)
    assert "1 of 3 labels occur in no sample of train: 1" in read(tmp_path, rare).notes


def test_unlabelled_pixels_are_told_by_their_value(tmp_path: Path) -> None:
    y = MASKS.copy()
    y[:, :2] = 255
    data = read(tmp_path, y, fill=255)
    assert data.task.output_shape == (3, 16, 16) and data.task.classes is None
    assert (data.parts.train[1][:, :2] == scoring.UNLABELLED).all() and data.parts.train[1][:, 2:].min() == 0
    assert read(tmp_path, y).task.classes == (0, 1, 2, 255)
    y[3] = y[5] = 255  # an error of 0 there would be none that was measured
    with pytest.raises(ValueError, match=r"2 sample\(s\) without a labelled pixel, the first is number 3"):
        read(tmp_path, y, fill=255).setup()


def test_numbers_that_never_vary_are_said_not_to_count(tmp_path: Path) -> None:
    y = np.random.default_rng(0).standard_normal((len(X), 3))
    y[:, 1], y[:, 2] = 4.0, np.nan
    notes = read(tmp_path, y, fill=float("nan")).notes
    assert "2 numbers of the targets never vary in training, or are missing: 1, 2; not counted" in notes


# ---------------------------------------------------------------- splits


def test_every_part_holds_the_rarest_label_class_and_tenth() -> None:
    labels = np.zeros((60, 3), np.bool_)
    labels[:, 0], labels[10:16, 2] = True, True
    assert np.flatnonzero(Targets("multilabel", torch.from_numpy(labels)).strata() == 2).tolist() == [*range(10, 16)]
    masks = torch.zeros(60, 4, 4, dtype=torch.int16)
    masks[20:23, 0, 0] = 1
    assert np.flatnonzero(Targets("segmentation", masks, (0, 1)).strata() == 1).tolist() == [20, 21, 22]
    line = torch.randn(100, 1, dtype=torch.float64) * torch.tensor([[1.0, -1.0]]) + torch.tensor([1e6, 0.0])
    strata = Targets("regression", line).strata()
    assert np.bincount(strata).tolist() == [10] * 10
    order = strata[line[:, 0].argsort()]
    assert (np.diff(order) >= 0).all() or (np.diff(order) <= 0).all()


# ---------------------------------------------------------------- losses and metrics


def test_a_vectors_error_is_the_share_of_variance_in_every_unit() -> None:
    y = torch.randn(4000, 2, dtype=torch.float64)
    for offset, unit in ((0.0, 1.0), (1e6, 1e-3), (-3.0, 1e9)):
        targets = offset + unit * y
        task = Task("regression", (1, 8, 8), (2,), Normaliser.fit(targets, "channel"))
        mean, half = torch.zeros(4000, 2), 0.5 * task.normaliser.encode(targets)
        assert float(task.loss(mean, targets)) == pytest.approx(1.0, rel=1e-4)
        assert float(task.metric(half, targets).mean()) == pytest.approx(0.25, rel=1e-4)
        mae = task.further(mean, targets)["mae_1"].mean()
        assert float(mae) == pytest.approx(float((targets - targets.mean(0)).abs().mean(0)[1]), rel=1e-3)
        decoded = task.decode(task.normaliser.encode(targets))
        assert float((decoded - targets).abs().max()) < 1e-5 * unit
    missing = targets.clone()
    missing[:, 0] = torch.nan
    torch.testing.assert_close(task.metric(half, missing), ((half - 2 * half) ** 2)[:, 1])


def test_label_errors_by_hand() -> None:
    task = Task("multilabel", (1, 8, 8), (4,))
    scores = torch.tensor([[1.0, 1.0, -1.0, -1.0], [-1.0] * 4, [1.0] * 4])
    y = torch.tensor([[True, False, True, False], [False] * 4, [False] * 4])
    assert task.metric(scores, y).tolist() == [0.5, 0.0, 1.0]
    assert task.further(scores, y)["f1_error"].tolist() == [0.5, 0.0, 1.0]
    torch.testing.assert_close(task.loss(torch.zeros(3, 4), y), torch.tensor(2.0).log())
    assert task.decode(scores).equal(scores.sigmoid()) and task.chosen(task.decode(scores)).equal(scores > 0)
    assert task.metric(scores * torch.nan, y).isnan().all()


def test_pixel_errors_by_hand() -> None:
    task = Task("segmentation", (1, 2, 2), (3, 2, 2))
    y = torch.tensor([[[0, 0], [1, -1]], [[2, 2], [2, 2]]])
    guess = torch.tensor([[[0, 1], [1, 2]], [[2, 2], [2, 2]]])
    scores = 50.0 * torch.nn.functional.one_hot(guess, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(task.metric(scores, y), torch.tensor([1 / 3, 0.0]))
    torch.testing.assert_close(task.further(scores, y)["iou_error"], torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(task.loss(torch.zeros(2, 3, 2, 2), y), torch.tensor(3.0).log())
    assert task.losses(scores, y).tolist() == pytest.approx([50 / 3, 0.0], abs=1e-5)
    assert task.metric(scores * torch.nan, y).isnan().all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "classification"])
def test_targets_of_another_task_are_refused(kind: str) -> None:
    shapes = {1: (3,), 3: (3, 4, 4)}
    batches = {
        "classification": torch.tensor([0, 2]),
        "multilabel": torch.zeros(2, 3, dtype=torch.bool),
        "regression": torch.zeros(2, 3),
        "dense": torch.zeros(2, 3, 4, 4),
        "segmentation": torch.zeros(2, 4, 4, dtype=torch.int16),
    }
    task = Task(kind, (1, 4, 4), shapes[len(KINDS[kind].output)])
    for other, y in batches.items():
        if other == kind:
            task.check_targets(y)
        else:
            with pytest.raises(ValueError, match=r"fine-tuned for|the model gives"):
                task.check_targets(y)
    with pytest.raises(ValueError, match="knows 0 to 2"):
        Task("segmentation", (1, 4, 4), (3, 4, 4)).check_targets(batches["segmentation"] + 3)


def test_targets_without_classes_are_clustered() -> None:
    near, far = torch.zeros(6, 8, 8, dtype=torch.int16), torch.ones(6, 8, 8, dtype=torch.int16)
    for y in (
        torch.cat([near, far]),
        torch.tensor([[True, False, True]] * 6 + [[False, True, True]] * 6),
        torch.tensor([[1e6, 0.0]] * 6 + [[1e6 + 1, 0.0]] * 6),
    ):
        labels = Labeller(y, 2, 0)(y).tolist()
        assert len(set(labels[:6])) == len(set(labels[6:])) == 1 and labels[0] != labels[-1]
    shares = class_shares(torch.tensor([[[0, 1], [1, -1]]]).repeat_interleave(4, 1).repeat_interleave(4, 2), 2)
    assert shares.shape == (1, 2 * 64) and shares.sum() == 48


# ---------------------------------------------------------------- from a file to a prediction


@pytest.mark.parametrize(
    ("kind", "y", "predictor"),
    [
        ("regression", VECTORS, "linear"),
        ("multilabel", LABELS, "orca"),
        ("segmentation", np.array([5, 7, 9])[MASKS], "multiscale"),
    ],
)
def test_from_a_file_through_finetune_to_predict(
    composed: Callable[..., DictConfig], tmp_path: Path, kind: str, y: np.ndarray, predictor: str
) -> None:
    np.savez(tmp_path / "mine.npz", x=X, y=y)
    np.savez(tmp_path / "new.npz", x=X[:5], y=y[:5])
    config = [
        "data=arrays", "data.train=mine.npz", f"paths.data={tmp_path}", *TINY_SWIN, f"predictor={predictor}",
        "rank.r=1", "embedder.aligned=false", "finetune.epochs=1", "finetune.optimizer.lr=0.01",
        "trainer.enable_progress_bar=false", "trainer.accelerator=cpu",
    ]  # fmt: skip
    finetune.run(composed(*config))
    run = Path(composed(*config).paths.runs) / "default"
    fitted = load(run)
    metrics = fitted.metrics
    assert metrics["metric"] == KINDS[kind].metric and fitted.task.kind == kind
    assert {f"test/{name}" for name in fitted.task.further(*stand_in(fitted.task))} <= set(metrics)
    predict.run(composed(*config, "data.train=new.npz"))
    (path,) = (run / "predict").glob("*.npz")
    found = np.load(path)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record[metrics["metric"]] == pytest.approx(found["metric"].mean(), rel=1e-5)
    if kind == "regression":
        assert found["prediction"].shape == (5, 2) and "label" not in found
        scale = fitted.task.normaliser.std.numpy()
        expected = (((found["prediction"] - y[:5]) / scale) ** 2).mean(1)
        np.testing.assert_allclose(found["metric"], expected, rtol=1e-3)
        assert abs(found["prediction"][:, 0].mean() - 1e6) < 1e4
    elif kind == "multilabel":
        assert found["label"].dtype == bool and ((found["prediction"] > 0.5) == found["label"]).all()
        np.testing.assert_allclose(found["metric"], (found["label"] != y[:5]).mean(1), rtol=1e-6)
    else:
        assert found["prediction"].shape == (5, 3, 16, 16) and set(np.unique(found["label"])) <= {5, 7, 9}
        np.testing.assert_allclose(found["metric"], (found["label"] != y[:5]).mean((1, 2)), rtol=1e-6)


def stand_in(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and targets of one sample of a task."""
    scores = torch.zeros(1, *task.output_shape)
    if task.kind == "segmentation":
        return scores, torch.zeros(1, *task.output_shape[1:], dtype=torch.int64)
    return scores, scores > 0 if task.kind == "multilabel" else scores.double()
