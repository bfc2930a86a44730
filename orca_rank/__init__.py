"""Measure the modality gap of every layer of a pretrained vision transformer and adapt it with LoRA ranks to match.

In a script or a notebook, with any model and any batches:

    import orca_rank as orca
    gaps = orca.measure(model, source_loader, target_loader, layers=r"attn\\.qkv|mlp")   # a table; gaps.plot()
    plan = orca.plan(gaps, rule="recommended", parameters=200_000)                      # a table; plan.ranks
    config = LoraConfig(**plan.to_peft())                                               # or orca.inject(model, plan)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what each name is; `_HOMES` says the same to Python
    from orca_rank.adapters import inject as inject
    from orca_rank.adapters import load_peft as load_peft
    from orca_rank.adapters import merge as merge
    from orca_rank.adapters import save_peft as save_peft
    from orca_rank.adapters import unload as unload
    from orca_rank.adapters import unmerge as unmerge
    from orca_rank.api.align import align as align
    from orca_rank.api.gaps import Gaps as Gaps
    from orca_rank.api.measure import layers as layers
    from orca_rank.api.measure import measure as measure
    from orca_rank.api.plan import plan as plan
    from orca_rank.api.predict import predict as predict
    from orca_rank.distances import bures_wasserstein as bures_wasserstein
    from orca_rank.distances import energy_distance as energy_distance
    from orca_rank.distances import mmd as mmd
    from orca_rank.distances import otdd as otdd
    from orca_rank.distances import sliced_wasserstein as sliced_wasserstein
    from orca_rank.fitted import load as load
    from orca_rank.ranks import Budget as Budget
    from orca_rank.ranks import RankPlan as RankPlan

__version__ = "0.2.0"
_HOMES = {
    "adapters": ("inject", "load_peft", "merge", "save_peft", "unload", "unmerge"),
    "api.align": ("align",),
    "api.gaps": ("Gaps",),
    "api.measure": ("layers", "measure"),
    "api.plan": ("plan",),
    "api.predict": ("predict",),
    "distances": ("bures_wasserstein", "energy_distance", "mmd", "otdd", "sliced_wasserstein"),
    "fitted": ("load",),
    "ranks": ("Budget", "RankPlan"),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    # Torch and timm take seconds to import: `import orca_rank` alone should not.
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return globals().setdefault(name, getattr(import_module(f"orca_rank.{home}"), name))
    raise AttributeError(f"module 'orca_rank' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
