"""A rank plan as a table of plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orca_rank.ranks.peft import THIRD


def plan_text(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], rule: str) -> str:
    """A line a layer (q, k and v of one matrix share one), and what it comes to.

    Args:
        ranks: layer -> rank. shapes: layer -> (d_in, d_out), of all layers or parameters are left out. rule: its name.
    """
    known = bool(ranks) and set(ranks) <= set(shapes)
    lines = [("layer", "d_in × d_out", "rank", "parameters") if known else ("layer", "rank")]
    for name, members in together(ranks).items():
        shown = " ".join(str(ranks[member]) for member in members)
        if known:
            d_in, d_out = shapes[members[0]]
            lines.append((name, f"{d_in} × {d_out}", shown, f"{_parameters(members, ranks, shapes):,}"))
        else:
            lines.append((name, shown))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]  # fmt: skip
    adapted = sum(rank > 0 for rank in ranks.values())
    total = f"rule {rule or 'given'}: {adapted} of {len(ranks)} layers adapted, total rank {sum(ranks.values()):,}"
    return "\n".join([*rows, total + (f", {_parameters(ranks, ranks, shapes):,} parameters" if known else "")])


def together(names: Iterable[str]) -> dict[str, list[str]]:
    """Title of a row -> the layers in it: q, k and v of a fused matrix are one row."""
    rows: dict[str, list[str]] = {}
    for name in names:
        third = THIRD.fullmatch(name)
        rows.setdefault(f"{third[1]} (q k v)" if third else name, []).append(name)
    return rows


def _parameters(names: Iterable[str], ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> int:
    return sum(ranks[name] * sum(shapes[name]) for name in names)
