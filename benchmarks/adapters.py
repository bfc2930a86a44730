"""A LoRA training step against PEFT's: process CPU time and peak activation memory, alternated in one process.

    python benchmarks/adapters.py                       # every setting of the table, a few minutes
    python benchmarks/adapters.py --only r8 --steps 3

Same timm model, ranks, inputs and optimiser on both sides; float32, one thread. The peak is the CPU allocator's within
one step, without weights, gradients and optimiser state that exist before it. Ratios are ours over PEFT's, medians.
"""

import argparse
import copy
import os
import statistics
import sys
import time
import warnings
from functools import partial

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
# name: (model, batch, rank, checkpoint our blocks, (time, memory) to reach)
SETTINGS = {
    "r8": ("swin_tiny_patch4_window7_224", 8, 8, False, (0.80, 0.55)),
    "r256": ("swin_tiny_patch4_window7_224", 8, 256, False, (0.60, 0.46)),
    "checkpointed": ("swin_tiny_patch4_window7_224", 8, 8, True, (1.25, 0.25)),
    "swin_b": ("swin_base_patch4_window7_224", 4, 8, False, (0.90, 0.55)),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, drop_path_rate=0.0).train()


def ours(name: str, rank: int, memory: str, checkpoint: bool) -> nn.Module:
    model = build(name)
    ranks = {path: rank for path, m in model.named_modules() if path.endswith(TARGETS) and isinstance(m, nn.Linear)}
    plan = RankPlan(ranks, allow_above_full=True)
    inject(model, plan, partial(LoRA, alpha=16), memory=memory)
    model.set_grad_checkpointing(checkpoint)
    return model


def theirs(name: str, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(build(name), LoraConfig(r=rank, lora_alpha=16, target_modules=list(TARGETS))).train()


def floor(name: str) -> nn.Module:
    """The frozen forward pass and the gradient of the input: what no adapter can undercut by ordinary means."""
    return build(name).requires_grad_(False)


class Step:
    """One optimiser step of a model on fixed data."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.model = model
        self.x = torch.randn(batch, 3, 224, 224, generator=generator)
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

    def seconds(self) -> float:
        start = time.process_time()
        self()
        return time.process_time() - start

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


def gradients_agree(name: str, rank: int, mine: nn.Module, peft_model: nn.Module) -> float:
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
    x = torch.randn(2, 3, 224, 224, generator=generator)
    for model in (mine, peft_model):
        model(x).square().mean().backward()
    return max(float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=5, help="alternated repetitions")
    parser.add_argument("--modes", nargs="*", default=["lean"])
    parser.add_argument("--floor", action="store_true", help="also time the frozen forward and input gradient")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for setting in options.only:
        name, batch, rank, checkpoint, goal = SETTINGS[setting]
        steps = {"peft": Step(theirs(name, rank), batch)}
        for mode in options.modes:
            steps[mode] = Step(ours(name, rank, mode, checkpoint), batch)
        if options.floor:
            steps["floor"] = Step(floor(name), batch)
        peaks = {side: step.peak() for side, step in steps.items()}
        times: dict[str, list[float]] = {side: [] for side in steps}
        for _ in range(options.steps):
            for side, step in steps.items():
                times[side].append(step.seconds())
        medians = {side: statistics.median(values) for side, values in times.items()}
        for side in steps:
            ratio, memory = medians[side] / medians["peft"], peaks[side] / peaks["peft"]
            wanted = f"  (to reach {goal[0]:.2f} / {goal[1]:.2f})" if side == "lean" else ""
            print(
                f"{setting:<13}{side:<9} {medians[side]:7.2f} s  {peaks[side] / 2**20:7.0f} MiB"
                f"  time {ratio:.2f}  memory {memory:.3f} x PEFT{wanted}",
                flush=True,
            )
        if "lean" in steps and not checkpoint:
            worst = gradients_agree(name, rank, steps["lean"].model, steps["peft"].model)
            print(f"{setting:<13}gradients differ from PEFT's by at most {worst:.1e} (relative)", flush=True)


if __name__ == "__main__":
    main()
