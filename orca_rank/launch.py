"""Starting the processes of a run, one for every device, and ending them all when one ends badly."""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from orca_rank.processes import join, leave, world

GRACE = 10.0  # seconds that processes have to let go of what they hold before they are killed
Report = Callable[[Exception], tuple[str, str, bool]]


class ProcessFailed(Exception):
    """One process of several ended badly; the others are ended too.

    Args:
        message: its error in one sentence. text: what a single process would have printed.
    """

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text


def outside() -> int:
    """How many processes of this run were started by torchrun or srun, this one among them; 1 where none were.

    What srun says of them is put into torchrun's variables, which everything else reads.
    """
    environment = os.environ
    if "RANK" not in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", "127.0.0.1"))
        environment.update(
            RANK=environment["SLURM_PROCID"],
            WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
            LOCAL_RANK=environment["SLURM_LOCALID"],
            GROUP_RANK=environment.get("SLURM_NODEID", "0"),
        )
        environment.setdefault("MASTER_ADDR", _first_node(nodes))
        # Steps of one job may run beside each other.
        job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        environment.setdefault("MASTER_PORT", str(15000 + (7 * job + step) % 10000))
    return int(environment["WORLD_SIZE"]) if "RANK" in environment and "WORLD_SIZE" in environment else 1


def _first_node(nodes: str) -> str:
    """The first name in a list as SLURM writes it: gpu[03-05,9],login -> gpu03."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def take_part(backend: str, device: int | None) -> None:
    """Be one of the processes of a run from now on; all but the first are silent.

    Args:
        backend: see `processes.join`. device: number of the GPU of this process; None without one.
    """
    if world().size > 1:  # since an earlier job of the same sweep
        return
    if device is not None:
        import torch

        torch.cuda.set_device(device)
    join(backend)
    atexit.register(leave)
    if world().rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        logging.disable(logging.ERROR)
        warnings.simplefilter("ignore")


def start(size: int, work: Callable[..., None], arguments: tuple[Any, ...], report: Report, threads: int) -> None:
    """Run work(*arguments) in `size` new processes of this machine, in which `outside` gives `size`, and wait.

    Args:
        work: importable. report: an exception's message in one sentence, the text to print, and whether the user can
            mend it. threads: of a process, unless OMP_NUM_THREADS says so.

    Raises:
        ProcessFailed: if one of them ends badly, once all have ended.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    common |= {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}  # hints that nobody can act on
    ends, processes = [], []
    try:
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
            process = context.Process(target=_one, args=(own, work, arguments, report, sender), name=f"process {rank}")
            process.start()
            sender.close()
            ends.append(receiver)
            processes.append(process)
        running = [process.sentinel for process in processes]
        while running:
            wait(running)
            running = [process.sentinel for process in processes if process.exitcode is None]
            if any(process.exitcode for process in processes):
                time.sleep(1.0)  # the others notice, and it may have been one of them that was first
                raise _failure(processes, ends)
    finally:
        _end(processes)


def _one(own: dict[str, str], work: Callable, arguments: tuple[Any, ...], report: Report, sender: Any) -> None:
    """The life of one process."""
    os.environ.update(own)  # before anything reads it
    for name in ("SIGINT", "SIGHUP"):  # Ctrl-C and a closed terminal reach all; who started this one sees to it
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    try:
        work(*arguments)
    except Exception as error:
        sender.send(report(error))
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is held any more


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)  # whoever should look after this process is gone


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _failure(processes: Sequence[BaseProcess], ends: list[Any]) -> ProcessFailed:
    """What went wrong first, as far as can be told: a process that was killed, what the user can mend, or else a bug;
    that the others lost their connection follows from it."""
    for process in processes:
        if (process.exitcode or 0) < 0:
            name = signal.Signals(-(process.exitcode or 0)).name
            message = f"{process.name} of {len(processes)} was ended by {name}, and the others with it"
            return ProcessFailed(message, f"error: {message}; the same command goes on from the last checkpoint")
    if reports := sorted(filter(None, map(_report, ends)), key=lambda one: not one[2]):
        return ProcessFailed(*reports[0][:2])
    found = {process.name: process.exitcode for process in processes if process.exitcode}
    message = f"processes ended without a word, with status {found}"
    return ProcessFailed(message, f"error: {message}")


def _report(end: Any) -> tuple[str, str, bool] | None:
    with contextlib.suppress(OSError, EOFError):
        return end.recv() if end.poll() else None
    return None


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.exitcode is None:
            process.terminate()
    limit = time.monotonic() + GRACE
    for process in processes:
        process.join(max(0.0, limit - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
