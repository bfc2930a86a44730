"""The Trainer and the optimiser as options give them: checked before any work, and built for a stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import ListConfig
from torch import nn

from orca_rank.artifacts.provenance import plain
from orca_rank.build import build, check_kinds, plain_options
from orca_rank.options import number
from orca_rank.processes import world
from orca_rank.tracking.page import Job

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.callbacks import Callback

# What a stage tells the Trainer itself, and the option that says it.
OWN = {
    "max_epochs": "finetune.epochs or align.epochs",
    "accumulate_grad_batches": "finetune.accumulate",
    "gradient_clip_val": "finetune.clip",
    "logger": "logger=csv, wandb, tensorboard or mlflow",
    "callbacks": "callbacks.<name>, a group of its own",
    "default_root_dir": "paths.runs",
    "reload_dataloaders_every_n_epochs": "nothing: the stage needs it",
}


# The strategies whose processes hold the whole model each and average gradients.
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Raise a ValueError for options that Lightning refuses, that a stage sets itself, or for more processes than are
    there."""
    from lightning.pytorch import Trainer  # here, because it takes seconds
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    for name, instead in OWN.items():
        if name in trainer:
            raise ValueError(f"trainer.{name} is set by the stage: use {instead}")
    _check_processes(trainer)
    try:
        check_kinds(Trainer, plain_options(trainer), ours=False)
        build(trainer, logger=False, enable_checkpointing=False, **_several(trainer))
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise ValueError(f"trainer: {error}") from error


def _check_processes(trainer: Mapping[str, Any]) -> None:
    wanted, there = processes_of(trainer), world().size
    if wanted == there == 1:
        return
    said = f"trainer.devices={trainer.get('devices', 1)} trainer.num_nodes={trainer.get('num_nodes', 1)}"
    if wanted != there:
        raise ValueError(
            f"{said} asks for {wanted} processes, and this is one of {there}: `python -m orca_rank` starts the "
            f"processes of one machine for stage=align, measure, finetune and all, torchrun or srun those of several; "
            f"other stages and Python code train in one, with trainer.devices=1 trainer.num_nodes=1"
        )
    strategy = trainer.get("strategy", "auto")
    name = strategy if isinstance(strategy, str) else strategy.get("_target_", "")
    known = name in STRATEGIES if isinstance(strategy, str) else name.endswith(".DDPStrategy")
    if not known:
        raise ValueError(
            f"trainer.strategy={name}: expected {', '.join(STRATEGIES)}, or the options of a "
            f"lightning.pytorch.strategies.DDPStrategy"
        )


def processes_of(trainer: Mapping[str, Any]) -> int:
    """How many processes a trainer's options ask for: its devices on every node.

    Raises:
        ValueError: for devices that are no number or list of them.
    """
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if isinstance(devices, list | ListConfig):
        each = len(devices)
    elif str(devices) in ("auto", "-1"):
        each = max(1, gpus(trainer))
    else:
        text = str(devices)
        each = len([part for part in text.split(",") if part]) if "," in text else int(text) if text.isdigit() else 0
    if each < 1 or type(nodes) is not int or nodes < 1:
        raise ValueError(
            f"trainer.devices={devices} trainer.num_nodes={nodes}: expected whole numbers of at least 1; devices may "
            f"also be auto or a list of GPUs, such as [0,1]"
        )
    return each * nodes


def backend_of(trainer: Mapping[str, Any]) -> str:
    """What the processes of a run talk through: strategy.process_group_backend, else NCCL between GPUs and gloo."""
    strategy = trainer.get("strategy", "auto")
    chosen = None if isinstance(strategy, str) else strategy.get("process_group_backend")
    return str(chosen or ("cpu:gloo,cuda:nccl" if gpus(trainer) else "gloo"))


def device_number(trainer: Mapping[str, Any], local_rank: int) -> int | None:
    """The GPU of a machine's process 0, 1, …; None where they have none."""
    if not gpus(trainer):
        return None
    devices = trainer.get("devices", 1)
    return int(devices[local_rank]) if isinstance(devices, list | ListConfig) else local_rank


def _several(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What the Trainer of one process of several is told beside its options."""
    from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    from orca_rank.training.packed import PackedIO

    several = world().size > 1
    options: dict[str, Any] = {}
    if "plugins" not in trainer:
        options["plugins"] = [TorchElasticEnvironment() if several else LightningEnvironment(), PackedIO()]
    if several:
        options["use_distributed_sampler"] = False  # loaders are shared by `data.shares`, exactly
        if trainer.get("strategy", "auto") == "auto":
            options["strategy"] = "ddp_find_unused_parameters_true"
    return options


def gpus(trainer: Mapping[str, Any]) -> int:
    """How many GPUs devices=auto would take."""
    return 0 if trainer.get("accelerator", "auto") == "cpu" else torch.cuda.device_count()


def check_optimizer(node: Any, name: str) -> None:
    """Raise a ValueError for an optimiser, named so in messages, that cannot be made with its options."""
    options = plain(node)
    number(f"{name}.lr", options.get("lr"), above=0)
    try:
        build(node)([nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error


def trainer_for(
    trainer: Any, logger: Any, folder: Path, callbacks: list[Callback], job: Job | None = None, **options: Any
) -> L.Trainer:
    """Lightning's Trainer for a stage, in this process of the run's: its logger in the stage's folder, no checkpoints
    of its own.

    Args:
        job: what the logger is told of the stage, see `stages.tracking`.
    """
    from lightning.pytorch.callbacks import ProgressBar  # here, because lightning takes seconds

    from orca_rank.training.bar import Bar
    from orca_rank.training.forecast import Forecast

    wanted = trainer.get("enable_progress_bar", True) and not any(isinstance(one, ProgressBar) for one in callbacks)

    built = build(
        trainer,
        default_root_dir=str(folder),
        callbacks=[*callbacks, *([Bar()] if wanted else []), Forecast()],
        logger=logger_for(logger, folder, job) if logger else False,
        **options,
        **_several(trainer),
    )
    if world().size > 1:
        # Its handler of SIGTERM broadcasts in the middle of whatever the processes are at, and hangs; ours ends each.
        built._signal_connector.register_signal_handlers = lambda: None
    return built


def logger_for(logger: Any, folder: Path, job: Job | None) -> Any:
    """The configured logger in a stage's log folder; those of this package, wandb and mlflow, are told whose it is."""
    place = str(folder / "log")
    if not str(logger["_target_"]).startswith("orca_rank."):
        return build(logger, save_dir=place)
    return build(logger, save_dir=place, _partial_=True)(job=job)  # Hydra would make plain values of it


def check_logger(logger: Any) -> None:
    """Raise a ValueError for logger=tensorboard or mlflow without its package."""
    room, _, name = str(logger["_target_"]).rpartition(".") if logger else ("", "", "")
    if room == "orca_rank.training.loggers":
        from orca_rank.training.loggers import check_package  # here, because lightning takes seconds

        check_package(name)


def callbacks_of(config: Mapping[str, Any]) -> list[Callback]:
    """The callbacks of config.callbacks, the user's own.

    Raises:
        ValueError: for one that cannot be built, or is no Lightning callback.
    """
    from lightning.pytorch.callbacks import Callback

    found = []
    for name, node in config["callbacks"].items():
        built = build(node)
        if not isinstance(built, Callback):
            raise ValueError(f"callbacks.{name}: {node['_target_']} is no lightning.pytorch.callbacks.Callback")
        found.append(built)
    return found


def device_of(trainer: Mapping[str, Any]) -> torch.device:
    """Where a stage computes without a Trainer: the GPU, if there is one and trainer.accelerator allows it."""
    wanted = trainer.get("accelerator", "auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def trainer_options(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Where and how precisely pretraining computes: what a run's trainer says of it."""
    return {name: trainer[name] for name in ("accelerator", "precision") if name in trainer}


@contextlib.contextmanager
def logged(trainer: L.Trainer, made_from: Mapping[str, Any]) -> Iterator[None]:
    """Tell the loggers what a stage depends on, and end them with the block, as failed where it ends with an error: W&B
    would give an open run to the next job of a sweep, which shares the process."""
    failed = True
    try:
        for logger in trainer.loggers:
            logger.log_hyperparams(plain(made_from))
        yield
        failed = False
    finally:
        for logger in trainer.loggers:
            if (close := getattr(logger, "close", None)) is not None:
                close(failed)
            elif (finish := getattr(getattr(logger, "_experiment", None), "finish", None)) is not None:
                finish()
