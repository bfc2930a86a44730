"""Pictures of predictions: what is drawn is what was given."""

from __future__ import annotations

import numpy as np
import pytest

from orca_rank.report.canvas import png
from orca_rank.report.figures import Gallery
from orca_rank.report.prediction_figures import caption, class_colours, prediction_figure, samples

RANDOM = np.random.default_rng(0)


def gallery(kind: str, side: tuple[int, int], targets: np.ndarray, predictions: np.ndarray) -> Gallery:
    metric = [0.25] * len(targets)
    return Gallery(RANDOM.random((len(targets), *side)), targets, predictions, metric, "input", kind)


def test_vectors_lie_against_their_targets() -> None:
    y = RANDOM.random((30, 3))
    y[0, 0] = np.nan
    shown = gallery("regression", (8, 8), y, np.stack([y[:, 0], 0 * y[:, 1] + y[:, 1].mean(), 0.5 * y[:, 2]], 1))
    figure = prediction_figure(shown)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[:2] == ["R² 1.000", "R² 0.000"] and len(titles) == 3
    assert len(figure.axes[0].lines[1].get_xdata()) == 29
    assert "30 test samples, predicted by mine" in caption(shown, "mine")
    wide = gallery("regression", (8, 8), RANDOM.random((5, 20)), RANDOM.random((5, 20)))
    assert len(prediction_figure(wide).axes) == 8


def test_labels_are_counted_the_most_frequent_first() -> None:
    y = np.array([[True, True, False], [False, True, False], [False, True, True], [False, False, True]])
    guess = np.where([[True, True, False], [True, True, False], [False, False, False], [False, False, False]], 0.9, 0.1)
    figure = prediction_figure(gallery("multilabel", (8, 8), y, guess))
    left, right = figure.axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["1", "2", "0"]
    assert [bar.get_width() for bar in left.patches] == [3, 2, 1, 2, 0, 2]
    assert [bar.get_width() for bar in right.patches] == pytest.approx([0.8, 0.0, 2 / 3])


def test_classes_have_their_colours_and_wrong_pixels_are_seen() -> None:
    y = np.array([[[0, 1], [-1, 2]]])
    guess = np.array([[[0, 0], [1, 2]]])
    shown = gallery("segmentation", (4, 4), y, guess)
    _, target, prediction, wrong = (image.get_array() for image in prediction_figure(shown).axes[0].images)
    assert np.allclose(target[0, 0], prediction[0, 0]) and not np.allclose(target[0, 1], prediction[0, 1])
    assert np.allclose(wrong[0, 0][:3], 1) and np.allclose(wrong[1, 0], wrong[1, 0][:1], atol=1)
    assert len({tuple(colour) for colour in class_colours(20)}) == 21
    assert "pixel errors: 0.25" in caption(shown, "mine")


@pytest.mark.parametrize("kind", ["dense", "segmentation"])
def test_series_are_lines(kind: str) -> None:
    y = RANDOM.integers(0, 3, (2, 1, 50)).astype(float)
    figure = prediction_figure(gallery(kind, (1, 50), y, y[:, :, ::-1]))
    assert len(figure.axes) == 4
    assert np.array_equal(figure.axes[1].lines[0].get_ydata(), y[0, 0])
    assert np.array_equal(figure.axes[1].lines[1].get_ydata(), y[0, 0, ::-1])
    assert png(figure, dpi=40)


def test_how_many_samples_a_figure_takes() -> None:
    assert samples("dense") == samples("segmentation") == 4 < samples("regression")
