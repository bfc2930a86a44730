"""How PEFT names layers: patterns that reach one layer each, and a rank plan as the arguments of a `LoraConfig`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
THIRD = re.compile(r"((?:.*\.)?qkv)\.[qkv]")  # how layers.qkv=separate names the parts of a fused matrix


def exactly(names: Iterable[str]) -> str:
    """`target_modules` for these layers and no other.

    PEFT reads a list as suffixes, which would reach `aux.head` for `head`; an expression it matches in full.
    """
    return "|".join(f"(?:{re.escape(name)})" for name in names)


def patterns(values: Mapping[str, T]) -> dict[str, T]:
    """`rank_pattern` or `alpha_pattern` with a value for each layer: an entry matches its own layer alone."""
    return {f"^{re.escape(name)}": value for name, value in values.items()}


def value_of(name: str, given: Mapping[str, T], default: T) -> T:
    """What a pattern table says of a layer, read as PEFT does: the first entry that matches a suffix wins."""
    for pattern, value in given.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def lora_arguments(ranks: Mapping[str, int], alpha: float | None) -> dict[str, Any]:
    """What `RankPlan.to_peft` returns and raises."""
    layers = {name: _fused(name, parts, alpha) for name, parts in _parts(ranks).items()}
    if not layers:
        raise ValueError("every rank is 0: PEFT has no adapter without a layer")
    top = max(rank for rank, _ in layers.values())
    return {
        "r": top,
        "lora_alpha": top if alpha is None else alpha,
        "target_modules": exactly(layers),
        "rank_pattern": patterns({name: rank for name, (rank, _) in layers.items()}),
        "alpha_pattern": patterns({name: own for name, (_, own) in layers.items()}),
    }


def _parts(ranks: Mapping[str, int]) -> dict[str, list[int]]:
    """Module -> the ranks above 0 that adapt it: one, or up to three of a fused matrix."""
    found: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        third = THIRD.fullmatch(name)
        if third and third[1] in ranks:
            raise ValueError(f"the rank plan has both {third[1]} and its part {name}: keep one of them")
        if rank:
            found.setdefault(third[1] if third else name, []).append(rank)
    return found


def _fused(name: str, parts: list[int], alpha: float | None) -> tuple[int, float]:
    """Rank and alpha of the whole matrix; alpha / rank is what each part has."""
    total = sum(parts)
    if alpha is None:
        return total, total
    if len(set(parts)) > 1:
        raise ValueError(
            f"{name}: its q, k, v have the ranks {parts}, so that one alpha={alpha} scales them differently, which a "
            "LoraConfig of the fused matrix cannot say: leave alpha out (each is then scaled by 1), or use "
            "orca_rank.adapters.inject and save_peft, which put the difference into B"
        )
    return total, alpha * len(parts)


def peft_parameters(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> int:
    """What PEFT trains with `lora_arguments`: Σ r (d_in + d_out), where the parts of a fused matrix (d_in, d) count as
    one adapter of the whole (d_in, 3d), of the sum of their ranks.

    Args:
        shapes: layer -> (d_in, d_out), for every rank above 0.
    """
    total = 0
    for name, rank in ranks.items():
        d_in, d_out = shapes[name] if rank else (0, 0)
        total += rank * (d_in + (3 * d_out if THIRD.fullmatch(name) else d_out))
    return total
