"""stage=finetune: train the model with the ranks of the plan, test the best epoch, keep what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from orca_rank.adapters import Steps
from orca_rank.artifacts.files import input_hashes, write_json, write_tensors
from orca_rank.artifacts.provenance import finished, key, plain, select
from orca_rank.artifacts.unfinished import begin, finish, tidy
from orca_rank.build import build, targets
from orca_rank.data.module import InMemory
from orca_rank.data.shares import share
from orca_rank.options import number, one_of, read
from orca_rank.processes import agreed, first, first_alone, world
from orca_rank.ranks import RankPlan
from orca_rank.stages.adapted import adapted_model
from orca_rank.stages.continued import go_on_from
from orca_rank.stages.curriculum import check_source, labelled_source, make_curriculum
from orca_rank.stages.planning import budget_of
from orca_rank.stages.setup import (
    MODEL_SECTIONS,
    aligned_embedder,
    check,
    contents,
    held,
    ready,
    resolve_backbone,
    seed_everything,
    stage_folder,
)
from orca_rank.stages.tracking import job_of, predictions_of, show_in
from orca_rank.stages.trainable import (
    DIRECTIONS,
    METHODS,
    TAKEN,
    count_parameters,
    in_words,
    rebuilt,
)
from orca_rank.stages.trainer import callbacks_of, check_optimizer, logged, trainer_for
from orca_rank.stages.updates import update_of
from orca_rank.stages.written import scale_in_use, write_model
from orca_rank.tracking.pages import finetune_page
from orca_rank.training.compiled import Trial, compiled
from orca_rank.training.curve import Curve, Rates
from orca_rank.training.finetune import FineTune, FinetuneOptions, average_of, trained_tensors
from orca_rank.training.keep import Keep, checkpoint_of, fit, interrupts
from orca_rank.training.prefix import FrozenPrefix

console = Console(markup=False)
RESULTS = (
    "metrics.json",
    "curve.csv",
    "ranks.json",
    "model.safetensors",
    "update.safetensors",
    "adapter",
    "rank_losses.safetensors",
    "rank_curve.csv",
    "rank_curve.png",
    "log",
)


def tag(config: DictConfig) -> str:
    """The folder of a fine-tune: finetune.tag, or adapter, rule, seed and a hash of every option it depends on.

    Raises:
        ValueError: for a tag that is not the name of one folder.
    """
    chosen = config.finetune.tag
    if chosen is not None:
        if not str(chosen) or Path(str(chosen)).name != str(chosen) or str(chosen) == "..":
            raise ValueError(f"finetune.tag={chosen}: expected the name of one folder, without / or ..")
        return str(chosen)
    parts = [config.adapter.name]
    if config.adapter.method == "inject":
        rank = plain(config.rank)
        parts.append(rank["_target_"].rpartition(".")[2] + (f"-r{rank['r']}" if rank.get("r") is not None else ""))
    return "-".join([*parts, f"s{config.seed}", key(finetune_config(config))[:6]])


def check_options(config: DictConfig) -> FinetuneOptions:
    """The options of this stage, checked.

    Raises:
        ValueError: for a value that means nothing.
    """
    check(config)
    tag(config)
    values = plain(config.finetune)
    check_optimizer(values.pop("optimizer"), "finetune.optimizer")
    values.pop("tag")
    _source(config)
    values.pop("from")
    number("adapter.lr_ratio", config.adapter.get("lr_ratio"), above=0, null=True)
    module = config.adapter.get("module") or {}
    if "alpha" in module:
        number("adapter.module.alpha", module["alpha"], above=0)
    if "dropout" in module:
        number("adapter.module.dropout", module["dropout"], least=0, below=1)
    one_of("adapter.method", config.adapter.method, METHODS)
    if config.adapter.method == "inject":
        budget_of(config.budget)
    check_source(config)
    return read(FinetuneOptions, values, "finetune")


def run(config: DictConfig) -> None:
    """Fine-tune as configured and write finetune/<tag>/.

    Raises:
        ValueError: a bad option or plan, a frozen fresh predictor. FloatingPointError: a loss that is not finite.
            FileNotFoundError: an earlier stage is missing. BlockingIOError: another process is at work in the folder.
    """
    options = check_options(config)
    folder = stage_folder(config, "finetune") / tag(config)
    lends = () if options.curriculum is None else ("source",)
    made_from = {**finetune_config(config), "contents": contents(config, "data", "backbone", "rank", *lends)}

    def done() -> bool:
        return agreed(
            lambda: finished(folder / "metrics.json", made_from, force=config.force, made_by="stage=finetune")
        )

    if not done():
        with held(folder):
            if not done():
                _finetune(config, options, folder, made_from)
                return
    if first():
        tidy(folder)
    console.print(f"finetune is done: {folder / 'metrics.json'} (force=true redoes it)", soft_wrap=True)


def _finetune(config: DictConfig, options: FinetuneOptions, folder: Path, made_from: Mapping[str, Any]) -> None:
    seed_everything(config.seed)
    rank, size, _ = world()
    shared = partial(share, rank=rank, size=size)
    with first_alone():
        data = ready(config.data)
        lent = labelled_source(config)
    task = data.task
    adapted = adapted_model(config, task)
    model, layers, plan, adapter = adapted.model, adapted.layers, adapted.plan, adapted.adapter
    weights, injected = adapted.weights, plan is not None
    if (source := _source(config)) is not None:
        go_on_from(model, source, task, weights, targets(config))
    update = update_of(model.body, layers, injected) if options.keep_update else None
    curriculum = make_curriculum(lent, options, model, task, int(config.seed))
    counts = count_parameters(model, injected, curriculum)
    if plan is not None:
        count = sum(rank > 0 for rank in plan.ranks.values())
        console.print(
            f"{config.adapter.name}: {count} of {len(plan.ranks)} layers adapted, rule {plan.rule or 'given'}"
        )
    console.print(in_words(counts))

    inputs = input_hashes(folder, _inputs(config, plan, adapter))
    made_of = {**inputs, "backbone": weights}
    begun = agreed(lambda: begin(folder, made_from, made_of, force=config.force, results=RESULTS))
    monitor = f"val/{task.metric_name}"

    def changed() -> dict[str, Tensor]:
        return trained_tensors(model)

    average = None if options.ema is None else average_of(model, options.ema)
    kept = changed if average is None else lambda: average.values
    steps = Steps(model.body)
    keep = Keep(folder, monitor, patience=options.patience, tensors=kept, counts=lambda: steps.settled)
    ours: list[Callback] = [] if average is None else [average]
    if options.compile is not None:
        ours.append(Trial(task.input_shape, options.compile))
    elif isinstance(data, InMemory) and data.parts.augment is None and curriculum is None and options.cache:
        ours.append(FrozenPrefix([partial(data.loader, "train"), data.val_dataloader], options.cache, console.print))
    trainer = trainer_for(
        config.trainer,
        config.logger,
        folder,
        [*ours, *callbacks_of(config), Rates(), Curve(folder / "curve.csv"), keep],
        job_of(config, "finetune", folder, folder.name),
        max_epochs=options.epochs,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.clip,
    )
    optimizer, ratio = build(config.finetune.optimizer), config.adapter.get("lr_ratio") or 1.0
    module = FineTune(model, task, optimizer, options, int(config.seed), ratio, curriculum)
    with logged(trainer, made_from), compiled(model.body, options.compile):
        fit(
            trainer,
            module,
            agreed(lambda: checkpoint_of(folder)) if begun else None,
            train_dataloaders=shared(data.train_dataloader()),
            val_dataloaders=shared(data.val_dataloader()),
        )
        if not keep.best:
            raise FloatingPointError(f"{monitor} was not finite after any epoch: lower finetune.optimizer.lr")
        epochs = trainer.current_epoch
        model.load_state_dict(keep.best, strict=False)
        data.setup("test")
        with interrupts():
            validation = trainer.validate(module, shared(data.val_dataloader()), verbose=False)[0]
            tested = trainer.test(module, shared(data.test_dataloader()), verbose=False)[0]
        payload = {
            **validation,
            **tested,
            **counts,
            "seconds": keep.seconds,
            "epochs": epochs,
            "adapter_scale": scale_in_use(model.body),
            "metric": task.metric_name,
            "task": task.to_dict(),
            "backbone": {"config": resolve_backbone(config), "hash": weights},
            "adapter_module": rebuilt(adapter) if adapter is not None else None,
        }
        if torch.cuda.is_available():
            payload["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        if first():
            write_model(folder, model, plan, task, data.statistics if isinstance(data, InMemory) else {})
            if update is not None:
                write_tensors(folder / "update.safetensors", update())
            # Last of all: its presence means done.
            write_json(folder / "metrics.json", payload, config=made_from, inputs=inputs)
            finish(folder)
        show_in(trainer, lambda: finetune_page(folder, layers, predictions_of(folder, task, data, targets(config))))
    name = f"test/{task.metric_name}"
    console.print(f"{name} {tested[name]:.4f} ({task.metric_unit}); written to {folder}", soft_wrap=True)


def _source(config: DictConfig) -> Path | None:
    """The folder of the fine-tune that finetune.from names.

    Raises:
        ValueError: if it is this one's, or this one has no adapters to go on with.
    """
    name = config.finetune["from"]
    if name is None:
        return None
    folder = stage_folder(config, "finetune") / str(name)
    if config.adapter.method != "inject" or folder.name != str(name) or str(name) == str(config.finetune.tag):
        raise ValueError(
            f"finetune.from={name}: expected the folder of another fine-tune of this run, and adapter=lora to go on "
            f"with"
        )
    return folder


def _inputs(config: DictConfig, plan: RankPlan | None, adapter: Mapping[str, Any] | None) -> list[Path]:
    """The files of earlier stages that the result depends on."""
    inputs = [aligned_embedder(config)] if config.embedder.aligned else []
    if (source := _source(config)) is not None:
        inputs += [source / "metrics.json", source / "model.safetensors"]
    measured = stage_folder(config, "measure")
    module = config.adapter.get("module") or {}
    if module.get("concentration") == "gaps" or (plan is not None and plan.measurement):
        inputs.append(measured / "layers.json")
    if module.get("blocks") == "gradient" or (adapter and not adapter.keys().isdisjoint(TAKEN)):
        inputs.append(measured / DIRECTIONS)
    return inputs


def finetune_config(config: DictConfig) -> Mapping[str, Any]:
    """The sections that a fine-tuned model depends on."""
    sections = ["data", "layers", *MODEL_SECTIONS, "predictor", "adapter", "finetune", "trainer"]
    if config.embedder.aligned:
        sections += ["source", "align"]
    elif config.finetune.curriculum is not None:
        sections.append("source")
    if config.adapter.method == "inject":
        sections += ["rank", "budget"]
    if config.callbacks:
        sections.append("callbacks")
    return select(config, *sections)
