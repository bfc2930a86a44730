"""LoRA of a convolution, such as the patch embedding: its matrix is the kernel with one row for each output channel."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.adapters.linear import WHOLE, AdaptedModule
from orca_rank.adapters.lora import LoRA, NotExpressible


class AdaptedConv2d(AdaptedModule, nn.Conv2d):
    """y = (W₀ + s B A) * x + bias: A is a convolution to r channels with the base's geometry, B one of 1 × 1.

    As a matrix W₀ is (out, C kh kw), so the adapter itself is the LoRA of a Linear with d_in = C kh kw; A becomes
    (r, C, kh, kw) and B (out, r, 1, 1) where they meet images or PEFT's files. It trains in plain autograd.

    Args:
        base: the convolution to replace, see `check_convolution`.
        branches: ``all`` -> its LoRA.
    """

    def __init__(self, base: nn.Conv2d, branches: Mapping[str, LoRA]) -> None:
        nn.Conv2d.__init__(self, **_geometry(base))
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.weight[0].numel(), base.out_channels  # of the matrix
        self._carry(base, branches)

    def kernels(self, a: Tensor, b: Tensor) -> tuple[Float[Tensor, "r c kh kw"], Float[Tensor, "out r 1 1"]]:
        """A (r, C kh kw) and B (out, r) as kernels."""
        return a.reshape(-1, *self.weight.shape[1:]), b[:, :, None, None]

    def forward(self, x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n out h2 w2"]:
        if self.merged:
            return self._conv_forward(x, self.weight, self.bias)
        y = self._conv_forward(x, self.base_weight(), self.bias)
        branch = self.parts[WHOLE]
        a, b = self.kernels(*branch.factors())
        z = self._conv_forward(F.dropout(x, branch.dropout, self.training), a.to(x.dtype), None)  # (..., r, h2, w2)
        return y + F.conv2d(z, b.to(z.dtype))

    def bare(self) -> nn.Conv2d:
        conv = nn.Conv2d(**_geometry(self))
        conv.weight, conv.bias = self.weight, self.bias
        return conv.train(self.training)


def _geometry(base: nn.Conv2d) -> dict[str, Any]:
    """The constructor's arguments for a like convolution whose Parameters are put in afterwards."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(base, name) for name in names} | {"bias": base.bias is not None, "device": "meta"}


def check_convolution(name: str, base: nn.Conv2d) -> None:
    """Refuse a convolution whose ΔW is no product of an A and a 1 × 1 B.

    Raises:
        ValueError: for groups. TypeError: for a subclass with a forward pass of its own.
    """
    if base.groups != 1:
        raise ValueError(f"{name} is a Conv2d with groups={base.groups}; only groups=1 can be adapted")
    if type(base).forward is not nn.Conv2d.forward or type(base)._conv_forward is not nn.Conv2d._conv_forward:
        raise TypeError(f"{name} is a {type(base).__name__} with a forward pass of its own; expected a plain nn.Conv2d")


def check_adapter(name: str, adapter: Any) -> None:
    """Refuse an adapter other than plain LoRA on a convolution.

    Raises:
        TypeError: with the adapter's kind.
    """
    if type(adapter) is not LoRA:
        raise TypeError(f"{name} is a Conv2d, which takes plain LoRA only; received {type(adapter).__name__}")


def check_peft(name: str, base: nn.Conv2d) -> None:
    """Refuse what PEFT's A, which takes only stride and padding over, does not share with the convolution.

    Raises:
        NotExpressible: for dilation, or padding with anything but zeros.
    """
    if base.padding_mode != "zeros" or any(step != 1 for step in base.dilation):
        raise NotExpressible(
            f"{name}: PEFT's LoRA of a convolution knows dilation 1 and zero padding; this one has dilation="
            f"{base.dilation} and padding_mode={base.padding_mode!r}. Keep adapter_state_dict(model) instead"
        )
