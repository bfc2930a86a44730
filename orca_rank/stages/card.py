"""The model card of an adapter: what it is for, what it was trained on, what came out and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orca_rank.ranks import RankPlan


def model_card(metrics: Mapping[str, Any], plan: RankPlan, tag: str, made_by: str | None) -> str:
    """README.md for an adapter folder, in the form that model hubs read.

    Args:
        metrics: what finetune/<tag>/metrics.json holds. plan: the ranks that were used. tag: of the fine-tune.
        made_by: the command line that makes it again, where it is known.
    """
    config, backbone, task = metrics["config"], metrics["backbone"], metrics["task"]
    name, trained = backbone["config"]["name"], metrics["trainable_parameters"]
    scores = {key: value for key, value in metrics.items() if key.startswith(("test/", "val/"))}
    contents = (config.get("contents") or {}).get("data")
    sections = ("data", "backbone", "layers", "embedder", "predictor", "adapter", "rank", "budget", "finetune", "seed")
    options = {key: config[key] for key in sections if key in config}
    header = {"library_name": "peft", "base_model": f"timm/{name}", "tags": ["lora", "timm", "orca_rank"]}
    command = made_by or "python -m orca_rank stage=finetune, with the options below"
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in header.items()),
            "---",
            "",
            f"# LoRA adapter of {name}: {tag}",
            "",
            "Made by orca_rank: ranks layer by layer, in PEFT's layout.",
            "",
            "| | |",
            "|---|---|",
            f"| task | {task['kind']}: inputs {_shape(task['input_shape'])}, outputs {_shape(task['output_shape'])} |",
            f"| data | `{config['data']['_target_']}`, {_data(contents)} |",
            f"| backbone | {name}, SHA-256 of its weights {backbone['hash'][:16]} |",
            f"| trained parameters | {trained['total']:,}, of them adapter {trained['adapter']:,}, embedder "
            f"{trained['embedder']:,}, predictor {trained['predictor']:,} |",
            *(f"| {key} | {value:.6g} |" for key, value in sorted(scores.items())),
            "",
            "The metrics are of the whole model; this folder holds the adapters of the body alone. The embedder and",
            "the predictor that were trained with them lie above it in `model.safetensors`: `orca_rank.load(run, tag)`",
            "gives the whole.",
            "",
            "```python",
            "from peft import PeftModel",
            "model = PeftModel.from_pretrained(body, folder)  # body: the bare timm model, folder: this one",
            "```",
            "",
            "## Made by",
            "",
            "```",
            command,
            "```",
            "",
            "## Ranks",
            "",
            "```",
            repr(plan),
            "```",
            "",
            "## Options",
            "",
            "```json",
            json.dumps(options, indent=1),
            "```",
            "",
        ]
    )


def _shape(lengths: list[int]) -> str:
    return " × ".join(str(length) for length in lengths)


def _data(contents: str | None) -> str:
    return "which follow from the options" if contents is None else f"hash of the files {contents}"
