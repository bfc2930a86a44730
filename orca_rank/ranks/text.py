"""Tables of plain text with a row a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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
    adapted = sum(rank > 0 for rank in ranks.values())
    total = f"rule {rule or 'given'}: {adapted} of {len(ranks)} layers adapted, total rank {sum(ranks.values()):,}"
    return "\n".join([aligned(lines), total + (f", {_parameters(ranks, ranks, shapes):,} parameters" if known else "")])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns as wide as they need, the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        rows.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(rows)


def together(names: Iterable[str]) -> dict[str, list[str]]:
    """Title of a row -> the layers in it: q, k and v of a fused matrix are one row."""
    rows: dict[str, list[str]] = {}
    for name in names:
        third = THIRD.fullmatch(name)
        rows.setdefault(f"{third[1]} (q k v)" if third else name, []).append(name)
    return rows


def _parameters(names: Iterable[str], ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> int:
    return sum(ranks[name] * sum(shapes[name]) for name in names)
