"""A report in a browser: nothing complains, nothing overflows, marks speak, tables sort, dark pages are dark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import browser
import numpy as np
import pytest
from omegaconf import DictConfig
from run_folders import align, counts, finetune, measure

from orca_rank.report.prediction_figures import Gallery
from orca_rank.stages import report

OVERFLOW = """(() => { const wide = document.documentElement.clientWidth, found = [];
for (const one of document.querySelectorAll("body *"))
  if (one.getBoundingClientRect().right > wide + 1 && !one.closest(".frame, .scroll, pre") && !one.closest("#say"))
    found.push(one.tagName + " " + one.className);
return [document.documentElement.scrollWidth - wide, found]; })()"""
LETTERS = """Math.min(...[...document.querySelectorAll(".chart")].map(
  one => 11 * one.getBoundingClientRect().width / one.viewBox.baseVal.width))"""
UNFOLD = """document.querySelectorAll("details").forEach(one => { one.open = true; })"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    program = browser.found()
    if program is None:
        pytest.skip("no browser: install Chromium or Chrome, or say where one is in CHROME")
    with browser.Browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def address(composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch) -> str:
    config = composed("stage=report", "run=mine")
    run = Path(config.paths.runs) / "mine"
    for make in (align, measure, counts):
        make(run)
    for i in range(6):
        options = {"adapter": {"name": "lora", "method": "inject"}}
        finetune(run, f"a-tag-as-long-as-they-come-{i}", 0.2 + i / 10, "relative_l2", seed=i % 2, adapter=300 + i // 2,
                 options=options | {"finetune": {"optimizer": {"lr": 0.1 * (1 + i // 2)}}})  # fmt: skip
    fields = np.linspace(0, 1, 2 * 8 * 8).reshape(2, 8, 8)
    gallery = Gallery(fields, fields, fields + 0.1, [0.1, 0.2], "coefficient")
    monkeypatch.setattr(report, "_from_data", lambda *_: (gallery, {"solver on the coarse grid": 0.0625}))
    report.run(config)
    return (run / "report.html").as_uri()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_complains_or_overflows(page: browser.Browser, address: str, width: int) -> None:
    page.open(address, width)
    page.value(UNFOLD)
    assert page.complaints == []
    assert page.value(OVERFLOW) == [0, []]
    assert page.value("document.querySelectorAll('svg.chart').length") == 10
    assert page.value(LETTERS) >= 9.5  # pixels: the smallest letters, with every figure at the width it is shown
    assert (
        page.value("""document.querySelector("h2").getBoundingClientRect().top""") < 900
    )  # figures start on the first screen
    page.value("document.querySelector('.scroll').scrollLeft = 10000")
    left = page.value("""[...document.querySelector("tbody tr").cells].slice(0, 2).map(
      one => one.getBoundingClientRect().left - one.closest(".scroll").getBoundingClientRect().left)""")
    assert 0 <= left[0] < left[1] < 60  # number and name stay in sight


@pytest.mark.parametrize("dark", [False, True])
def test_what_scrolls_sideways_says_so_and_fades_until_its_end(page: browser.Browser, address: str, dark: bool) -> None:
    hints = """[...document.querySelectorAll(".frame, .scroll")].map(one => {
      const style = getComputedStyle(one, "::after");
      return [one.scrollWidth - one.clientWidth > 1, style.content.includes("scrolls sideways"),
        getComputedStyle(one).maskImage !== "none"]; })"""
    settled = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))"
    for width in (390, 1280):
        page.open(address, width, dark=dark)
        page.value(UNFOLD)
        page.ask("Runtime.evaluate", expression=settled, awaitPromise=True)
        found = page.value(hints)
        assert all(len({*one}) == 1 for one in found)
        assert any(one[0] for one in found) or width == 1280
    page.open(address, 390, dark=dark)
    page.value("for (const one of document.querySelectorAll('.frame')) one.scrollLeft = 10000")
    page.ask("Runtime.evaluate", expression=settled, awaitPromise=True)
    ended = """[...document.querySelectorAll(".frame.wide")].map(one => getComputedStyle(one).maskImage)"""
    assert page.value(ended) and {*page.value(ended)} == {"none"}
    page.open(address, 794, dark=dark, media="print")
    page.ask("Runtime.evaluate", expression=settled, awaitPromise=True)
    assert not any(said or faded for _, said, faded in page.value(hints))


def test_marks_say_what_they_are_and_tables_sort(page: browser.Browser, address: str) -> None:
    page.open(address, 1280)
    page.value("""document.querySelector(".chart circle[data-say]").scrollIntoView({block: "center"})""")
    where = page.value("""(() => {
      const box = document.querySelector(".chart circle[data-say]").getBoundingClientRect();
      return [box.x + box.width / 2, box.y + box.height / 2]; })()""")
    for shift in (1, 0):  # a page that scrolls says nothing until the pointer moves
        page.ask("Input.dispatchMouseEvent", type="mouseMoved", x=where[0] + shift, y=where[1])
    assert "0.2" in page.value("""say.hidden ? "" : say.textContent""")

    column = """[...document.querySelector("table").tBodies[0].rows].map(row => parseInt(row.cells[0].textContent))"""
    order = page.value(column)
    assert order == sorted(order) and len(order) > 1
    page.value("""document.querySelector("thead th").click()""")
    page.value("""document.querySelector("thead th").click()""")
    assert page.value(column) == order[::-1]
    assert page.value("""document.querySelector("thead th").getAttribute("aria-sort")""") == "descending"
    assert page.complaints == []


def test_figures_follow_a_dark_page_and_print_is_light(page: browser.Browser, address: str) -> None:
    ink = """[getComputedStyle(document.querySelector(".chart text")).fill,
      getComputedStyle(document.body).backgroundColor]"""
    page.open(address, 1280, dark=True)
    assert page.value(ink) == ["rgb(230, 237, 243)", "rgb(13, 17, 23)"]
    page.open(address, 1280)
    assert page.value(ink) == ["rgb(31, 35, 40)", "rgb(255, 255, 255)"]
    page.open(address, 794, dark=True, media="print")
    assert page.value(ink) == ["rgb(31, 35, 40)", "rgb(255, 255, 255)"]


def test_every_figure_has_words_for_those_who_do_not_see_it_and_its_data(page: browser.Browser, address: str) -> None:
    page.open(address, 1280)
    labels = page.value("""[...document.querySelectorAll("svg.chart")].map(one => one.getAttribute("aria-label"))""")
    captions = page.value("""[...document.querySelectorAll("figcaption")].map(one => one.textContent)""")
    assert labels == captions and all(len(label) > 40 for label in labels)
    sizes = page.value("""[...document.querySelectorAll("a.data")].map(
      one => decodeURIComponent(one.href).split("\\n").length)""")
    assert len(sizes) == len(labels) and min(sizes) > 2
