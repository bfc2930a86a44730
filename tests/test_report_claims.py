"""The evidence as a section: the table says what the claims say, the plot draws their intervals."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import DictConfig
from pictures import place, says, texts
from run_folders import finetune, words

from orca_rank.artifacts.files import write_csv, write_json
from orca_rank.evidence.points import Row
from orca_rank.evidence.verdicts import MARGIN, OWN, Claim
from orca_rank.report import plots
from orca_rank.report.claims import curve_figure, forest_figure, markdown, rank_curves, read_evidence
from orca_rank.stages import report

CLAIMS = [
    Claim("a beats uniform", "supported", -3.0, -4.5, -1.5, "% of the error", 0.01, 16, "well"),
    Claim("b beats uniform", "undecided", 1.0, -3.0, 5.0, "% of the error", 0.5, 8),
    Claim("rank grows", "undecided", float("nan"), float("nan"), float("nan"), "Kendall's τ", 1.0, 12),
]
ROW = Row("rules", "darcy", "uniform", 2, 0, 0, 0.1, 0.1, 0.5, 0.5, 100, 2.0)


@pytest.fixture
def config(composed: Callable[..., DictConfig]) -> DictConfig:
    return composed("stage=report", "run=mine")


def evidence(config: DictConfig) -> Path:
    run = Path(config.paths.runs) / "mine"
    finetune(run, "one", 0.25)
    rows = [ROW, replace(ROW, seed=1), replace(ROW, task="digits")]
    write_csv(run / "evidence/evidence.csv", [row.to_dict() for row in rows])
    payload = {"claims": [claim.to_dict() for claim in CLAIMS], "recommended": ["darcy: rank hardly matters."]}
    write_json(run / "evidence/claims.json", payload)
    return run


def test_the_section_says_what_the_claims_say(config: DictConfig) -> None:
    run = evidence(config)
    report.run(config)
    found = words(run)
    assert "darcy: rank hardly matters." in found
    start = found.index(
        "From 3 fine-tunes on 2 tasks with 2 seeds. p: of no difference, adjusted where several rules were asked at "
        "once"
    )
    head = ["claim", "verdict", "estimate", "95 % interval", "unit", "p", "fine-tunes", "note"]
    assert found[start + 1 : start + 9] == head
    assert found[start + 9 : start + 17] == [
        "a beats uniform", "supported", "-3", "[-4.5, -1.5]", "% of the error", "0.01", "16", "well",
    ]  # fmt: skip
    place = found.index("rank grows")
    assert found[place : place + 5] == ["rank grows", "undecided", "Kendall's τ", "1", "12"]  # no figure, no interval
    assert (
        f"Difference of the test error in per cent of what it is compared with, with 95 % intervals; left of 0 the "
        f"claim holds. Shaded: ±{MARGIN:g} %, within which a difference is of no use. Arrows: the interval goes on."
    ) in found
    assert (run / "report/evidence.svg").exists()


def test_a_run_of_evidence_alone_is_reported(config: DictConfig) -> None:
    run = Path(config.paths.runs) / "mine"
    gate = [replace(ROW, part="gate", rule="frozen", rank=0, seed=seed, test=0.8) for seed in range(2)]
    gate += [replace(ROW, part="gate", rank=rank, test=0.6 / rank) for rank in (4, 1)]
    write_csv(run / "evidence/evidence.csv", [row.to_dict() for row in gate])
    write_json(run / "evidence/claims.json", {"claims": [claim.to_dict() for claim in CLAIMS]})
    report.run(config)
    found = words(run)
    assert "Evidence" in found and not any("not there yet" in text or "Options" in text for text in found)
    assert (run / "report/rank_curve.svg").exists()
    assert rank_curves([replace(ROW), *gate]) == {"darcy": {"frozen": [0.8, 0.8], "1": [0.6], "4": [0.15]}}


def test_the_page_of_text_says_what_the_claims_say() -> None:
    text = markdown(CLAIMS, [ROW, replace(ROW, seconds=3598.0)], ["darcy: rank hardly matters."])
    lines = text.splitlines()
    assert lines[2] == "| a beats uniform; well | **supported** | -3.0 % of the error | [-4.5, -1.5] | 0.01 | 16 |"
    assert lines[4] == "| rank grows | **undecided** |  |  | 1 | 12 |"
    assert lines[6:] == ["- darcy: rank hardly matters.", "", "2 fine-tunes, 1.0 hours of training."]


def test_rules_whose_own_rate_is_uniforms_are_said_in_a_sentence() -> None:
    first, second = CLAIMS[:2]
    own = [replace(first, claim="a beats uniform" + OWN), replace(second, claim="b beats uniform" + OWN, estimate=2.0)]
    lines = markdown([first, second, *own], [ROW], ["darcy: rank hardly matters."]).splitlines()
    assert sum(OWN in line for line in lines) == 1 and lines[4].startswith(f"| b beats uniform{OWN} | **undecided**")
    assert lines[6] == "- The own best learning rate of these rules is uniform's: a."


def test_the_readme_says_what_the_committed_evidence_says() -> None:
    root = Path(__file__).parents[1]
    folder = root / "evidence" / "evidence_small" / "evidence"
    claims, rows, answers = read_evidence(folder, "stage=evidence")
    assert markdown(claims, rows, answers) in (root / "README.md").read_text()
    assert {row.point.name for row in rows} == {path.stem for path in folder.glob("*/rows/*.json")}


CURVE = {"near": {"frozen": [0.8, 0.6], "1": [0.5, 0.3], "4": [0.2], "full": [0.1]}}


def test_the_curve_has_a_point_a_seed_and_lines_for_frozen_and_full() -> None:
    found = says(picture := curve_figure(CURVE))
    seeds = [place(found[f"rank {rank}: a seed, {value}"]) for rank, value in ((1, 0.5), (1, 0.3), (4, 0.2))]
    means = [place(found[f"rank {rank}: mean {value} of {n} seeds"]) for rank, value, n in ((1, 0.4, 2), (4, 0.2, 1))]
    assert means[0][1] == pytest.approx((seeds[0][1] + seeds[1][1]) / 2, abs=0.1) and means[1] == seeds[2]
    assert {"frozen body: 0.7", "full fine-tuning: 0.1"} <= set(found)
    assert {"frozen body", "full fine-tuning", "1", "4", "near"} <= set(texts(picture))


def test_the_picture_of_the_readme_shows_the_same_curve() -> None:
    (axis,) = plots.curve_figure(CURVE).axes
    lines = [(list(line.get_xdata()), [round(y, 6) for y in line.get_ydata()]) for line in axis.lines]
    assert lines[2:] == [([0, 0], [0.5, 0.3]), ([1], [0.2]), ([0, 1], [0.4, 0.2])]
    assert [ys[0] for _, ys in lines[:2]] == [0.7, 0.1]
    assert [text.get_text() for text in axis.texts] == ["frozen body", "full fine-tuning"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "4"]


def test_the_plot_draws_estimates_intervals_and_the_margin() -> None:
    endless = replace(CLAIMS[1], low=-float("inf"), high=float("inf"), claim="c" * 90)
    picture = forest_figure([CLAIMS[0], endless])
    found = says(picture)
    (x, y), (other, below) = (place(found[said]) for said in (
        "a beats uniform: supported, -3 % [-4.5, -1.5]", f"{'c' * 90}: undecided, +1 %"))  # fmt: skip
    assert x < other and y < below
    assert texts(picture).count("◂") == texts(picture).count("▸") == 1
    assert {"supported", "undecided", "difference of the test error (%)", "c" * 69 + "…"} <= set(texts(picture))
    (band,) = [part for part in picture.parts if 'class="band"' in part]
    width = float(band.partition('width="')[2].partition('"')[0])
    zero = float(
        next(part for part in picture.parts if 'class="line fine"' in part).partition('points="')[2].split(",")[0]
    )
    assert (zero - x) / (width / 2) == pytest.approx(3.0 / MARGIN, rel=0.01)


def test_damaged_evidence_is_an_error_that_names_the_command(config: DictConfig) -> None:
    run = evidence(config)
    with open(run / "evidence/evidence.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["task"], ["darcy"]])
    with pytest.raises(ValueError, match=r"damaged evidence .*stage=evidence run=mine"):
        report.run(config)
