"""Series and hyperspectral patches: what a file means, the fold and its way back, and from a file to a prediction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from shared import TINY_SWIN, apart

import orca_rank as orca
from orca_rank import load
from orca_rank.data.arrays import Arrays
from orca_rank.predictors.series import fold, layers_of, unfold
from orca_rank.stages import finetune, predict

N = 24
RANDOM = np.random.default_rng(0)
T = np.linspace(0, 1, 96)
PHASE = RANDOM.random((N, 1))
X = np.stack([np.sin(2 * np.pi * (3 * T + PHASE)), np.cos(2 * np.pi * (3 * T + PHASE))], 1).astype(np.float32)
FIELD = 1e3 + 10 * X[:, 0] * X[:, 1]  # (N, L)


# ---------------------------------------------------------------- the fold


@pytest.mark.parametrize("layers", [1, 3])
def test_a_series_as_long_as_the_picture_comes_back_to_the_bit(layers: int) -> None:
    x = torch.randn(2, 5, 1, layers * 8 * 12)
    picture = fold(x, (8, 12), (2, 4), layers)
    assert picture.shape == (2, 5 * layers, 8, 12) and layers_of(x.shape[-1], (8, 12)) == layers
    assert torch.equal(unfold(picture, (2, 4), layers, x.shape[-1]), x)


def test_a_token_stands_for_one_stretch_and_tokens_follow_each_other() -> None:
    x = torch.arange(8 * 12.0).reshape(1, 1, 1, -1)
    patches = fold(x, (8, 12), (2, 4), 1)[0, 0].unfold(0, 4, 4).unfold(1, 3, 3)  # (2, 4, 4, 3)
    assert torch.equal(patches.reshape(8, 12), x.reshape(8, 12))
    stacked = fold(torch.arange(2 * 8 * 12.0).reshape(1, 1, 1, -1), (8, 12), (2, 4), 2)
    assert stacked[0, :, 0, 0].tolist() == [0, 1] and stacked[0, :, 0, 1].tolist() == [2, 3]


@pytest.mark.parametrize("length", [50, 96, 200, 1000])
def test_a_smooth_series_of_any_length_comes_back(length: int) -> None:
    x = torch.sin(torch.linspace(0, 9, length)).reshape(1, 1, 1, -1)
    layers = layers_of(length, (8, 12))
    assert apart(unfold(fold(x, (8, 12), (2, 4), layers), (2, 4), layers, length), x) < 0.02


# ---------------------------------------------------------------- what a file means


def read(folder: Path, x: np.ndarray, y: np.ndarray, **options: object) -> Arrays:
    np.savez(folder / "data.npz", x=x, y=y)
    return Arrays(root=folder, train="data.npz", **options)


def test_series_say_that_they_are_or_are_asked(tmp_path: Path) -> None:
    y = np.arange(N) % 2
    assert read(tmp_path, X[:, 0], y).task.input_shape == (1, 1, 96)
    for x, options in ((X, {}), (X.transpose(0, 2, 1), {"channels": "last"})):
        assert read(tmp_path, x, y, series=True, **options).task.input_shape == (2, 1, 96)
        with pytest.raises(ValueError, match=r"data\.series=true or data\.series=false"):
            _ = read(tmp_path, x, y, **options).task
    assert read(tmp_path, X, y, series=False).task.input_shape == (1, 2, 96)
    assert read(tmp_path, X[:, :, :4], y, series=True).task.input_shape == (2, 1, 4)
    with pytest.raises(ValueError, match=r"data\.channels=first or data\.channels=last"):
        _ = read(tmp_path, X.transpose(0, 2, 1), y, series=True).task
    with pytest.raises(ValueError, match=r"data\.series=true expected"):
        _ = read(tmp_path, X[:, None], y, series=True).task


@pytest.mark.parametrize(
    ("y", "kind", "shape"),
    [
        (FIELD, "dense", (1, 1, 96)),
        (FIELD[:, ::2][:, None], "dense", (1, 1, 48)),
        (np.stack([FIELD, FIELD], 2), "dense", (2, 1, 96)),
        (X[:, :, 0], "regression", (2,)),
        (np.digitize(X[:, 0], [-0.5, 0.5]), "segmentation", (3, 1, 96)),
        (X[:, 0] > 0, None, None),
    ],
)
def test_targets_of_series(tmp_path: Path, y: np.ndarray, kind: str | None, shape: tuple[int, ...] | None) -> None:
    if kind is None:  # as many labels as there are steps, or a class a step
        with pytest.raises(ValueError, match=r"data\.task=segmentation .*data\.task=multilabel"):
            _ = read(tmp_path, X, y, series=True).task
    else:
        data = read(tmp_path, X, y, series=True)
        assert (data.task.kind, data.task.output_shape) == (kind, shape)


# ---------------------------------------------------------------- from a file to a prediction


def predicted(
    composed: Callable[..., DictConfig], folder: Path, x: np.ndarray, y: np.ndarray, *options: str
) -> dict[str, np.ndarray]:
    """A fine-tune on a file, and its predictions for another of the first five samples."""
    np.savez(folder / "mine.npz", x=x, y=y)
    np.savez(folder / "new.npz", x=x[:5], y=y[:5])
    config = [
        "data=arrays", "data.train=mine.npz", f"paths.data={folder}", *TINY_SWIN, "rank.r=1", "embedder.aligned=false",
        "finetune.epochs=1", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu", *options,
    ]  # fmt: skip
    finetune.run(composed(*config))
    predict.run(composed(*config, "data.train=new.npz"))
    run = Path(composed(*config).paths.runs) / "default"
    (path,) = (run / "predict").glob("*.npz")
    with np.load(path) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    fitted = load(run)
    channels_first = torch.from_numpy(x[:5] if "data.series=true" not in options else x[:5, :, None])
    with torch.inference_mode():
        assert (
            apart(fitted.predict(channels_first).reshape(-1), torch.from_numpy(found["prediction"]).reshape(-1)) < 1e-4
        )
    answer = orca.predict(run, x[:5])  # in the shape of the files, as the stage's
    assert answer.shape == found["prediction"].shape
    assert apart(torch.from_numpy(answer), torch.from_numpy(found["prediction"])) < 1e-4
    if fitted.task.series:
        with pytest.raises(ValueError, match=r"expected \(n, C, L\), or \(n, L\) of one channel"):
            orca.predict(fitted, x[:5, :, None])
    return found


def test_from_series_to_fields_on_them(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    found = predicted(composed, tmp_path, X, FIELD, "data.series=true")
    assert found["prediction"].shape == (5, 1, 96) and abs(found["prediction"].mean() - 1e3) < 10
    error = np.linalg.norm(found["prediction"][:, 0] - FIELD[:5], axis=1) / np.linalg.norm(FIELD[:5], axis=1)
    np.testing.assert_allclose(found["metric"], error, rtol=1e-3)


def test_from_series_to_a_class_a_step(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    y = np.digitize(X[:, 0], [-0.5, 0.5])
    found = predicted(composed, tmp_path, X, y, "data.series=true", "predictor=orca")
    assert found["prediction"].shape == (5, 3, 96) and found["label"].shape == (5, 96)
    np.testing.assert_allclose(found["metric"], (found["label"] != y[:5]).mean(1), rtol=1e-6)


def test_from_hyperspectral_patches_to_classes(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    x = RANDOM.random((N, 100, 9, 9)).astype(np.float32)
    y = np.arange(N) % 3 + 1
    x[y == 2, 30:40] += 1
    found = predicted(composed, tmp_path, x, y, "data.channels=first")
    assert found["prediction"].shape == (5, 3) and set(found["label"]) <= {1, 2, 3}
    assert np.array_equal(found["metric"], found["label"] != y[:5])
