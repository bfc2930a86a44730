"""Which families of timm's vision transformers work, tried on one model of each, without weights or numbers.

    python benchmarks/families.py                       # writes docs/families.md, a few minutes
    python benchmarks/families.py --only Hiera SAM      # those whose name holds a word, to the screen alone

A model goes through the shapes of its tensors alone (PyTorch's meta device): embedder, body and predictor are made for
targets of 1, 2, 5 and 13 channels, square, not square and series, at the model's own image size; the default
layers.target is adapted; and an image passes. That every adapter learns is for tests/test_families.py to show.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from omegaconf import OmegaConf

from orca_rank.__main__ import CONF
from orca_rank.adapters import inject
from orca_rank.backbone import create_model
from orca_rank.backbone.families import FAMILIES, Family, stages_of
from orca_rank.backbone.the_timm import timm
from orca_rank.errors import foreseen
from orca_rank.measuring.matrices import adaptable_layers, is_matrix
from orca_rank.predictors.multiscale import multiscale
from orca_rank.predictors.orca import orca
from orca_rank.task import Task

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
# Further models: members of a family that differ from the one shown, and models that do not come apart.
OTHERS = (
    "swin_s3_tiny_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_siglip_224",
    "hiera_small_abswin_256",
    "coatnet_pico_rw_224",
    "convnext_atto",
    "crossvit_tiny_240",
    "deit_tiny_distilled_patch16_224",
    "nest_tiny",
    "vit_small_r26_s32_224",
    "xcit_nano_12_p16_224",
    "volo_d1_224",
)
TASKS = (
    (Task("classification", (1, 28, 28), (10,)), orca),
    (Task("dense", (2, 64, 96), (1, 64, 96)), multiscale),
    (Task("segmentation", (5, 40, 30), (4, 40, 30)), orca),
    (Task("multilabel", (13, 9, 9), (6,)), multiscale),
    (Task("dense", (3, 1, 500), (2, 1, 500)), multiscale),
)


class Row(NamedTuple):
    """A model as the table has it."""

    family: str
    model: str
    pixels: str
    stages: str
    layers: str
    works: str


def tried(name: str) -> Row:
    """What becomes of a timm model."""
    target = OmegaConf.load(CONF / "config.yaml").layers.target
    try:
        with torch.device("meta"):
            for task, predictor in TASKS:
                model = create_model({"name": name, "pretrained": False}, task, predictor=predictor).eval()
                layers = adaptable_layers(model.body, target, "separate")
                output = model(torch.zeros(1, *task.input_shape))
                if output.shape != (1, *task.output_shape):
                    raise RuntimeError(f"the output has shape {tuple(output.shape)}, expected {task.output_shape}")
            modules = sum(is_matrix(module) for module in model.body.modules())
            inject(model.body, {layer.name: 1 for layer in layers})
    except Exception as error:
        said = foreseen(error)
        return Row("", name, "", "", "", f"no: {said}" if said is not None else f"NO: {type(error).__name__}: {error}")
    size, stages = model.embedder.image_size, stages_of(model.body)
    family = FAMILIES[type(model.body).__name__].name
    widths = " → ".join(map(str, dict.fromkeys(stages.widths)))
    return Row(
        family,
        name,
        "×".join(map(str, size)),
        f"{len(stages.widths)}: {widths}",
        f"{len(layers)}, {modules}",
        "yes",
    )


def models(words: list[str]) -> Iterator[str]:
    shown: dict[str, Family] = dict(FAMILIES)
    for kind, family in shown.items():
        if not words or any(word.lower() in f"{kind} {family.name}".lower() for word in words):
            yield family.shown
    if not words:
        yield from OTHERS


def reason(row: Row) -> str:
    """Why a model is refused, without what to choose instead."""
    return row.works.partition(": ")[2].partition(": choose")[0]


def page(rows: list[Row]) -> str:
    """The table as a page."""
    lines = [
        "# Families of timm's transformers",
        "",
        f"Written by `python benchmarks/families.py` with timm {timm.__version__}; run it again after a change. A",
        "model that works takes targets of any number of channels and any shape, and others of its family do too. What",
        "does not work is refused by `stage=plan` before any work, as the second table says. Layers: those",
        "that the default `layers.target` adapts, q, k and v apart, and all Linear modules and 1×1 convolutions, of",
        "which `layers.target` chooses others, such as PVT's `attn.kv`.",
        "",
        "| family | tried on | pixels | stages: widths | layers, matrices |",
        "|---|---|---|---|---|",
        *(f"| {r.family} | `{r.model}` | {r.pixels} | {r.stages} | {r.layers} |" for r in rows if r.works == "yes"),
        "",
        "| refused | why |",
        "|---|---|",
        *(f"| `{r.model}` | {reason(r)} |" for r in rows if r.works != "yes"),
        "",
        "`backbone.options.img_size` sets another size of the images, also for families that timm gives none (PVTv2,",
        "ConvNeXt, DaViT, TinyViT); there its sides must be multiples of 32.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="words of the families to try")
    words = parser.parse_args().only
    warnings.simplefilter("ignore")
    rows = []
    for name in models(words):
        rows.append(tried(name))
        print(f"{rows[-1].model:34} {rows[-1].works[:150]}", flush=True)
    if any(row.works.startswith("NO") for row in rows):
        sys.exit("a model failed in a way that nobody foresaw")
    if not words:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(rows), encoding="utf-8")
        print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
