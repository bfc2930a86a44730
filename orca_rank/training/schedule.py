"""The learning rate of every optimiser step over its peak: a linear warm-up, then one of four courses."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("linear", "cosine", "constant", "wsd")


@dataclass(frozen=True)
class Schedule:
    """Learning rates of a run; lengths are in optimiser steps, whole or not.

    Args:
        kind: after the warm-up, "linear" or "cosine" from the peak to 0 at the end of the run, "constant", or "wsd"
            (warm-up, stable, decay: constant until `decay` before the end, then linear to 0; arXiv 2404.06395).
        steps: of the run, or of a longer one of which it is the start. warmup: of the linear warm-up,
            (step + 1) / (warmup + 1). decay: of wsd.
    """

    kind: str
    steps: float
    warmup: float = 0.0
    decay: float = 0.0

    def factor(self, step: int) -> float:
        """Learning rate of optimiser step 0, 1, … over its peak."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            return max(0.0, min(1.0, (self.steps - step) / max(1.0, self.decay)))
        progress = min(1.0, (step - self.warmup) / max(1.0, self.steps - self.warmup))
        return 1 - progress if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
