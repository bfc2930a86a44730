"""stage=export: the run's rank plan as a LoraConfig of PEFT, and model cards for its adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from orca_rank.artifacts.command import command, left
from orca_rank.artifacts.damaged import reading
from orca_rank.artifacts.files import atomic, read_json, read_record
from orca_rank.artifacts.lock import locked
from orca_rank.artifacts.provenance import differences
from orca_rank.ranks import RankPlan
from orca_rank.ranks.peft import peft_parameters
from orca_rank.stages.card import model_card
from orca_rank.stages.finetune import finetune_config
from orca_rank.stages.setup import stage_folder

console = Console(highlight=False, markup=False)
LORA = "orca_rank.adapters.LoRA"


def run(config: DictConfig) -> None:
    """Write export/adapter_config.json, which `peft.LoraConfig.from_pretrained` reads, from plan/plan.json; print the
    lines to paste and what PEFT trains; and write README.md into finetune/<tag>/adapter of the fine-tune that
    finetune.tag names, or of all.

    Raises:
        FileNotFoundError: without a plan. ValueError: for a plan that adapts nothing. DamagedFile: for a file that
            is not what its stage wrote.
    """
    path = stage_folder(config, "plan") / "plan.json"
    plan = read_record(path, "stage=plan", RankPlan.from_dict)
    with reading(path, f"run `{command('stage=plan', 'force=true')}`"):
        made_from = read_json(path, "stage=plan")["config"]
        backbone, adapter = made_from["backbone"], made_from["adapter"]
    if not any(plan.ranks.values()):
        raise ValueError(
            f"{path} adapts no layer, and PEFT has no adapter without one: choose a rank rule and an adapter with "
            f"ranks, and run `{command('stage=plan')}`"
        )
    arguments, notes = lora_config(plan, adapter)
    folder = stage_folder(config, "export")
    with locked(folder, wait=True), atomic(folder / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(arguments, indent=2) + "\n")
    for line in (*paste(folder, backbone), counts(plan), *notes):
        console.print(line, soft_wrap=True)
    console.print(f"written to {folder / 'adapter_config.json'}", soft_wrap=True)
    for tuned in _tuned(config):
        _write_card(config, tuned)
        console.print(f"model card: {tuned / 'adapter' / 'README.md'}", soft_wrap=True)


def lora_config(plan: RankPlan, adapter: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What adapter_config.json holds for the plan, scaled as the run's adapter is where PEFT can say so, and what a
    user should know.

    Args:
        adapter: the config group of that name, as plain values.
    """
    module, notes = adapter.get("module") or {}, []
    alpha, scaling = module.get("alpha"), module.get("scaling")
    arguments = plan.to_peft()  # the scale is 1 everywhere
    scale: float | None = 1.0
    if alpha is not None and scaling == "constant":
        scale = factor = float(alpha)
        arguments["lora_alpha"] *= factor
        arguments["alpha_pattern"] = {name: factor * own for name, own in arguments["alpha_pattern"].items()}
    elif alpha is not None and scaling == "lora":
        try:
            arguments, scale = plan.to_peft(alpha), None
        except ValueError:
            notes.append(
                "q, k and v of a matrix have different ranks, so that one alpha would scale them differently, which "
                "PEFT cannot say of the fused matrix: here alpha is every layer's rank, a scale of 1"
            )
    said = f"alpha is {alpha:g} for every rank" if scale is None else f"the scale is {scale:g} at every rank"
    notes.append(f"{said}; set lora_alpha and alpha_pattern for another")
    if module.get("_target_") != LORA or module.get("init", "kaiming") != "kaiming":
        notes.append(f"the run's adapter={adapter.get('name')} is more than a LoraConfig says: this is plain LoRA")
    dropout = float(module.get("dropout") or 0.0)
    rest = {"task_type": None, "inference_mode": False, "bias": "none", "use_rslora": False, "use_dora": False}
    return {"peft_type": "LORA", **arguments, "lora_dropout": dropout, "init_lora_weights": True, **rest}, notes


def paste(folder: Path, backbone: Mapping[str, Any]) -> list[str]:
    """The lines that adapt the user's own model, under a comment that says which model the names are of."""
    options = "".join(f", {name}={value!r}" for name, value in (backbone.get("options") or {}).items())
    return [
        f'# model = timm.create_model("{backbone["name"]}"{options}, num_classes=...), with your weights and head',
        "from peft import LoraConfig, get_peft_model",
        f'config = LoraConfig.from_pretrained("{folder}")',
        "model = get_peft_model(model, config)",
    ]


def counts(plan: RankPlan) -> str:
    """Adapter parameters as planned and as PEFT trains them, and why they differ."""
    planned = sum(rank * sum(plan.shapes[name]) for name, rank in plan.ranks.items())
    trained = peft_parameters(plan.ranks, plan.shapes)
    if trained == planned:
        return f"PEFT trains {trained:,} adapter parameters, as planned"
    return (
        f"planned are {planned:,} adapter parameters, PEFT trains {trained:,}: the plan adapts q, k and v apart, each "
        f"with a B of d rows, PEFT the fused matrix that holds them, with all their rows of A and a B of 3d rows. The "
        f"plan's is the case of a block-diagonal B. layers.qkv=fused plans what PEFT trains; "
        f"orca_rank.inject(model, plan) trains what is planned here, and save_peft writes it for PEFT"
    )


def _tuned(config: DictConfig) -> list[Path]:
    """Folders of finished fine-tunes that left an adapter in PEFT's layout.

    Raises:
        FileNotFoundError: if finetune.tag names none.
    """
    folder = stage_folder(config, "finetune")
    tag = config.finetune.tag
    found = sorted(path.parent.parent for path in folder.glob("*/adapter/adapter_config.json"))
    found = [path for path in found if (path / "metrics.json").exists() and tag in (None, path.name)]
    if tag is not None and not found:
        raise FileNotFoundError(
            f"no finished fine-tune with an adapter at {folder / str(tag)}: run `{command('stage=finetune')}` first"
        )
    return found


def _write_card(config: DictConfig, tuned: Path) -> None:
    metrics = read_json(tuned / "metrics.json", "stage=finetune")
    plan = read_record(tuned / "ranks.json", "stage=finetune", RankPlan.from_dict)
    with reading(tuned / "metrics.json", f"run `{command('stage=finetune', 'force=true')}`"):
        made_from = {name: value for name, value in metrics["config"].items() if name != "contents"}
        same = not differences(made_from, finetune_config(config))
        words = left(tuned)
        made_by = command("stage=finetune", of=words or None) if words or same else None
        text = model_card(metrics, plan, tuned.name, made_by)
    with atomic(tuned / "adapter" / "README.md") as temporary:
        temporary.write_text(text)
