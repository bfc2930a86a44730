"""One job of a command line: the configured stage, in the processes that its trainer's options ask for."""

from __future__ import annotations

import contextlib
import gc
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from orca_rank import launch
from orca_rank.artifacts.command import remember
from orca_rank.build import build
from orca_rank.errors import foreseen
from orca_rank.stages.chain import TOGETHER, check_points

BUG = (
    "error: nobody foresaw this one, so it is a bug: in orca_rank, or in code of yours that the config names.\n"
    "Please report it with the lines above and what `python -m orca_rank stage=doctor` prints."
)


def run(config: DictConfig, options: list[str], flags: list[str]) -> None:
    """Run the stage in as many processes as the trainer's options ask for, if it trains in several: in those that
    torchrun or srun started, or else in new ones of this machine.

    Raises:
        ValueError: if the options and the processes that were started differ.
    """
    trainer = config.trainer
    wanted = 1
    if (str(trainer.get("devices", 1)), trainer.get("num_nodes", 1)) != ("1", 1):
        from orca_rank.stages.trainer import processes_of  # here, because torch takes seconds

        wanted = processes_of(trainer)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        wanted = 0 if launch.outside() > 1 else 1
    there = launch.outside() if wanted > 1 else 1
    if config.stage["_target_"] not in [f"orca_rank.stages.{name}.run" for name in (*TOGETHER, "chain")]:
        if there == 1 or os.environ["RANK"] == "0":
            _work(config, options, flags)
    elif wanted == 1:
        _work(config, options, flags)
    elif wanted == 0 or there not in (1, wanted):
        raise ValueError(
            f"{launch.outside()} processes were started, trainer.devices={trainer.get('devices', 1)} "
            f"trainer.num_nodes={trainer.get('num_nodes', 1)} asks for {max(1, wanted)}: set trainer=ddp, "
            f"trainer.devices to the processes of each machine and trainer.num_nodes to the machines"
        )
    elif there == wanted:
        _member(config, options, flags)
    elif trainer.get("num_nodes", 1) != 1:
        raise ValueError(
            f"trainer.num_nodes={trainer.num_nodes}: start the processes of several machines with torchrun or srun, "
            f"each with this command"
        )
    else:
        plain = OmegaConf.to_container(
            config, resolve=True
        )  # resolved once: a time or a random name is the same for all
        threads = max(1, len(os.sched_getaffinity(0)) // wanted) if hasattr(os, "sched_getaffinity") else 1
        launch.start(wanted, _member, (plain, options, flags), words, threads)


def _member(config: Any, options: list[str], flags: list[str]) -> None:
    """The stage in one process of several; config may be plain values."""
    from orca_rank.stages.trainer import backend_of, device_number

    config = OmegaConf.create(config)
    OmegaConf.set_struct(config, True)
    launch.take_part(backend_of(config.trainer), device_number(config.trainer, int(os.environ["LOCAL_RANK"])))
    _work(config, options, flags)


def _work(config: DictConfig, options: list[str], flags: list[str]) -> None:
    remember(options, flags)
    with _imports():
        stage = build(config.stage)
        _limit(config.threads)
    stage(config)


def check(config: DictConfig) -> None:
    """Refuse values of the top-level options that no stage could work with, and sweeps of a stage that could not end.

    Raises:
        ValueError: saying which option, what was received and what is expected.
    """
    check_points([str(config.stage["_target_"]).removesuffix(".run").rpartition(".")[2]])
    run = Path(str(config.run))
    if config.run is None or not run.parts or run.is_absolute() or ".." in run.parts:
        raise ValueError(f"run must be a name, or a path below paths.runs, received {config.run!r}")
    for name, folder in config.paths.items():
        if not isinstance(folder, str) or not folder:
            raise ValueError(f"paths.{name} must be a folder, received {folder!r}")
    if config.threads is not None and not (type(config.threads) is int and config.threads >= 1):
        raise ValueError(f"threads must be null or a whole number of at least 1, received {config.threads!r}")
    if not (type(config.seed) is int and 0 <= config.seed < 2**32):
        raise ValueError(f"seed must be a whole number from 0 to {2**32 - 1}, received {config.seed!r}")
    if not isinstance(config.force, bool):
        raise ValueError(f"force must be true or false, received {config.force!r}")


@contextlib.contextmanager
def _imports() -> Iterator[None]:
    """No garbage collection while a million objects that stay are made: a seventh less time for importing them."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _limit(threads: int | None) -> None:
    if threads is not None:
        import torch
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads)
        torch.set_num_threads(threads)


def words(error: Exception) -> tuple[str, str, bool]:
    """An error's message in one piece, the text to print, and whether the user can mend it."""
    if isinstance(error, launch.ProcessFailed):
        return str(error), error.text, True
    message = foreseen(error)
    trace = "".join(traceback.format_exception(error))
    if message is None:
        return f"{type(error).__name__}: {error}", f"{trace}\n{BUG}", False
    shown = trace if os.environ.get("ORCA_RANK_TRACEBACK") else ""
    return message, f"{shown}error: {message}\n(ORCA_RANK_TRACEBACK=1 shows where)", True
