"""stage=finetune: train the model with the ranks of the plan, test the best epoch, keep what was trained."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from omegaconf import DictConfig
from rich.console import Console

from orca_rank import adapters
from orca_rank.artifacts.files import atomic, write_json, write_tensors
from orca_rank.artifacts.provenance import differences, finished, key, plain, select
from orca_rank.backbone import OrcaModel, weights_hash
from orca_rank.build import build
from orca_rank.ranks import RankPlan
from orca_rank.stages.planning import layers_of, make_plan
from orca_rank.stages.setup import (
    MODEL_SECTIONS,
    aligned_embedder,
    build_model,
    close_logger,
    contents,
    ready,
    resolve_backbone,
    stage_folder,
)
from orca_rank.stages.trainable import adapter_module, audit, count_parameters, make_trainable
from orca_rank.task import Task
from orca_rank.training.finetune import Curve, FineTune, trained_tensors

console = Console()


def tag(config: DictConfig) -> str:
    """The folder of a fine-tune: finetune.tag, or adapter, rule, seed and a hash of every option it depends on."""
    if config.finetune.tag is not None:
        return str(config.finetune.tag)
    parts = [config.adapter.name]
    if config.adapter.method == "inject":
        rank = plain(config.rank)
        parts.append(rank["_target_"].rpartition(".")[2] + (f"-r{rank['r']}" if rank.get("r") is not None else ""))
    return "-".join([*parts, f"s{config.seed}", key(finetune_config(config))[:6]])


def run(config: DictConfig) -> None:
    """Fine-tune as configured and write finetune/<tag>/.

    Raises:
        ValueError: a bad plan, a frozen fresh predictor, an unknown schedule. FloatingPointError: a loss that is not
            finite. FileNotFoundError: an earlier stage is missing.
    """
    if config.finetune.schedule not in ("linear", "cosine", "constant"):
        raise ValueError(f"finetune.schedule must be linear, cosine or constant, received {config.finetune.schedule!r}")
    folder = stage_folder(config, "finetune") / tag(config)
    made_from = {**finetune_config(config), "contents": contents(config, "data")}
    if finished(folder / "metrics.json", made_from, force=config.force, made_by="stage=finetune"):
        console.print(f"finetune is done: {folder / 'metrics.json'} (force=true redoes it)", soft_wrap=True)
        return

    L.seed_everything(config.seed, verbose=False)
    data = ready(config.data)
    task: Task = data.task
    model = build_model(config, task)
    backbone = {"config": resolve_backbone(config), "hash": weights_hash(model.body)}
    injected = config.adapter.method == "inject"
    layers = layers_of(config, model.body)
    plan = make_plan(config, layers) if injected else None
    adapter = adapter_module(config, layers) if injected else None
    make_trainable(model, config, plan, adapter)
    audit(model, config)
    counts = count_parameters(model, injected)
    if plan is not None:
        adapted = sum(rank > 0 for rank in plan.ranks.values())
        console.print(
            f"{config.adapter.name}: {adapted} of {len(plan.ranks)} layers adapted, rule {plan.rule or 'given'}"
        )
    console.print(f"trainable parameters: {counts['trainable_parameters']}")

    trainer, best = _trainer(config, folder, task, made_from)
    module = FineTune(
        model,
        task,
        build(config.finetune.optimizer),
        {**plain(config.finetune), "lr_ratio": config.adapter.get("lr_ratio") or 1.0},
        int(config.seed),
    )
    if trainer.logger is not None:
        trainer.logger.log_hyperparams(plain(made_from))
    started = time.perf_counter()
    last = folder / "last.ckpt"
    if config.force:
        last.unlink(missing_ok=True)
    if last.exists():
        console.print(f"going on from {last}", soft_wrap=True)
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None, weights_only=False)
    seconds = time.perf_counter() - started

    best_state = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    module.load_state_dict(best_state, strict=False)
    data.setup("test")
    validation = trainer.validate(module, datamodule=data, verbose=False)[0]
    tested = trainer.test(module, datamodule=data, verbose=False)[0]
    payload = {
        **validation,
        **tested,
        **counts,
        "seconds": seconds,
        "epochs": trainer.current_epoch,
        "metric": task.metric_name,
        "task": task.to_dict(),
        "backbone": backbone,
        "adapter_module": _rebuilt(adapter) if adapter is not None else None,
    }
    if torch.cuda.is_available():
        payload["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    _write_model(folder, model, plan, task)
    # Last of all: its presence means done.
    write_json(folder / "metrics.json", payload, config=made_from, inputs=_inputs(config, plan))
    close_logger(trainer)
    Path(best.best_model_path).unlink()
    name = f"test/{task.metric_name}"
    console.print(f"{name} {tested[name]:.4f} ({task.metric_unit}); written to {folder}", soft_wrap=True)


def _trainer(config: DictConfig, folder: Path, task: Task, made_from: Any) -> tuple[L.Trainer, ModelCheckpoint]:
    monitor = f"val/{task.metric_name}"
    mark = folder / "options.json"
    changed = sorted(differences(json.loads(mark.read_text()), plain(made_from))) if mark.exists() else []
    if changed and not config.force:
        raise ValueError(
            f"{folder} holds an unfinished run with other options ({'; '.join(changed[:6])}): choose another "
            f"finetune.tag, or force=true"
        )
    with atomic(mark) as temporary:
        temporary.write_text(json.dumps(plain(made_from), default=str))
    saving = {"enable_version_counter": False, "save_on_train_epoch_end": True}
    best = ModelCheckpoint(folder, "best", monitor=monitor, mode="min", **saving)
    callbacks: list[Callback] = [Curve(folder / "curve.csv"), best, ModelCheckpoint(folder, "last", **saving)]
    if config.finetune.patience is not None:
        callbacks.append(EarlyStopping(monitor, patience=config.finetune.patience, mode="min"))
    trainer = build(
        config.trainer,
        max_epochs=config.finetune.epochs,
        accumulate_grad_batches=config.finetune.accumulate,
        gradient_clip_val=config.finetune.clip,
        default_root_dir=str(folder),
        callbacks=callbacks,
        logger=build(config.logger, save_dir=str(folder / "log")) if config.logger else False,
    )
    return trainer, best


def _write_model(folder: Path, model: OrcaModel, plan: RankPlan | None, task: Task) -> None:
    """The plan used, the adapter in PEFT's layout where it has one, and everything that was trained in our own."""
    tensors = trained_tensors(model)
    tensors |= {name: value for name, value in model.state_dict().items() if not name.startswith("body.")}
    if plan is not None:
        scales = {name: adapter.scale for name, adapter in adapters.adapters(model.body).items()}
        write_json(folder / "ranks.json", {**plan.to_dict(), "scales": scales})
        try:
            adapters.save_peft(model.body, folder / "adapter")
        except adapters.NotExpressible as error:
            console.print(f"no adapter/ in PEFT's layout: {error}", markup=False)
    if task.normaliser is not None:
        tensors |= {"normaliser.mean": task.normaliser.mean, "normaliser.std": task.normaliser.std}
    write_tensors(folder / "model.safetensors", tensors)


def _inputs(config: DictConfig, plan: RankPlan | None) -> list[Path]:
    """The files of earlier stages that the result depends on."""
    inputs = [aligned_embedder(config)] if config.embedder.aligned else []
    measured = stage_folder(config, "measure") / "layers.json"
    if plan is not None and plan.measurement:
        inputs.append(measured)
    return inputs


def _rebuilt(module: dict[str, Any]) -> dict[str, Any]:
    """The adapter's module config for loading: its first values do not matter, so no directions need to be at hand."""
    module = {name: value for name, value in module.items() if name != "directions"}
    return {**module, "init": "kaiming"} if module.get("init") == "directions" else module


def finetune_config(config: DictConfig) -> Mapping[str, Any]:
    """The sections that a fine-tuned model depends on."""
    sections = ["data", "layers", *MODEL_SECTIONS, "predictor", "adapter", "finetune", "trainer"]
    if config.embedder.aligned:
        sections += ["source", "align"]
    if config.adapter.method == "inject":
        sections += ["rank", "budget"]
    return select(config, *sections)
