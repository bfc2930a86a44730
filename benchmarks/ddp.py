"""Throughput of stage=finetune in several processes of this machine over that in one.

    python benchmarks/ddp.py                                        # two processes on the CPU, one thread each
    python benchmarks/ddp.py --processes 2 --accelerator gpu data.batch_size=128 backbone=swin_tiny
    python benchmarks/ddp.py --rounds 1 --epochs 3 data.train=64    # only to see that it works

The commands that a user types, alternated: the same global batch, and the seconds of training (with validation, without
the start of the processes) that the run itself writes down. Further arguments are options of both commands. A ratio is
claimed only where each process has a core or a GPU of its own and nothing else ran; it is printed with the processor.
Virtual machines may show two threads of one core as two cores: `lscpu` on the host knows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from _machine import machine

OPTIONS = ("stage=finetune", "data=darcy_small", "embedder.aligned=false", "trainer.enable_progress_bar=false")


def cores() -> int:
    """Physical cores that this process may use: two threads of one core count once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    found = set()
    for cpu in allowed:
        try:
            found.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            found.add(str(cpu))
    return len(found)


def seconds(processes: int, arguments: argparse.Namespace, folder: Path, number: int) -> float:
    """Of training, an epoch."""
    options = [*OPTIONS, f"finetune.epochs={arguments.epochs}", f"trainer.accelerator={arguments.accelerator}"]
    options += [f"threads={arguments.threads}", f"paths.runs={folder}", f"paths.cache={folder / 'cache'}"]
    options += ["trainer=ddp" if processes > 1 else "trainer=default", f"trainer.devices={processes}"]
    run = f"p{processes}-{number}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(arguments.threads)}
    command = [sys.executable, "-m", "orca_rank", *options, f"run={run}", "finetune.tag=x", *arguments.options]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / run / "finetune" / "x" / "metrics.json").read_text())["seconds"] / arguments.epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    arguments, arguments.options = parser.parse_known_args()
    load = os.getloadavg()[0]
    places = torch.cuda.device_count() if arguments.accelerator == "gpu" else cores() // arguments.threads
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(arguments.rounds):
            order = [1, arguments.processes][:: 1 if number % 2 == 0 else -1]
            found = {n: seconds(n, arguments, Path(name), number) for n in order}
            ratios.append(found[1] / found[arguments.processes])
            print(
                f"round {number + 1}: {found[1]:.2f} s an epoch in one process, {found[arguments.processes]:.2f} in "
                f"{arguments.processes}; throughput × {ratios[-1]:.2f}",
                flush=True,
            )
    print(machine(arguments.threads) if arguments.accelerator == "cpu" else torch.cuda.get_device_name())
    if load > 0.5:
        print(f"no claim: other work ran on this machine (load {load:.1f} at the start)")
    elif places < arguments.processes:
        what = "GPUs" if arguments.accelerator == "gpu" else f"times {arguments.threads} physical core(s)"
        print(f"no claim: {arguments.processes} processes, and {places} {what} for them")
    else:
        low, high = min(ratios), max(ratios)
        print(f"{arguments.processes} processes over one: × {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
