"""What a figure was measured on."""

import contextlib
import platform
from pathlib import Path

import torch


def machine(threads: int | None = None) -> str:
    """The processor's model and the widest vectors that torch uses there, threads (null: torch's), torch's version."""
    name, vectors = platform.processor() or platform.machine(), torch.backends.cpu.get_cpu_capability()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name} ({vectors}), {threads or torch.get_num_threads()} thread(s), torch {torch.__version__}"
