"""Figures from plain data: what is drawn is what was given, and what is missing is left out."""

from __future__ import annotations

import io
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from orca_rank.measuring.records import Gap, Layer, Spectrum
from orca_rank.report.canvas import png, words
from orca_rank.report.figures import (
    Point,
    alignment_figure,
    comparison_figure,
    gallery_figure,
    learning_curves,
    parts_figure,
)
from orca_rank.report.layer_figures import (
    agreement_figure,
    gap_figure,
    place_of,
    places,
    rank_figure,
    significant,
    spectra_figure,
)
from orca_rank.report.results import Interval


def swin(depths: tuple[int, ...]) -> list[str]:
    kinds = ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    return [f"layers.{s}.blocks.{b}.{kind}" for s, depth in enumerate(depths) for b in range(depth) for kind in kinds]


def records(names: list[str], p: float | None = 0.01) -> list[Layer]:
    """The gap of a layer is its block's place in the network, so q, k and v of a block agree."""
    return [Layer(name, 8, 8, {"mmd": Gap(i // 6, i // 6 - 1.0, None, p)}) for i, name in enumerate(names)]


def drawn(figure: Figure) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png(figure, dpi=50)))


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("layers.2.blocks.17.attn.qkv.k", "2.17", "k"),
        ("layers.0.blocks.1.mlp.fc1", "0.1", "fc1"),
        ("blocks.3.attn.proj", "3", "proj"),
        ("encoder.dense", "encoder", "dense"),
        ("head", "", "head"),
    ],
)
def test_a_layer_has_a_block_and_a_kind(name: str, block: str, kind: str) -> None:
    assert (place_of(name).block, place_of(name).kind) == (block, kind)


def test_layers_keep_their_order_and_blocks_stand_apart() -> None:
    x = [place.x for place in places(swin((2, 2)))]
    steps = np.diff(x)
    assert (steps > 0).all() and len(x) == 24
    assert set(np.flatnonzero(steps > 1.01) + 1) == {6, 12, 18}


def test_q_k_and_v_share_a_place_only_where_they_agree() -> None:
    names = swin((1,))
    assert [place.kind for place in places(names, dict.fromkeys(names, 1))] == ["q k v", "proj", "fc1", "fc2"]
    differing = {name: place for place, name in enumerate(names)}
    assert len(places(names, differing)) == 6


def test_gap_figure_draws_every_target_metric_and_null_line() -> None:
    names = swin((1, 1))
    figure = gap_figure({"far": records(names), "near": records(names, p=0.5)})
    (axis,) = [axis for axis in figure.axes if axis.get_title(loc="left") == "MMD"]
    marks = {line.get_label(): line for line in axis.lines if line.get_label() in ("far", "near")}
    assert list(marks["far"].get_ydata()) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert list(marks["near"].get_ydata()) == []  # p = 0.5: hollow marks, drawn by the line after it
    assert any(list(line.get_ydata()) == [0, 0] and len(line.get_xdata()) == 2 for line in axis.lines)
    assert drawn(figure).shape[0] > 50


def test_gap_figure_of_150_layers_and_of_layers_that_one_target_lacks() -> None:
    names = swin((2, 2, 18, 2))
    figure = gap_figure({"all": records(names), "some": records(names[:7])})
    assert figure.get_size_inches()[0] < 20
    assert drawn(figure).ndim == 3


@pytest.mark.parametrize(
    ("gap", "expected"),
    [({"p": 0.01}, True), ({"p": 0.01, "p_family": 0.2}, False), ({"p": None}, False), ({"p": 0.05}, False)],
)
def test_significance_is_that_of_all_layers_together_where_known(gap: dict[str, Any], expected: bool) -> None:
    assert significant(Gap(1.0, **gap)) is expected


def test_rank_figure_draws_the_ranks_and_the_gap() -> None:
    ranks = {name: place for place, name in enumerate(swin((1, 1)))}
    figure = rank_figure({"one": ranks, "two": dict.fromkeys(ranks, 0)}, {name: 2.0 for name in ranks}, "mmd")
    (bars,) = [item for item in figure.axes[0].collections if isinstance(item, PolyCollection)]
    assert [path.vertices[:, 1].max() for path in bars.get_paths()] == list(ranks.values())
    assert drawn(rank_figure({"negative": ranks}, dict.fromkeys(ranks, -1.0), "mmd")).ndim == 3
    assert drawn(rank_figure({"without a gap": ranks}, {})).ndim == 3


def test_spectra_figure_counts_what_lies_above_the_null() -> None:
    names = swin((1,))
    spectra = {name: Spectrum((4.0, 3.0, 1.0), 2.0, 1.0, 2) for name in names[3:]}
    figure = spectra_figure(spectra | {names[0]: Spectrum((1.0,), None, 1.0, None)}, "title")
    texts = [text.get_text() for text in figure.axes[0].texts]
    shown = [text for text in texts if text.startswith("0.0 ")]
    assert shown == ["0.0 proj: 2 above", "0.0 fc1: 2 above", "0.0 fc2: 2 above", "0.0 q"]
    assert texts.count("4") == texts.count("3") == 3 and texts.count("1") == 2  # largest value, and how many there are
    assert texts[-2] == "title"
    fills, curves, nulls = figure.axes[0].collections
    assert isinstance(fills, PolyCollection) and (len(fills.get_paths()), len(curves.get_paths())) == (3, 4)
    (null,) = {round(path.vertices[0, 1] - curve.vertices[0, 1], 6) for path, curve in
               zip(nulls.get_paths(), curves.get_paths(), strict=False)}  # fmt: skip
    assert null == pytest.approx(0.85 * (4.0 - 2.0) / (1.05 * 4.0))  # half of the largest value, from the top down
    drawn(figure)


def test_agreement_figure_writes_the_numbers() -> None:
    matrix = {"depth": {"depth": 1.0, "mmd gap": -0.5}, "mmd gap": {"depth": -0.5, "mmd gap": 1.0}}
    texts = [text.get_text() for text in agreement_figure(matrix).axes[0].texts]
    assert texts == ["+1.00", "-0.50", "-0.50", "+1.00"]


def test_alignment_figure_with_and_without_a_curve() -> None:
    pair = (Interval(3.0, 2.0, 4.0), Interval(1.0))
    curve = [{"epoch": i, "loss": 3.0 - i, "lr": 0.1 if i < 2 else 0.01} for i in range(3)]
    figure = alignment_figure(curve, {"OTDD": pair}, "OTDD (training)")
    assert len(figure.axes) == 2 and "dotted" in figure.axes[0].get_xlabel()
    assert len(alignment_figure([], {"OTDD": pair}, "distance").axes) == 1
    drawn(figure)


def test_learning_curves_skip_what_is_missing_and_go_logarithmic() -> None:
    rows = [{"epoch": 0.0, "train/loss": 100.0, "val/error": 0.5}, {"epoch": 1.0, "val/error": 0.4, "train/loss": 1.0}]
    figure = learning_curves({"a": rows, "b": [{"epoch": 0.0, "val/error": 0.3}], "c": []}, "error", "fraction")
    training, validation = figure.axes
    assert (len(training.lines), len(validation.lines)) == (1, 2)
    assert (training.get_yscale(), validation.get_yscale()) == ("log", "linear")
    drawn(figure)


@pytest.mark.parametrize("count", [1, 2, 15])
def test_comparison_figure_places_every_fine_tune(count: int) -> None:
    rows = [Point(f"t{i}", "ab"[i % 2], 10 * 8**i, Interval(0.1 + i)) for i in range(count)]
    figure = comparison_figure(rows, "error", "fraction", {"baseline": 0.05})
    points = [line for line in figure.axes[0].lines if line.get_marker() != "None"]
    assert [line.get_xdata()[0] for line in points] == [row.parameters for row in rows]
    assert [line.get_ydata()[0] for line in points] == [row.value.value for row in rows]
    assert bool(figure.legends) == (count <= 12)
    drawn(figure)


def test_comparison_figure_draws_intervals() -> None:
    rows = [Point("a", "lora", 10, Interval(0.2, 0.1, 0.4)), Point("b", "lora", 10, Interval(0.3))]
    (axis,) = comparison_figure(rows, "error", "fraction", {}).axes
    intervals = [list(line.get_ydata()) for line in axis.lines if len(line.get_ydata()) == 2]
    assert intervals == [[0.1, 0.4]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["10"]


def test_parts_figure_adds_up() -> None:
    figure = parts_figure({"a": {"adapter": 10, "predictor": 5}, "b": {"embedder": 7}, "none": {}})
    totals = [text.get_text() for text in figure.axes[0].texts]
    assert totals == ["15", "7", "0"]
    drawn(figure)


def test_gallery_shares_the_scale_of_target_and_prediction() -> None:
    y = np.stack([np.eye(4), np.zeros((4, 4))])
    figure = gallery_figure(np.ones((2, 8, 8)), y, y + np.array([1.0, 0.0])[:, None, None], [1.0, 0.0], "input")
    images = [image for image in figure.axes[0].images if image.get_array().shape != (128, 1)]  # no colour bars
    assert images[1].get_clim() == images[2].get_clim() == (0.0, 2.0)
    assert images[3].get_clim() == (-1.0, 1.0)
    assert np.array_equal(images[2].get_array(), y[0] + 1.0) and np.array_equal(images[3].get_array(), np.ones((4, 4)))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[:4] == ["input", "target", "prediction", "prediction − target"]
    assert [text for text in texts if "L2" in text] == ["relative L2 1.000", "relative L2 0.000"]
    drawn(figure)


def test_the_same_data_give_the_same_bytes() -> None:
    assert png(parts_figure({"a": {"adapter": 1}})) == png(parts_figure({"a": {"adapter": 1}}))


def test_words() -> None:
    assert [words(name) for name in ("relative_l2", "error", "mmd gap")] == ["relative L2", "error", "MMD gap"]
