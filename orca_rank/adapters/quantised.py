"""QLoRA (Dettmers et al. 2023): the frozen matrix in 4-bit NormalFloat with doubly quantised constants.

Plain torch with the numbers of bitsandbytes (blocks of 64, scales in blocks of 256), so it runs on any device. A layer
holds 4 bits per weight and 8 per block; the matrix is unpacked in each pass and never kept.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from orca_rank.adapters.linear import AdaptedLinear
from orca_rank.adapters.lora import B_ALONE, LoRA

BLOCK, SCALE_BLOCK = 64, 256
# Appendix E of the paper: quantiles of N(0, 1), scaled to [-1, 1], with an exact 0.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def dynamic_codes() -> Float[Tensor, "256"]:
    """The signed 8-bit dynamic data type for the scales: means of intervals in each decade (Dettmers 2016)."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values))


def nearest(values: Float[Tensor, " n"], codes: Float[Tensor, " k"]) -> UInt8[Tensor, " n"]:
    """The index of the nearest code; codes are sorted."""
    return torch.bucketize(values, (codes[1:] + codes[:-1]) / 2).to(torch.uint8)


def blocks_of(values: Float[Tensor, " n"], size: int) -> Float[Tensor, "blocks size"]:
    """Rows of a size, the last one padded with zeros."""
    return nn.functional.pad(values, (0, -len(values) % size)).view(-1, size)


def quantise(weight: Float[Tensor, "d_out d_in"]) -> dict[str, Tensor]:
    """NF4 with double quantisation: ``codes`` (two per byte), ``scales`` (8-bit), ``scale_max``, ``scale_mean``."""
    values = blocks_of(weight.detach().float().flatten(), BLOCK)
    top = values.abs().amax(dim=1)  # (blocks,)
    scaled = values / top.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    index = nearest(scaled.flatten(), torch.tensor(NF4, device=weight.device))
    mean = top.mean()
    rest = blocks_of(top - mean, SCALE_BLOCK)
    rest_max = rest.abs().amax(dim=1)
    small = rest / rest_max.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    scales = nearest(small.flatten()[: len(top)], dynamic_codes().to(weight.device))
    return {"codes": index[::2] << 4 | index[1::2], "scales": scales, "scale_max": rest_max, "scale_mean": mean}


def dequantise(packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix that `quantise` packed."""
    codes, scales = packed["codes"], packed["scales"]
    top = blocks_of(dynamic_codes().to(codes.device)[scales.long()], SCALE_BLOCK) * packed["scale_max"][:, None]
    top = top.flatten()[: len(scales)] + packed["scale_mean"]
    table = torch.tensor(NF4, device=codes.device)
    values = table[torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()]
    return (values.view(-1, BLOCK) * top[:, None]).flatten()[: shape[0] * shape[1]].view(shape).to(dtype)


class QuantisedLinear(AdaptedLinear):
    """An `AdaptedLinear` whose W₀ is kept in NF4.

    ``weight`` unpacks it at each look. Merging is refused, because W₀ + ΔW would have to be quantised again: `unload`
    gives a plain Linear with the unpacked W₀, or adapt the unquantised model with the saved adapter and merge that.
    """

    codes: Tensor
    scales: Tensor
    scale_max: Tensor
    scale_mean: Tensor

    def __init__(self, base: nn.Linear, branches: Mapping[str, LoRA]) -> None:
        super().__init__(base, branches)
        self.dtype = base.weight.dtype
        del self._parameters["weight"]
        for name, value in quantise(base.weight).items():
            self.register_buffer(name, value)

    def own_weight(self) -> Tensor:
        return self.unpack(self.codes)

    def unpack(self, codes: Tensor) -> Tensor:
        """W₀ from its codes, in the dtype it had."""
        packed = {"codes": codes, "scales": self.scales, "scale_max": self.scale_max, "scale_mean": self.scale_mean}
        return dequantise(packed, (self.out_features, self.in_features), self.dtype)

    @property
    def weight_learns(self) -> bool:
        return False

    def kept_weight(self) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        return self.codes, self.unpack

    def merge(self) -> None:
        raise ValueError("a 4-bit matrix cannot take ΔW in; merge the saved adapter into the unquantised model")

    def bare(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.own_weight()), self.bias
        return linear.train(self.training)


class QLoRA(LoRA):
    """LoRA on a matrix in NF4: W₀ is quantised when the adapter is injected.

    The model therefore starts at the quantised model, not at the given one.

    Raises:
        ValueError: for an initialisation that moves W₀, whose offset would need the unquantised matrix.
    """

    host: ClassVar[Callable[..., nn.Linear] | None] = QuantisedLinear
    inits: ClassVar[tuple[str, ...]] = B_ALONE


def paged_adamw(params: Any, **options: Any) -> torch.optim.Optimizer:
    """AdamW whose state lives in memory that the GPU pages to the host (bitsandbytes).

    Raises:
        ImportError: without bitsandbytes. RuntimeError: without a GPU, where nothing can be paged.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("the paged optimiser comes from bitsandbytes: pip install 'orca_rank[qlora]'")
    if not torch.cuda.is_available():
        raise RuntimeError("paged optimiser states need a CUDA GPU; torch.optim.AdamW has the same numbers")
    from bitsandbytes.optim import PagedAdamW

    return PagedAdamW(params, **options)
