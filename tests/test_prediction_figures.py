"""Pictures of predictions: what is drawn is what was given."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from pictures import marks, says, texts
from PIL import Image

from orca_rank.report.prediction_figures import (
    Gallery,
    caption,
    class_colours,
    fields_image,
    prediction_figure,
    prediction_rows,
    samples,
)

RANDOM = np.random.default_rng(0)


def gallery(kind: str, side: tuple[int, int], targets: np.ndarray, predictions: np.ndarray) -> Gallery:
    metric = [0.25] * len(targets)
    return Gallery(RANDOM.random((len(targets), *side)), targets, predictions, metric, "input", kind)


def fields(shown: Gallery) -> list[np.ndarray]:
    """The images of the figure, as pixels."""
    links = [mark.get("href") for mark in marks(prediction_figure(shown))]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2])))) for link in links if link]


def test_targets_and_predictions_share_a_scale_and_differences_another() -> None:
    y = np.stack([np.eye(4), 0.5 * np.eye(4)])
    shown = gallery("dense", (8, 8), y, y + np.array([1.0, 0.0])[:, None, None])
    shown = shown._replace(inputs=np.where(shown.inputs > 0.5, 12.0, 3.0))
    images = fields(shown)  # column by column
    assert len(images) == 8
    assert np.array_equal(images[2][0, 0], images[4][0, 1])  # 1 in the first target is 1 in the first prediction
    assert np.array_equal(images[3][0, 0], images[5][0, 0]) and not np.array_equal(images[3][0, 0], images[2][0, 0])
    assert np.array_equal(images[6], np.broadcast_to(images[6][0, 0], images[6].shape))  # 1 too much everywhere
    assert np.array_equal(images[7], np.full_like(images[7], 247))  # on that scale: nothing
    found = texts(prediction_figure(shown))
    assert found[:4] == ["input", "target", "prediction", "prediction − target"]
    assert {"3", "12", "-1", "1", "relative L2 0.250"} <= set(found)  # a name for each of two values of the input
    assert "sample 1, target: 0 to 1; relative L2 0.250" in says(prediction_figure(shown))
    rows = prediction_rows(shown)
    assert len(rows) == 32
    assert rows[0] == {"sample": 0, "row": 0, "column": 0, "target": "1", "prediction": "2"}


def test_large_fields_are_thinned() -> None:
    y = RANDOM.random((2, 250, 250))
    shown = gallery("dense", (250, 250), y, y)
    assert {image.shape[:2] for image in fields(shown)} == {(125, 125)}
    assert len(prediction_rows(shown)) == 250 * 250


def test_vectors_lie_against_their_targets() -> None:
    y = RANDOM.random((30, 3))
    y[0, 0] = np.nan
    shown = gallery("regression", (8, 8), y, np.stack([y[:, 0], 0 * y[:, 1] + y[:, 1].mean(), 0.5 * y[:, 2]], 1))
    picture = prediction_figure(shown)
    titles = [text for text in texts(picture) if text.startswith("R²")]
    assert titles[:2] == ["R² 1.000", "R² 0.000"] and len(titles) == 3
    assert sum(mark.get("class") == "dot pale c0" for mark in marks(picture)) == 29 + 30 + 30
    assert "30 test samples, predicted by mine" in caption(shown, "mine")
    wide = gallery("regression", (8, 8), RANDOM.random((5, 20)), RANDOM.random((5, 20)))
    assert sum(text.startswith("R²") for text in texts(prediction_figure(wide))) == 8


def test_labels_are_counted_the_most_frequent_first() -> None:
    y = np.array([[True, True, False], [False, True, False], [False, True, True], [False, False, True]])
    guess = np.where([[True, True, False], [True, True, False], [False, False, False], [False, False, False]], 0.9, 0.1)
    picture = prediction_figure(gallery("multilabel", (8, 8), y, guess))
    assert [text for text in texts(picture) if text in "012"] == ["1", "2", "0"]
    assert list(says(picture)) == [
        "3 have label 1", "2 are given label 1", "F₁ of 1: 0.800",
        "2 have label 2", "0 are given label 2", "F₁ of 2: 0.000",
        "1 have label 0", "2 are given label 0", "F₁ of 0: 0.667",
    ]  # fmt: skip


def test_classes_have_their_colours_and_wrong_pixels_are_seen() -> None:
    y = np.array([[[0, 1], [-1, 2]]])
    guess = np.array([[[0, 0], [1, 2]]])
    shown = gallery("segmentation", (4, 4), y, guess)
    _, target, prediction, wrong = fields(shown)
    assert np.array_equal(target[0, 0], prediction[0, 0]) and not np.array_equal(target[0, 1], prediction[0, 1])
    assert np.array_equal(wrong[0, 0], wrong[1, 1]) and len({tuple(one) for one in wrong.reshape(-1, 3)}) == 3
    assert len({tuple(colour) for colour in class_colours(20)}) == 21
    assert "pixel errors: 0.25" in caption(shown, "mine") and "pixel error 0.250" in texts(prediction_figure(shown))


@pytest.mark.parametrize("kind", ["dense", "segmentation"])
def test_series_are_lines(kind: str) -> None:
    y = RANDOM.integers(0, 3, (2, 1, 50)).astype(float)
    picture = prediction_figure(gallery(kind, (1, 50), y, y[:, :, ::-1]))
    lines = [mark.get("points", "").split() for mark in marks(picture) if mark.tag.endswith("polyline")][
        2:
    ]  # the legend
    assert [len(line) for line in lines] == [50, *([50, 50] if kind == "dense" else [100, 100])] * 2
    heights = [[float(point.partition(",")[2]) for point in line] for line in lines]
    assert heights[1] == heights[2][::-1]


def test_how_many_samples_a_figure_takes() -> None:
    assert samples("dense") == samples("segmentation") == 4 < samples("regression")


def test_the_fields_are_a_picture_of_pixels_too():
    y = np.zeros((2, 5, 5))
    y[1, 0, 0] = 1.0
    gallery = Gallery(np.zeros((2, 3, 3)), y, y.copy(), [0.0, 0.0], "coefficient")
    image = np.asarray(Image.open(io.BytesIO(fields_image(gallery))))
    assert image.shape == (10, 20, 3)  # two samples; input, target, prediction, difference
    assert (image[:, 5:10] == image[:, 10:15]).all()
    assert (image[5, 5] != image[0, 5]).any() and (image[:, 15:] == image[0, 15]).all()
