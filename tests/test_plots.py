"""Figures from plain data: what is drawn is what was given, and what is missing is left out."""

from __future__ import annotations

import io
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from pictures import place, says, texts

from orca_rank.measuring.records import Gap, Layer, Spectrum
from orca_rank.report import plots
from orca_rank.report.draw import Panel, Picture, Scale, pixels, scale, short, tick_labels, words
from orca_rank.report.figures import Point, alignment_figure, comparison_figure, learning_curves, parts_figure
from orca_rank.report.layer_figures import (
    agreement_figure,
    gap_figure,
    place_of,
    places,
    posterior_figure,
    significant,
    spectra_figure,
    table_figure,
)
from orca_rank.report.results import Interval


def swin(depths: tuple[int, ...]) -> list[str]:
    kinds = ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    return [f"layers.{s}.blocks.{b}.{kind}" for s, depth in enumerate(depths) for b in range(depth) for kind in kinds]


def records(names: list[str], p: float | None = 0.01) -> list[Layer]:
    """The gap of a layer is its block's place in the network, so q, k and v of a block agree."""
    return [Layer(name, 8, 8, {"mmd": Gap(i // 6, i // 6 - 1.0, None, p)}) for i, name in enumerate(names)]


def drawn(figure: Figure) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(plots.png(figure, dpi=50)))


def test_a_scale_is_even_or_in_ratios() -> None:
    even, ratios = Scale(0, 10, 100, 200), Scale(1, 100, 300, 100, log=True)
    assert [even(0), even(2.5), even(10)] == [100, 125, 200]
    assert [ratios(1), ratios(10), ratios(100)] == pytest.approx([300, 200, 100])
    assert even.ticks(5) == [0, 2, 4, 6, 8, 10] and set(ratios.ticks()) >= {1, 10, 100}
    found = scale([1.0, 1000.0], 0, 1)
    assert found.log and found.low < 1 and found.high > 1000
    assert (scale([2.0, 4.0], 0, 1, zero=True).low, scale([0.1, 4.0], 0, 1, wide=np.inf).low) == (0.0, 0.0)
    assert scale([3.0, 3.0], 0, 1).low < 3 < scale([3.0], 0, 1).high
    assert [scale([-1.0, 1.0, float("nan")], 0, 1)(value) for value in (-1, 1)] == pytest.approx(
        [0.08 / 1.16, 1.08 / 1.16]
    )


def test_ticks_are_told_apart() -> None:
    assert tick_labels([1.975, 1.98, 1.985]) == [(1.975, "1.975"), (1.98, "1.98"), (1.985, "1.985")]
    assert [short(value) for value in (0.01234, 1234, 21888, 2740170)] == ["0.0123", "1,234", "21.9k", "2.74M"]


def test_a_picture_is_xml_and_escapes_what_it_says() -> None:
    picture = Picture(100, 50)
    panel = Panel(picture, Scale(0, 1, 10, 90), Scale(0, 1, 40, 10))
    for shape in "osdvx":
        panel.mark(0.5, 0.5, "dot c0", f'"<{shape}>"', shape=shape)
    assert {place(mark) for mark in says(picture).values()} == {(50.0, 25.0)}
    assert '"<o>"' in says(picture)
    page = picture.svg('a "label"')
    assert 'role="img" aria-label="a &quot;label&quot;"' in page and "<style" not in page
    assert "prefers-color-scheme: dark" in picture.svg("", alone=True)


def test_pixels_go_through_the_colours() -> None:
    shown = pixels(np.array([[0.0, 5.0, 10.0, 20.0, np.nan]]), 0.0, 10.0, ((0, 0, 0), (100, 200, 50)))
    assert shown.tolist() == [[[0, 0, 0], [50, 100, 25], [100, 200, 50], [100, 200, 50], [170, 170, 170]]]


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


@pytest.mark.parametrize(
    ("gap", "expected"),
    [({"p": 0.01}, True), ({"p": 0.01, "p_family": 0.2}, False), ({"p": None}, False), ({"p": 0.05}, False)],
)
def test_significance_is_that_of_all_layers_together_where_known(gap: dict[str, Any], expected: bool) -> None:
    assert significant(Gap(1.0, **gap)) is expected


def test_gaps_stand_above_ranks_on_one_axis_of_layers() -> None:
    names = swin((1, 1))
    ranks = {name: number for number, name in enumerate(names)}
    picture = gap_figure({"far": records(names), "near": records(names, p=0.5)}, "mmd", {"the plan": ranks}, 2.5)
    found = says(picture)
    for number, name in enumerate(names):
        bar, far, near = (found[f"{name}{said}"] for said in (
            f": rank {number}", f", far: {number // 6}, p = 0.01", f", near: {number // 6}, p = 0.5"))  # fmt: skip
        middle = float(bar.get("x", "")) + 5
        assert place(far)[0] < middle < place(near)[0] and abs(place(far)[0] - middle) < 3
        assert ("dot" in far.get("class", ""), "ring" in near.get("class", "")) == (True, True)
        assert float(bar.get("y", "")) > place(far)[1]  # below
    heights = [float(found[f"{name}: rank {number}"].get("height", "")) for number, name in enumerate(names)]
    assert np.allclose(np.diff(heights[1:]), heights[2] / 2, atol=0.2)
    assert "no difference" in found and "uniform at as many: 2.50" in found
    assert {"the plan", "0.0", "1.0", "fc1", "far", "near", "p < 0.05"} <= set(texts(picture))


def test_gaps_of_150_layers_and_of_layers_that_one_target_lacks() -> None:
    names = swin((2, 2, 18, 2))
    picture = gap_figure({"all": records(names), "some": records(names[:7])}, "mmd", {}, None)
    assert (
        sum(", some: " in said for said in says(picture)) == 7
        and sum(", all: " in said for said in says(picture)) == 144
    )
    only_ranks = gap_figure({}, "", {"plan": dict.fromkeys(names, 0)}, None)
    assert len(says(only_ranks)) == 144


def test_intervals_are_drawn_where_both_ends_are_known() -> None:
    layers = [Layer("a.x", 8, 8, {"mmd": Gap(1.0, 0.5, 2.0)}), Layer("a.y", 8, 8, {"mmd": Gap(1.0, 0.5, None)})]
    picture = gap_figure({"t": layers}, "mmd", {}, None)
    assert sum('class="span' in part for part in picture.parts) == 1
    assert set(says(picture)) >= {"a.x, t: 1 [0.5, 2]", "a.y, t: 1"}


def test_plans_are_tables_of_blocks_and_kinds_that_share_a_scale() -> None:
    names = swin((1, 1))
    low, high = {name: 1 for name in names}, {name: 4 for name in names}
    picture = table_figure({"gap": {names[0]: 2.0}, "low": low, "high": high}, {"gap": "gap", "low": "r", "high": "r"})
    boxes = [part for part in picture.parts if 'class="cell' in part]
    shades = [float(part.partition('fill-opacity="')[2].partition('"')[0]) for part in boxes]
    assert shades == pytest.approx([0.95] + [0.03 + 0.92 / 4] * 12 + [0.95] * 12, abs=0.01)
    assert texts(picture).count("proj") == 3 and texts(picture).count("4") == 12


def test_spectra_count_what_lies_above_the_null() -> None:
    names = swin((1,))
    spectra = {name: Spectrum((4.0, 3.0, 1.0), 2.0, 1.0, 2) for name in names[3:]}
    picture = spectra_figure(spectra | {names[0]: Spectrum((1.0,), None, 1.0, None)})
    assert [text for text in texts(picture) if text.startswith("0.0 ")] == [
        "0.0 proj: 2 above", "0.0 fc1: 2 above", "0.0 fc2: 2 above", "0.0 q",
    ]  # fmt: skip
    assert f"{names[3]}: 3 values, largest 4, noise reaches 2, 2 lie above" in says(picture)
    assert sum("dash" in part for part in picture.parts) == 3
    wide = spectra_figure({names[0]: Spectrum(tuple(np.linspace(9, 1, 1000)), None, 1.0, None)})
    assert max(len(part) for part in wide.parts) < 2000


def test_agreement_writes_the_numbers() -> None:
    matrix = {"depth": {"depth": 1.0, "mmd gap": -0.5}, "mmd gap": {"depth": -0.5, "mmd gap": float("nan")}}
    picture = agreement_figure(matrix)
    assert [text for text in texts(picture) if text[:1] in "+-"] == ["+1.00", "-0.50", "-0.50", ""]
    assert "depth and MMD gap: ρ = -0.50" in says(picture)


def test_a_posterior_has_a_cell_a_rank_and_layer() -> None:
    picture = posterior_figure({name: np.array([0.25, 0.75]) for name in swin((1,))}, [0, 4])
    found = says(picture)
    assert len(found) == 12
    low, high = (found[f"layers.0.blocks.0.mlp.fc1, rank {r}: P = {p}"] for r, p in ((0, 0.25), (4, 0.75)))
    assert (low.get("fill-opacity"), high.get("fill-opacity")) == ("0.25", "0.75")
    assert float(high.get("y", "")) < float(low.get("y", ""))


def test_alignment_with_and_without_a_curve() -> None:
    pair = (Interval(3.0, 2.0, 4.0), Interval(1.0))
    curve = [{"epoch": i, "loss": 3.0 - i, "lr": 0.1 if i < 2 else 0.01} for i in range(3)]
    found = says(alignment_figure(curve, {"OTDD": pair}, "OTDD (training)"))
    assert {"epoch 2: 1", "the learning rate changes to 0.01", "OTDD before: 3 [2, 4]", "OTDD after: 1"} <= set(found)
    assert set(says(alignment_figure([], {"OTDD": pair}, "x"))) == {"OTDD before: 3 [2, 4]", "OTDD after: 1"}


def test_learning_curves_skip_what_is_missing() -> None:
    rows = [{"epoch": 0.0, "train/loss": 100.0, "val/error": 0.5}, {"epoch": 1.0, "val/error": 0.4, "train/loss": 1.0}]
    picture = learning_curves({"a": rows, "b": [{"epoch": 0.0, "val/error": 0.3}], "c": []}, "error", "fraction")
    assert set(says(picture)) == {"a: 1 in the last epoch", "a: 0.4 in the last epoch", "b: 0.3"}
    assert {"1  a", "2  b", "3  c", "training loss", "validation error (fraction)"} <= set(texts(picture))


def points(count: int) -> list[Point]:
    return [Point(f"t{i}", "ab"[i % 2], 10 * 8**i, Interval(0.1 + i), (0.1 + i,), i + 1) for i in range(count)]


@pytest.mark.parametrize("count", [2, 15])
def test_comparison_places_every_fine_tune(count: int) -> None:
    lines = {"full fine-tuning": Interval(0.2, 0.1, 0.3), "solver": Interval(0.05)}
    picture = comparison_figure(points(count), lines, "error", "fraction", "trainable parameters")
    found = says(picture)
    marks = [place(found[f"{i + 1}. t{i}: {0.1 + i:.4g}, {10 * 8**i:,} parameters"]) for i in range(count)]
    assert [x for x, _ in marks] == sorted(x for x, _ in marks) and [y for _, y in marks] == sorted(
        (y for _, y in marks), reverse=True
    )
    assert {"full fine-tuning: 0.2 [0.1, 0.3]", "solver: 0.05"} <= set(found) & set(texts(picture))
    assert ("2" in texts(picture)) == (count <= 12)


def test_seeds_are_points_and_their_mean_a_ring_with_its_interval() -> None:
    shown = [
        Point("a", "lora", 10, Interval(0.3, -5.0, 5.6), (0.2, 0.4), 1),
        Point("b", "lora", 90, Interval(0.3), (0.3,), 2),
    ]
    picture = comparison_figure(shown, {}, "error", "fraction", "parameters")
    found = says(picture)
    seeds = [place(found[f"a: a seed, {value}"]) for value in (0.2, 0.4)]
    x, y = place(found["1. a: 0.3 [-5, 5.6], 10 parameters, 2 seeds"])
    assert {one for one, _ in seeds} == {x} and np.mean([one for _, one in seeds]) == pytest.approx(y, abs=0.1)
    (span,) = [part for part in picture.parts if 'class="span' in part and 'x1="' in part and f'x1="{x:g}"' in part]
    ends = [float(span.partition(f'{end}="')[2].partition('"')[0]) for end in ("y1", "y2")]
    assert ends[0] <= 295 and ends[1] >= 14  # an interval of two seeds ends at the axes


def test_fine_tunes_of_one_size_stand_in_rows_the_best_first() -> None:
    shown = [Point("a", "lora", 10, Interval(0.4, 0.3, 0.5), (0.3, 0.5), 1)]
    picture = comparison_figure(shown, {"solver": Interval(0.1)}, "error", "fraction", "parameters")
    assert [text for text in texts(picture) if text in ("1. a", "solver")] == ["solver", "1. a"]
    assert place(says(picture)["solver: 0.1"])[0] < place(says(picture)["1. a: 0.4"])[0]


def test_the_adapter_has_an_axis_of_its_own() -> None:
    picture = parts_figure({"a": {"adapter": 10, "predictor": 50_000}, "b": {"adapter": 5, "embedder": 7}, "none": {}})
    found = says(picture)
    wide = [float(found[f"{row}: {count} in the adapter"].get("width", "")) for row, count in (("a", 10), ("b", 5))]
    assert wide == pytest.approx([270, 135], abs=0.2)
    assert {"10", "50,000", "5", "7", "0"} <= set(texts(picture))


def test_words() -> None:
    assert [words(name) for name in ("relative_l2", "error", "mmd gap")] == ["relative L2", "error", "MMD gap"]


def test_the_plot_of_a_notebook_draws_every_target_metric_and_null_line() -> None:
    names = swin((1, 1))
    figure = plots.gap_figure({"far": records(names), "near": records(names, p=0.5)})
    (axis,) = [axis for axis in figure.axes if axis.get_title(loc="left") == "MMD"]
    marks = {line.get_label(): line for line in axis.lines if line.get_label() in ("far", "near")}
    assert list(marks["far"].get_ydata()) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert list(marks["near"].get_ydata()) == []  # p = 0.5: hollow marks, drawn by the line after it
    assert any(list(line.get_ydata()) == [0, 0] and len(line.get_xdata()) == 2 for line in axis.lines)
    assert drawn(figure).shape[0] > 50
    large = swin((2, 2, 18, 2))
    wide = plots.gap_figure({"all": records(large), "some": records(large[:7])})
    assert wide.get_size_inches()[0] < 20 and drawn(wide).ndim == 3
    assert plots.png(figure, 50) == plots.png(figure, 50)
