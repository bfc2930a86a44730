"""What kills do to a run: every stage, and adapters of every kind, killed at random moments, gone on with, and compared
bit by bit with a run that nobody killed.

    python benchmarks/faults.py                        # at least 3 kills of every case
    python benchmarks/faults.py --kills 4 --only measure

SIGKILL comes at a random moment of a run's time or, every second time, right before or after a random one of its file
operations (os.replace, fsync, mkdir, unlink, rmdir), where a kill hurts most; a trial is killed again and again before
it is let through. Runs are forked from one process that has imported everything, so that the kills fall into the
work. "equal": every file that the run left is the same, but for what a clock says, and no checkpoint, lock or half-
written file is left. Exit status 1 if anything is not.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
from hydra import compose, initialize_config_dir

import orca_rank
from orca_rank.__main__ import CONF
from orca_rank.build import build

TINY = (
    "data=digits",
    "data.train_limit=48",
    "data.test_limit=16",
    "data.batch_size=8",
    "source=digits",
    "source.train_limit=32",
    "backbone=swin_demo",
    "backbone.pretrained=false",
    "backbone.options.embed_dim=8",
    "backbone.options.depths=[1,1]",
    "backbone.options.num_heads=[1,2]",
    "backbone.options.img_size=16",
    "budget.mean_rank=4",
    "predictor=linear",
    "align.epochs=4",
    "align.source_samples=16",
    "align.samples_per_class=4",
    "finetune.epochs=4",
    "gap.samples=16",
    "gap.bootstrap=4",
    "gap.permutations=9",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "threads=1",
    "run=run",
)
FIELDS = ("data=arrays", "data.train=fields.npz", "data.batch_size=8", "predictor=multiscale")
EVIDENCE = (
    "evidence=none",
    "+data@evidence.tasks.digits.data=digits",
    "evidence.tasks.digits.data.train_limit=24",
    "evidence.tasks.digits.data.test_limit=16",
    "evidence.tasks.digits.data.batch_size=8",
    "evidence.budgets=[1]",
    "evidence.gate=[1]",
    "evidence.seeds=2",
    "evidence.gate_seeds=2",
    "evidence.rates=[1e-3,3e-3]",
    "evidence.steps=0",
    "adapter.module.scaling=constant",
    "adapter.module.alpha=4",
    "gap.bootstrap=0",
    "gap.permutations=0",
    "finetune.epochs=1",
    "finetune.warmup_epochs=0",
)
UNALIGNED = "embedder.aligned=false"
SPECTRA = ("gap=spectra", "gap.samples=16", "gap.tokens=32", "gap.null_splits=2", "gap.sign_draws=2")
MEASURED = ("rank=proportional", "budget.mean_rank=2")
ADAPTERS = sorted(path.stem for path in (CONF / "adapter").glob("*.yaml"))
CURRICULA = sorted(path.stem for path in (CONF / "finetune" / "curriculum").glob("*.yaml"))
TUNED = {
    "elalora": ("adapter.module.every=2", "adapter.module.tinit=0"),  # so that ranks move in a run this short
    "adalora": ("adapter.module.target_r=1", "adapter.module.deltaT=1"),
    "block_diagonal": ("budget.mean_rank=2",),  # all that a block of these widths has
    "delta_lora": ("adapter.module.start=0.3",),
    "gora": ("gap=gora", "gap.samples=16"),
    "lora_directions": SPECTRA,
    "pare": ("finetune.curriculum.drawn=0.5",),
}
PRIORS = ("dylora_ibp", "gated_ibp", "gora", "lora_directions", "matryoshka_ibp")  # take something from stage=measure
CLOCKED = {"seconds", "seconds_this_time", "peak_memory_bytes"}  # what a clock or the allocator says
LEFT = (".part", ".ckpt", ".lock", "begun.json", "unfinished")  # nothing of these outlives a finished run
OPERATIONS = ("replace", "fsync", "mkdir", "unlink", "rmdir")


@dataclass(frozen=True)
class Case:
    """One command: its name and options beyond `TINY`, the commands that run before it and are not killed, and files in
    which seconds of the killed part are shown."""

    name: str
    options: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()
    shows_seconds: tuple[str, ...] = ()


def cases() -> list[Case]:
    """Every stage, and a spread of adapters: plain, gated, sampled, pruned, of PEFT, quantised, merged, whole."""
    align, measure = ("stage=align",), ("stage=measure",)
    dylora = ("stage=finetune", UNALIGNED, "adapter=dylora", "finetune.tag=one")
    recipe = "++backbone.recipe={epochs: 3, batch_size: 16, warmup_epochs: 0.5}"
    found = [
        Case("align", align),
        Case("align mmd", ("stage=align", "align=mmd", "align.schedule=batch", "align.patience=1", *FIELDS)),
        Case("measure", ("stage=measure", UNALIGNED, *SPECTRA)),
        Case("plan", ("stage=plan", *MEASURED), (align, measure)),
        Case("pretrain", ("stage=pretrain", recipe)),
        Case("on source", ("stage=finetune", UNALIGNED, "backbone.pretrained=on_source", recipe)),
        Case("finetune", ("stage=finetune", *MEASURED), (align, measure)),
        Case("finetune fields", ("stage=finetune", UNALIGNED, *FIELDS, "finetune.patience=1", "finetune.accumulate=2")),
        Case("rank_losses", ("stage=rank_losses", *dylora[1:]), (dylora,)),
        Case("predict", ("stage=predict", *dylora[1:]), (dylora,)),
        Case("report", ("stage=report",), (align, measure, ("stage=finetune", "finetune.tag=one"))),
    ]
    tuned = ("stage=finetune", UNALIGNED, "layers.qkv=fused")  # as PEFT's adapters ask
    for name in ADAPTERS:
        options = (*tuned[1:], *TUNED.get(name, ()))
        before = (("stage=measure", *(one for one in options if not one.startswith("adapter."))),)
        found.append(
            Case(f"adapter={name}", (*tuned[:1], *options, f"adapter={name}"), before if name in PRIORS else ())
        )
    found += [
        Case(
            f"curriculum={name}",
            ("stage=finetune", UNALIGNED, f"finetune/curriculum={name}", *TUNED.get(name, ())),
        )
        for name in CURRICULA
    ]
    return [
        *found,
        Case("evidence", ("stage=evidence", UNALIGNED, *EVIDENCE)),
        Case("all", ("stage=all", *MEASURED), shows_seconds=("run/report.html",)),
    ]


class Bench:
    """A folder whose runs are started from the same files at the same path again and again."""

    def __init__(self, root: Path, draw: random.Random) -> None:
        self.root, self.work, self.draw = root, root / "work", draw
        self.work.mkdir(parents=True)
        random_fields = np.random.default_rng(0).standard_normal((60, 1, 16, 16)).astype(np.float32)
        np.savez(root / "fields.npz", x=random_fields, y=1 + np.roll(random_fields, 1, 2))

    def config(self, options: Sequence[str]) -> Any:
        stage = [one for one in options if one.startswith("stage=")]
        rest = [one for one in options if not one.startswith("stage=")]
        places = [f"paths.runs={self.work}", f"paths.data={self.root}"]
        return compose("config", [*stage, *TINY, *places, *rest])

    def run(self, options: Sequence[str], kill: Callable[[int], None] | None = None, at: int | None = None) -> int:
        """The status of one command: 0, or the signal that killed it.

        Args:
            kill: called with the process's id once it runs. at: kill at this file operation, before it where the number
                is negative; the count of them is written to <root>/operations.
        """
        config = self.config(options)
        process = os.fork()
        if process == 0:
            self._child(config, at)
        if kill is not None:
            kill(process)
        return os.waitpid(process, 0)[1]

    def _child(self, config: Any, at: int | None) -> None:
        with open(self.root / "output.txt", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        status = 1
        try:
            count = _killing(at)
            build(config.stage)(config)
            (self.root / "operations").write_text(str(count[0]))
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def restore(self, start: Path) -> None:
        shutil.rmtree(self.work)
        shutil.copytree(start, self.work)

    def try_case(self, case: Case, kills: int) -> dict[str, Any]:
        """Kill and compare; counts of what came out."""
        shutil.rmtree(self.work)
        self.work.mkdir()
        for options in case.before:
            if self.run(options):
                raise RuntimeError(f"{case.name}: {options} failed:\n{(self.root / 'output.txt').read_text()}")
        start = self.root / "start"
        shutil.rmtree(start, ignore_errors=True)
        shutil.copytree(self.work, start)
        began = time.monotonic()
        if self.run(case.options):
            raise RuntimeError(f"{case.name} failed:\n{(self.root / 'output.txt').read_text()}")
        seconds, operations = time.monotonic() - began, int((self.root / "operations").read_text())
        expected = contents(self.work)
        found = {"kills": 0, "equal": 0, "not equal": 0, "seconds": seconds, "operations": operations, "said": []}
        while found["kills"] < kills:
            self.restore(start)
            moments: list[str] = []
            while found["kills"] < kills:
                status, moment = self._kill(case.options, seconds, operations)
                moments.append(moment)
                if status == 0:  # it had finished
                    break
                if status != signal.SIGKILL:
                    found["said"].append(f"after {moments}: {(self.root / 'output.txt').read_text()[-1500:]}")
                    break
                found["kills"] += 1
            if self.run(case.options):
                wrong = [f"failed: {(self.root / 'output.txt').read_text()[-1500:]}"]
            else:
                now = contents(self.work)
                both = [
                    {name: None if name in case.shows_seconds else one[name] for name in one} for one in (expected, now)
                ]
                wrong = difference(*both)
            found["not equal" if wrong else "equal"] += 1
            if wrong:
                found["said"].append(f"killed at {moments}: {'; '.join(wrong[:6])}")
        return found

    def _kill(self, options: Sequence[str], seconds: float, operations: int) -> tuple[int, str]:
        if self.draw.random() < 0.5:
            at = self.draw.randint(1, max(operations, 1)) * self.draw.choice((-1, 1))
            return self.run(options, at=at), f"operation {at} of {operations}"
        delay = self.draw.uniform(0, seconds)

        def kill(process: int) -> None:
            end = time.monotonic() + delay
            while time.monotonic() < end:
                if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    return
                time.sleep(0.002)
            os.kill(process, signal.SIGKILL)

        return self.run(options, kill), f"{delay:.2f} of {seconds:.2f} s"


def _killing(at: int | None) -> list[int]:
    """Count this process's file operations, and kill it at the number `at`; the running count."""
    count = [0]

    def wrap(operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if at == -count[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            result = operation(*arguments, **options)
            if at == count[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    for name in OPERATIONS:
        setattr(os, name, wrap(getattr(os, name)))
    return count


def contents(folder: Path) -> dict[str, Any]:
    """What every file below a folder holds, without what a clock says of it."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or "/log/" in name:
            continue
        if path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text()))
        elif path.suffix == ".csv":
            with open(path, newline="") as stream:
                found[name] = [_timeless(row) for row in csv.DictReader(stream)]
        else:
            found[name] = path.read_bytes()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(one) for name, one in value.items() if name not in CLOCKED}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def difference(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """How two folders differ."""
    left = [f"left: {name}" for name in found if name.endswith(LEFT) or any(f"/{one}/" in name for one in LEFT)]
    lines = [f"missing: {name}" for name in expected if name not in found]
    lines += [f"new: {name}" for name in found if name not in expected]
    lines += [f"differs: {name}" for name in expected if name in found and expected[name] != found[name]]
    return left + lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=3, help="of every case, at least")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for path in (Path(orca_rank.__file__).parent / "stages").glob("[a-z]*.py"):
        importlib.import_module(f"orca_rank.stages.{path.stem}")
    chosen = [case for case in cases() if arguments.only in case.name]
    total = {"kills": 0, "equal": 0, "not equal": 0}
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(CONF.absolute()), version_base="1.3"):
        bench = Bench(Path(folder) / "warm", random.Random(0))
        for options in (("stage=align",), ("stage=finetune", "rank.r=1")):  # what is imported late, is now
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                config = bench.config(options)
                build(config.stage)(config)
    print(f"{'case':22} {'kills':>5} {'equal':>6} {'not equal':>9} {'s a run':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(CONF.absolute()), version_base="1.3"):
        for number, case in enumerate(chosen):
            bench = Bench(Path(folder) / str(number), random.Random(f"{arguments.seed} {case.name}"))
            found = bench.try_case(case, arguments.kills)
            total = {name: total[name] + found[name] for name in total}
            print(
                f"{case.name:22} {found['kills']:5} {found['equal']:6} {found['not equal']:9} {found['seconds']:8.1f}",
                *(f"\n    {line}" for line in found["said"]),
                flush=True,
            )
            shutil.rmtree(bench.root)
    print(f"{'together':22} {total['kills']:5} {total['equal']:6} {total['not equal']:9}")
    sys.exit(1 if total["not equal"] else 0)


if __name__ == "__main__":
    main()
