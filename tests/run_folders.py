"""Run folders made by hand, as the stages would leave them, and the words of a page made from one."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from orca_rank.artifacts.files import write_csv, write_json

NAMES = [
    f"layers.{s}.blocks.0.{kind}" for s in range(2) for kind in ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "mlp.fc1")
]
FAR = {"_target_": "a.b.Far"}


def layers(scale: float, family: bool = False) -> list[dict[str, Any]]:
    """Eight layers whose gaps grow with depth; every second one has p = 0.01, the others 0.2."""

    def gap(i: int) -> dict[str, Any]:
        value, p = scale * (1 + i), 0.01 if i % 2 else 0.2
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "p": p, "p_family": p if family else None}

    spectrum = {"singular_values": [3.0, 1.0], "null": 2.0, "energy": 10.0, "rank": 1}
    return [
        {"name": name, "d_in": 8, "d_out": 8, "gap": {"mmd": gap(i), "sliced": gap(i)}, "ot_map": spectrum}
        for i, name in enumerate(NAMES)
    ]


def align(run: Path) -> None:
    pair = {"before": {"value": 3.25, "low": 3.0, "high": 3.5}, "after": {"value": 1.75, "low": 1.5, "high": 2.0}}
    payload = {"objective": "otdd", "distances": {"otdd": pair}, "epochs": 2, "seconds": 1.0}
    write_json(run / "align/metrics.json", payload, config={"data": FAR})
    write_csv(run / "align/curve.csv", [{"epoch": i, "loss": 3.0 - i, "lr": 0.1} for i in range(2)])


def measure(run: Path, family: bool = False) -> None:
    agreement = {a: {b: 1.0 for b in ("depth", "mmd gap", "stable rank")} for a in ("depth", "mmd gap", "stable rank")}
    config = {"backbone": {"name": "swin"}, "source": {"_target_": "a.b.Near", "file": "f"}, "data": FAR}
    config |= {"embedder": {"aligned": True}}
    write_json(run / "measure/layers.json", {"layers": layers(1.0, family), "agreement": agreement}, config=config)
    write_json(run / "measure/compare/near.json", {"name": "near", "layers": layers(0.1)})


def plan(rule: str, ranks: Any, **options: Any) -> dict[str, Any]:
    """A rank plan in the form of ranks.json."""
    if rule == "proportional":
        options = {"metric": "mmd"} | options
    budget = {"mean_rank": 4, "total_rank": None, "parameters": None, "r_min": 0, "r_max": None}
    return {"rule": rule, "budget": budget, "options": options, "ranks": dict(zip(NAMES, ranks, strict=True))}


def counts(run: Path) -> None:
    """plan/plan.json, made from layers.json where that is there."""
    trainable = {"total": 700, "adapter": 500, "embedder": 100, "predictor": 100, "other": 0}
    chosen = plan("proportional", range(8))
    rows = [
        {"name": name, "d_in": 8, "d_out": 8, "rank": r, "parameters": 16 * r} for name, r in chosen["ranks"].items()
    ]
    payload = {"trainable_parameters": trainable, "total_parameters": 9000, "layers": rows}
    payload |= {name: chosen[name] for name in ("rule", "budget", "options")}
    measured = run / "measure/layers.json"
    write_json(run / "plan/plan.json", payload, inputs=[measured] if measured.exists() else [])


def finetune(
    run: Path,
    tag: str,
    val: float,
    metric: str = "error",
    data: dict[str, Any] | None = None,
    *,
    rule: str = "uniform",
    seed: int = 7,
    adapter: int = 300,
    options: dict[str, Any] | None = None,
    scale: float | dict[str, float] | None = None,
) -> None:
    """A finished fine-tune; test = val + 1/16. options: further sections of its config. scale: of its adapters."""
    dense = metric == "relative_l2"
    task = {
        "kind": "dense" if dense else "classification",
        "input_shape": [3, 8, 8] if dense else [1, 8, 8],
        "output_shape": [1, 8, 8] if dense else [10],
    }
    payload = {
        f"val/{metric}": val, f"test/{metric}": val + 0.0625, "metric": metric, "task": task, "seconds": 2.5,
        "epochs": 3,
        "trainable_parameters": {"total": adapter + 21, "adapter": adapter, "embedder": 0, "predictor": 21, "other": 0},
        "total_parameters": 9000,
    }  # fmt: skip
    config = {"adapter": {"name": "lora"}, "seed": seed, "data": data or FAR, "backbone": {"name": "swin"}}
    folder = run / "finetune" / tag
    payload |= {} if scale is None else {"adapter_scale": scale}
    write_json(folder / "metrics.json", payload, config=config | (options or {}))
    write_json(folder / "ranks.json", plan(rule, [4] * 8))
    rows = [{"epoch": i, "lr": 0.1, "train/loss": 2.0 - i, f"val/{metric}": val} for i in range(2)]
    write_csv(folder / "curve.csv", rows)


def page(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


class _Words(HTMLParser):
    """The texts of a page in order: headings, paragraphs, captions, notes, cards and cells, one string each."""

    TAGS = ("h1", "h2", "p", "figcaption", "div", "li", "span", "b", "th", "td", "summary", "a", "title")
    HIDDEN = ("svg", "script", "style")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.hidden = 0  # in a picture or a script

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.hidden += tag in self.HIDDEN
        if tag in self.TAGS:
            self.open.append(tag)
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in self.HIDDEN
        if tag in self.TAGS:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.found and not self.hidden:
            self.found[-1] += data


def words(run: Path) -> list[str]:
    """Every text of the run's report, in order."""
    parser = _Words()
    parser.feed(page(run))
    return [text.strip() for text in parser.found if text.strip()]
