"""A LoRA training step against its peers: process CPU time and peak activation memory, alternated in one process.

    python benchmarks/adapters.py                                # every setting with the usual sides
    python benchmarks/adapters.py --only micro --sides peft auto floor --repeats 20

Same timm model, ranks, inputs and optimiser on every side; float32, one thread. Sides: peft; peft_checkpointed, with
timm's gradient checkpointing; peft_compiled, under torch.compile; plain, fast and lean, our paths (see `set_memory`);
auto, the one that `inject` chooses; checkpointed, lean with checkpointing; full, every weight trained; floor, the
frozen forward pass and the gradient of the input. Beside a step's time stands the evaluation's of the same batch.

Every repeat runs each side once. Ratios are over PEFT's CPU time in the same repeat: their median and quartiles; beside
them the ratio of the fastest repeats, which other work on the machine disturbs least. The peak is the CPU allocator's
within one step, without weights, gradients and optimiser state that exist before it. Ratios depend on the processor,
which is printed.
"""

import argparse
import copy
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from orca_rank.adapters import LoRA, inject
from orca_rank.ranks import RankPlan

TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
SWIN = "swin_tiny_patch4_window7_224"
MICRO = {
    "img_size": 64,
    "window_size": 4,
    "embed_dim": 32,
    "depths": (2, 2, 4, 2),
    "num_heads": (1, 2, 4, 8),
}  # backbone=swin_micro
# name: (model, its options, image size, batch, rank)
SETTINGS: dict[str, tuple[str, dict[str, Any], int, int, int]] = {
    "micro": (SWIN, MICRO, 64, 32, 8),
    "r8": (SWIN, {}, 224, 8, 8),
    "r256": (SWIN, {}, 224, 8, 256),
    "swin_b": ("swin_base_patch4_window7_224", {}, 224, 4, 8),
}
SIDES = ("peft", "peft_checkpointed", "peft_compiled", "plain", "fast", "lean", "auto", "checkpointed", "full", "floor")


def build(name: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, drop_path_rate=0.0, **options).train()


def ours(model: nn.Module, rank: int, memory: str) -> nn.Module:
    ranks = {path: rank for path, m in model.named_modules() if path.endswith(TARGETS) and isinstance(m, nn.Linear)}
    inject(model, RankPlan(ranks, allow_above_full=True), partial(LoRA, alpha=16), memory=memory)
    return model


def theirs(model: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, target_modules=list(TARGETS))).train()


def side_of(side: str, name: str, options: dict[str, Any], rank: int) -> nn.Module:
    model = build(name, options)
    if side in ("floor", "full"):
        return model.requires_grad_(side == "full")
    model.set_grad_checkpointing(side.endswith("checkpointed"))
    if side.startswith("peft"):
        model = theirs(model, rank)
        return torch.compile(model) if side == "peft_compiled" else model
    return ours(model, rank, "lean" if side == "checkpointed" else side)


def processor() -> str:
    """The processor's name and the widest instructions that torch uses on it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


class Step:
    """One optimiser step of a model on fixed data."""

    def __init__(self, model: nn.Module, size: int, batch: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.model = model
        self.x = torch.randn(batch, 3, size, size, generator=generator)
        self.y = torch.randint(1000, (batch,), generator=generator)
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            self.x.requires_grad_(True)
        self.optimiser = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        self()

    def __call__(self) -> None:
        nn.functional.cross_entropy(self.model(self.x), self.y).backward()
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad()
        self.x.grad = None

    def seconds(self) -> tuple[float, float]:
        """CPU and wall time of one step."""
        start, wall = time.process_time(), time.perf_counter()
        self()
        return time.process_time() - start, time.perf_counter() - wall

    def evaluation(self) -> float:
        """CPU time of the batch without gradients."""
        self.model.eval()
        start = time.process_time()
        with torch.no_grad():
            self.model(self.x)
        taken = time.process_time() - start
        self.model.train()
        return taken

    def peak(self) -> int:
        """Bytes above what is allocated before the step."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            self()
        events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
        level = highest = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            level += event.nbytes()
            highest = max(highest, level)
        return highest


def gradients_agree(mine: nn.Module, peft_model: nn.Module, size: int) -> float:
    """Largest relative difference of the adapters' gradients, after giving both the same weights."""
    mine, peft_model = copy.deepcopy(mine), copy.deepcopy(peft_model)
    generator = torch.Generator().manual_seed(2)
    state = dict(peft_model.named_parameters())
    pairs = []
    for path, parameter in mine.named_parameters():
        if parameter.requires_grad:
            module, _, factor = path.replace(".branches.all", "").rpartition(".")
            other = state[f"base_model.model.{module}.{factor}.default.weight"]
            with torch.no_grad():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
                other.copy_(parameter)
            pairs.append((parameter, other))
    x = torch.randn(2, 3, size, size, generator=generator)
    for model in (mine, peft_model):
        model(x).square().mean().backward()
    return max(float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs)


def compare(setting: str, sides: Sequence[str], repeats: int) -> None:
    name, options, size, batch, rank = SETTINGS[setting]
    steps = {side: Step(side_of(side, name, options, rank), size, batch) for side in sides}
    peaks = {side: step.peak() for side, step in steps.items()}
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in steps}
    evaluations: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(repeats):
        for side, step in steps.items():
            times[side].append(step.seconds())
            evaluations[side].append(step.evaluation())
    for side, pairs in times.items():
        cpu, wall = zip(*pairs, strict=True)
        ratios = [mine / peft for mine, (peft, _) in zip(cpu, times["peft"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        fastest = min(cpu) / min(peft for peft, _ in times["peft"])
        print(
            f"{setting:<7}{side:<18} CPU {statistics.median(cpu):7.3f} s  wall {statistics.median(wall):7.3f} s"
            f"  time {middle:.2f} ({low:.2f} to {high:.2f}), fastest {fastest:.2f}"
            f"  memory {peaks[side] / 2**20:5.0f} MiB, {peaks[side] / peaks['peft']:.3f} x PEFT"
            f"  evaluation {statistics.median(evaluations[side]):6.3f} s",
            flush=True,
        )
    for side in ("plain", "fast", "lean", "auto"):
        if side in steps:
            worst = gradients_agree(steps[side].model, steps["peft"].model, size)
            print(f"{setting:<7}{side:<18} gradients differ from PEFT's by at most {worst:.1e} (relative)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=[s for s in SIDES if s != "peft_compiled"])
    parser.add_argument("--repeats", type=int, default=7, help="at least 2")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(f"{processor()}, 1 thread, torch {torch.__version__}, {options.repeats} alternated repeats", flush=True)
    for setting in options.only:
        compare(setting, list(dict.fromkeys(("peft", *options.sides))), options.repeats)


if __name__ == "__main__":
    main()
