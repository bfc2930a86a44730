"""The memory that aligning, measuring and training take on a file that is larger than they may be.

    python benchmarks/large.py --gib 6 --kind h5         x of 3 × 64 × 64 and a field y of 64 × 64, 5 : 1 for y = 1 GiB
    python benchmarks/large.py --gib 6 --kind zarr npy

The file is written to a temporary folder and deleted afterwards: random images, every block the first one shifted
by a number. Each stage is a process of its own; "resident" is the most memory that it had at once (ru_maxrss), which
holds torch and the model too, "read" what it read from files in all, in shares of the file.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np

REPO = Path(__file__).parents[1]
SIDE, BLOCK = 64, 512
OPTIONS = (
    *("data=arrays", "data.channels=first", "data.test_limit=64", "data.batch_size=32", "predictor=multiscale"),
    *("backbone=swin_micro", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "threads=1"),
    *("+trainer.limit_train_batches=10", "+trainer.limit_val_batches=2", "gap.samples=128"),
)
STAGES = {
    "align": ("align.epochs=2", "align.held_out.samples=128"),
    "measure": (),
    "finetune": ("finetune.epochs=1", "finetune.warmup_epochs=0", "rank.r=2"),
}


def blocks(count: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Rows of x (k, 3, SIDE, SIDE) and y (k, SIDE, SIDE)."""
    images = np.random.default_rng(0).standard_normal((BLOCK, 3, SIDE, SIDE), np.float32)
    fields = 2 + images.mean(1)
    for number, start in enumerate(range(0, count, BLOCK)):
        rows = slice(start, min(start + BLOCK, count))
        size = rows.stop - rows.start
        yield rows, images[:size] + np.float32(1e-3 * number), fields[:size] + np.float32(1e-3 * number)


def write(folder: Path, kind: str, count: int) -> str:
    """A file of so many samples, and what data.train is set to."""
    shapes = {"x": (count, 3, SIDE, SIDE), "y": (count, SIDE, SIDE)}
    made: dict[str, Any] = {}
    with ExitStack() as stack:
        if kind == "h5":
            file = stack.enter_context(h5py.File(folder / "large.h5", "w"))
            made = {n: file.create_dataset(n, s, np.float32, chunks=(32, *s[1:])) for n, s in shapes.items()}
        elif kind == "zarr":
            import zarr

            group = zarr.open_group(folder / "large.zarr", mode="w")
            made = {
                n: group.create_array(n, shape=s, dtype=np.float32, chunks=(32, *s[1:]), compressors=None)
                for n, s in shapes.items()
            }
        else:
            made = {n: np.lib.format.open_memmap(folder / f"{n}.npy", "w+", np.float32, s) for n, s in shapes.items()}
        for rows, x, y in blocks(count):
            made["x"][rows], made["y"][rows] = x, y
    return "[x.npy,y.npy]" if kind == "npy" else f"large.{kind}"


def run(folder: Path, words: list[str]) -> tuple[int, float, float, int]:
    """Status, CPU seconds, wall seconds and the most resident bytes of a command."""
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    counted = (
        "import atexit, runpy, sys\n"
        "def say():\n"
        "    lines = dict(line.split(': ') for line in open('/proc/self/io').read().splitlines())\n"
        f"    open({str(folder / 'read')!r}, 'w').write(lines['rchar'])\n"
        "atexit.register(say)\n"
        "runpy.run_module('orca_rank', run_name='__main__', alter_sys=True)\n"
    )
    process = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", counted, *words],
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 1, str(folder / "output.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        ],
    )
    _, status, used = os.wait4(process, 0)
    return status, used.ru_utime + used.ru_stime, time.monotonic() - began, used.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=6.0, help="size of the file")
    parser.add_argument("--kind", nargs="+", default=["h5"], choices=("h5", "npy", "zarr"))
    arguments = parser.parse_args()
    count = math.ceil(arguments.gib * 2**30 / (4 * 4 * SIDE**2))
    print(f"{count} samples, {arguments.gib:g} GiB")
    print(f"{'file':5} {'stage':9} {'resident MiB':>12} {'read':>6} {'CPU s':>7} {'wall s':>7}")
    for kind in arguments.kind:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            place = write(folder, kind, count)
            for stage, more in STAGES.items():
                places = [f"paths.data={folder}", f"paths.runs={folder / 'runs'}", f"paths.cache={folder / 'cache'}"]
                words = [f"stage={stage}", *places, *OPTIONS, f"data.train={place}", *more]
                status, cpu, wall, resident = run(folder, words)
                if status:
                    sys.exit(f"{kind} {stage} failed:\n{(folder / 'output.txt').read_text()[-3000:]}")
                share = int((folder / "read").read_text()) / (arguments.gib * 2**30)
                print(f"{kind:5} {stage:9} {resident / 2**20:12.0f} {share:6.2f} {cpu:7.0f} {wall:7.0f}", flush=True)


if __name__ == "__main__":
    main()
