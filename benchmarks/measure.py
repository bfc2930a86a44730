"""What stage=measure costs beside plain forward passes over the same images, in one process.

    python benchmarks/measure.py --images 512            Swin-T at 224: gaps and label-free spectra of all 72 layers
    python benchmarks/measure.py --images 64 --gradient  the gradient pass beside a plain forward and backward

Weights and images are random: they do not change the time. Peak memory is resident memory above the idle process: for
gaps and spectra as it is, for gradients less the peak of the plain passes, whose activations they need as well.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from orca_rank.artifacts.provenance import plain
from orca_rank.backbone import create_model
from orca_rank.build import build
from orca_rank.measuring.activations import collect, module_of
from orca_rank.measuring.gradients import collect_gradients
from orca_rank.measuring.layers import Side, layer_gaps, measurements
from orca_rank.measuring.matrices import adaptable_layers, matrix_of
from orca_rank.measuring.options import GapOptions
from orca_rank.ranks import Layer
from orca_rank.task import Task

CONF = Path(__file__).parents[1] / "conf"


class Peak(threading.Thread):
    """The highest resident memory of this process since the start of the block, sampled every 50 ms."""

    def __enter__(self) -> Peak:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: None)
        trim(0)  # pages that the heap keeps after earlier work would hide what this work takes
        self.before = self.most = self.now()
        self.done = False
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done = True
        self.join()

    @staticmethod
    def now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def run(self) -> None:
        while not self.done:
            self.most = max(self.most, self.now())
            time.sleep(0.05)

    @property
    def mib(self) -> float:
        return (self.most - self.before) / 2**20


def timed(call: Callable[[], object]) -> float:
    """CPU seconds of this process, which other work on the machine does not stretch as it does wall time."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="of source and of target each")
    parser.add_argument("--backbone", default="swin_tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--gradient", action="store_true", help="the gradient pass instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with initialize_config_dir(str(CONF.absolute()), version_base="1.3"):
        config = compose("config", ["gap=spectra", f"backbone={options.backbone}", "backbone.pretrained=false",
                                    f"gap.samples={options.images}"])  # fmt: skip
    metrics = {name: build(node) for name, node in config.gap.metrics.items()}
    gap = GapOptions.from_dict(plain(config.gap), metrics)
    task = Task("classification", (3, 224, 224), (10,))
    model = create_model(config.backbone, task).eval()
    layers: list[Layer] = adaptable_layers(model.body, config.layers.target, "separate")
    modules = {layer.name: module_of(layer.name, model.body) for layer in layers}
    watched = {name: matrix_of(model.body, name) for name in dict.fromkeys(modules.values())}
    count = options.images
    batches = [
        (torch.randn(min(options.batch, count - i), 3, 224, 224), torch.randint(10, (min(options.batch, count - i),)))
        for i in range(0, count, options.batch)
    ]

    def forward() -> None:
        with torch.inference_mode():
            for x, _ in batches:
                model(x)

    def forward_backward() -> None:
        for x, y in batches:
            model.zero_grad()
            task.loss(model(x), y).backward()

    if options.gradient:
        with Peak() as usual:
            forward_backward()
            usually = timed(forward_backward)
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)

        found = {}
        with Peak() as peak:
            passes = timed(lambda: found.update(collect_gradients(
                model.embedder, model.head, task.loss, watched, batches, count, draws=gap.sign_draws)))  # fmt: skip
            spectra = timed(lambda: [found[modules[layer.name]].spectrum() for layer in layers])
        print(
            f"{count} images, forward + backward {usually:.1f} s; gradient pass {passes:.1f} s, spectra {spectra:.1f} s"
        )
        print(f"ratio {(passes + spectra) / usually:.2f}, peak extra memory {peak.mib - usual.mib:.0f} MiB")
        return

    forward()
    forwards = 2 * timed(forward)  # source and target
    gap = replace(gap, measurements=gap.measurements - {"gradient", "importance", "fisher"})
    sides: list[Side] = []

    def passes() -> None:
        for seed in (0, 1):
            inputs, labels = collect(model, watched, batches, count, tokens=gap.tokens, seed=seed)
            sides.append(Side(inputs, labels.numpy()))

    with Peak() as peak:
        collecting = timed(passes)
        by_metric = {name: timed(lambda name=name: layer_gaps(name, metrics[name], gap, 0, *sides)) for name in metrics}
        spectra = timed(lambda: measurements(gap, 0, layers, modules, model.body, *sides, None))
    gaps = sum(by_metric.values())
    total = collecting + gaps + spectra
    print(f"{count} + {count} images, {len(layers)} layers: plain forward {forwards:.1f} s")
    print(f"measured {total:.1f} s: passes {collecting:.1f}, gaps {gaps:.1f}, spectra {spectra:.1f}")
    print(f"gaps: {', '.join(f'{name} {seconds:.1f} s' for name, seconds in by_metric.items())}")
    print(f"ratio {total / forwards:.2f}, peak extra memory {peak.mib:.0f} MiB")


if __name__ == "__main__":
    main()
