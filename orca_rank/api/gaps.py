"""What was measured at every layer, as a table that rank rules read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from orca_rank.artifacts.files import read_record, write_json
from orca_rank.measuring.layers import agreement
from orca_rank.measuring.records import Gap, Layer, some
from orca_rank.ranks.text import aligned, together

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNIFICANT = 0.05


class Gaps(Sequence[Layer]):
    """The measured layers of a model, in its own order: prints itself as a table, and is what a rank rule takes.

    `gaps[0]` and `gaps["blocks.0.attn.qkv"]` are a `Layer`, whose `gap["mmd"]` has value, low, high, p and p_family.

    Args:
        layers: with their measurements. source_images, target_images: how many were compared.

    Raises:
        ValueError: for no layers.
    """

    def __init__(self, layers: Sequence[Layer], source_images: int = 0, target_images: int = 0) -> None:
        if not layers:
            raise ValueError("no layers: gaps are those of at least one")
        self.layers = tuple(layers)
        self.source_images, self.target_images = source_images, target_images

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, place: int | str) -> Layer: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[Layer, ...]: ...

    def __getitem__(self, place: int | str | slice) -> Layer | tuple[Layer, ...]:
        if not isinstance(place, str):
            return self.layers[place]
        found = {layer.name: layer for layer in self.layers}
        if place not in found:
            raise KeyError(f"no layer {place!r} was measured; there are {some(found)}")
        return found[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gaps) and self.layers == other.layers

    __hash__ = None  # type: ignore[assignment]  # records hold dictionaries

    @property
    def metrics(self) -> list[str]:
        """The gaps that every layer has."""
        return [name for name in self.layers[0].gap if all(name in layer.gap for layer in self.layers)]

    def values(self, metric: str = "mmd") -> dict[str, float]:
        """Layer -> calibrated gap.

        Raises:
            KeyError: for a metric that was not measured.
        """
        if metric not in self.metrics:
            raise KeyError(f"the gap {metric!r} was not measured; there are {some(self.metrics)}")
        return {layer.name: layer.gap[metric].value for layer in self.layers}

    def __repr__(self) -> str:
        by_name = {layer.name: layer for layer in self.layers}
        first, *others = self.metrics or [""]
        titles = ["layer", "d_in × d_out", *([first, "95 %", "p"] if first else []), *others]
        lines = [titles]
        for title, members in together(by_name).items():
            layer = by_name[members[0]]  # q, k and v of one matrix have one input, so one gap
            own = _detailed(layer.gap[first]) if first else []
            lines.append([title, f"{layer.d_in} × {layer.d_out}", *own, *(_short(layer.gap[name]) for name in others)])
        return (
            f"{aligned(lines)}\n{len(self)} layers, {self.source_images} source and {self.target_images} target "
            f"images; p is for all layers together, * p < {SIGNIFICANT}"
        )

    def plot(self) -> Figure:
        """Gaps along the network with their intervals, a panel a metric; filled marks have p < 0.05."""
        from orca_rank.report.plots import gap_figure, png  # here, because matplotlib takes a second

        figure = gap_figure({"target": self.layers})
        figure._repr_png_ = lambda: png(figure, 96)  # how a notebook shows an object
        return figure

    def save(self, path: str | Path) -> None:
        """Write a file as stage=measure writes measure/layers.json."""
        payload = {
            "images": {"source": self.source_images, "target": self.target_images},
            "agreement": agreement(self.layers),
            "layers": [layer.to_dict() for layer in self.layers],
        }
        write_json(Path(path), payload)

    @classmethod
    def load(cls, path: str | Path) -> Gaps:
        """What `save` or stage=measure (runs/<run>/measure/layers.json) wrote.

        Raises:
            FileNotFoundError: if there is no such file. DamagedFile: if it is not what they write.
        """
        return read_record(
            Path(path),
            "stage=measure",
            lambda content: cls(
                [Layer.from_dict(one) for one in content["layers"]],
                int(content["images"]["source"]),
                int(content["images"]["target"]),
            ),
        )


def _detailed(gap: Gap) -> list[str]:
    interval = "" if gap.low is None or gap.high is None else f"[{gap.low:.3g}, {gap.high:.3g}]"
    p = gap.p if gap.p_family is None else gap.p_family
    return [_short(gap), interval, "" if p is None else f"{p:.3g}"]


def _short(gap: Gap) -> str:
    return f"{gap.value:.3g}" + ("*" if gap.p_family is not None and gap.p_family < SIGNIFICANT else " ")
