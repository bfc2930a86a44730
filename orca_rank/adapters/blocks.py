"""Lean forward passes of timm's Swin and ViT blocks: they hand each adapted Linear what comes before it.

Nothing of timm is imported: a block, typed as Any, is recognised by the parts that its forward pass reads. Where
something is in the way (a hook, a trained LayerNorm, active dropout, padding, compilation, no gradient) the block runs
its own code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orca_rank.adapters.linear import MEMORY, AdaptedLinear

SWIN = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2", "window_size", "shift_size", "attn_mask")
SWIN_ATTENTION = ("qkv", "attn_drop", "softmax", "proj", "proj_drop", "num_heads", "scale", "_get_rel_pos_bias")
VIT = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
LEAN_WIDTH = 96
TINY = torch.finfo(torch.float32).tiny
MLP = ("fc1", "act", "drop1", "norm", "fc2", "drop2")


def set_memory(model: nn.Module, memory: str) -> None:
    """Choose what a training step keeps, and so how fast it is.

    Args:
        model: with adapters.
        memory: ``plain`` is ordinary autograd, the readable reference; ``fast`` keeps as much, multiplies less (see
            `products`) and copies less in window attention; ``lean`` is fast, and rebuilds the outputs of LayerNorm,
            GELU and window attention in the backward pass; ``auto`` is one of the last two, see `choose_memory`.

    Raises:
        ValueError: for another mode.
    """
    if memory not in MEMORY:
        raise ValueError(f"memory is {memory!r}; expected one of {MEMORY}")
    if memory == "auto":
        memory = choose_memory(model)
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.memory = memory
    for block in model.modules():
        if not (_is_swin(block) or _is_vit(block)):
            continue
        vars(block).pop("forward", None)
        gains = memory == "lean" or (memory == "fast" and _is_swin(block))  # from a forward pass of ours
        if gains and any(isinstance(module, AdaptedLinear) for module in block.modules()):
            block.forward = partial(swin_block if _is_swin(block) else vit_block, block)  # unlike a method, it pickles


def choose_memory(model: nn.Module) -> str:
    """``fast`` on a CPU where an adapted matrix has fewer than LEAN_WIDTH inputs, else ``lean``.

    What is rebuilt costs time in proportion to a layer's width, its products to the width's square, and the calls from
    Python the same at any width: measured on a processor with AVX2 (`benchmarks/adapters.py`), rebuilding adds about
    two fifths to a step of swin_micro (widths 32 to 256, where memory is no concern) and a seventh to one of Swin-T
    (96 to 768), where it halves the memory. Other devices have not been measured and keep to memory.
    """
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    narrow = any(module.in_features < LEAN_WIDTH for module in layers)
    on_cpu = all(p.device.type == "cpu" for module in layers for p in module.branches.parameters())
    return "fast" if narrow and on_cpu else "lean"


def _has(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(hasattr(module, name) for name in names)


def _is_swin(block: Any) -> bool:
    return _has(block, SWIN) and _has(block.attn, SWIN_ATTENTION) and _has(block.mlp, MLP)


def _is_vit(block: Any) -> bool:
    return _has(block, VIT) and not hasattr(block, "window_size") and _has(block.mlp, MLP)


def _in_the_way(block: nn.Module) -> bool:
    """Whether the block must run its own code."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return True
    for module in block.modules():
        if module is not block and (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        ):
            return True
    return False


def run_after(
    linear: nn.Module, before: Callable[..., Tensor], x: Tensor, group: int | None = None, reuse: bool = False
) -> Tensor:
    """``linear(before(x))``, keeping x instead of ``before``'s output where the adapters allow it and ask for it.

    A frozen Linear keeps nothing of its input in any case.
    """
    trained = isinstance(before, nn.Module) and any(p.requires_grad for p in before.parameters())
    if isinstance(linear, AdaptedLinear) and linear.memory == "lean" and linear.is_lean and not trained:
        return linear.after(before, x, group=group, reuse=reuse)
    if isinstance(before, Attention) and not torch.is_autocast_enabled(x.device.type):
        return linear(KeptAttention.apply(before, x))
    return linear(before(x))


def mlp(module: Any, norm: nn.Module, x: Tensor) -> Tensor:
    """fc2(act(fc1(norm(x)))) of timm's Mlp."""
    h = run_after(module.fc1, norm, x)  # (..., d) -> (..., 4d)
    if not isinstance(module.norm, nn.Identity) or (module.drop1.p > 0 and module.training):
        return module.drop2(module.fc2(module.norm(module.drop1(module.act(h)))))
    return module.drop2(run_after(module.fc2, module.act, h, reuse=True))


def swin_block(block: Any, x: Tensor) -> Tensor:
    """timm's SwinTransformerBlock.forward. (B, H, W, C) -> (B, H, W, C)"""
    b, h, w, c = x.shape
    wh, ww = block.window_size
    attn = block.attn
    if (
        _in_the_way(block)
        or h % wh
        or w % ww
        or getattr(block, "dynamic_mask", False)
        or attn.relative_position_bias_table.requires_grad
        or (attn.attn_drop.p > 0 and attn.training)
    ):
        return type(block).forward(block, x)
    sy, sx = block.shift_size
    shifted = torch.roll(x, (-sy, -sx), (1, 2)) if sy or sx else x
    windows = shifted.view(b, h // wh, wh, w // ww, ww, c).transpose(2, 3).reshape(-1, wh * ww, c)  # (B nW, T, C)
    y = window_attention(attn, block.norm1, windows, block.attn_mask)
    y = y.view(b, h // wh, w // ww, wh, ww, c).transpose(2, 3).reshape(b, h, w, c)
    y = torch.roll(y, (sy, sx), (1, 2)) if sy or sx else y
    x = (x + block.drop_path1(y)).reshape(b, -1, c)
    return (x + block.drop_path2(mlp(block.mlp, block.norm2, x))).reshape(b, h, w, c)


def window_attention(attn: Any, norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """timm's WindowAttention.forward after its norm, which works token by token and so commutes with windowing."""
    qkv = run_after(attn.qkv, norm, x)  # (B nW, T, C) -> (B nW, T, 3C)
    bias = attn._get_rel_pos_bias()  # (1, heads, T, T)
    if mask is not None:
        bias = bias + mask.unsqueeze(1)  # (nW, heads, T, T)
    core = Attention(attn.num_heads, bias, attn.scale)
    return attn.proj_drop(run_after(attn.proj, core, qkv, group=len(bias), reuse=True))


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(n, T, 3C) -> q, k, v, each (n, heads, T, C/heads) and contiguous, as batched products need them."""
    n, t, _ = qkv.shape
    q, k, v = qkv.view(n, t, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return q.contiguous(), k.contiguous(), v.contiguous()


def attention_weights(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale q kᵀ + bias), (n, heads, T, T)."""
    n, heads, t, _ = q.shape
    scores = bias.to(q.dtype).expand(n // len(bias), *bias.shape).reshape(n * heads, t, t)
    scores = torch.baddbmm(scores, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=scale)
    weights = torch.softmax(scores.view(n, heads, t, t), dim=-1)
    # timm's mask is -100, whose exponential is a denormal number: a CPU multiplies those many times slower. The mask
    # stays as it is, since at extreme logits -inf would be another function; what is no normal number becomes 0.
    return F.threshold(weights, TINY, 0.0) if len(bias) > 1 else weights


def weighted_sum(weights: Tensor, v: Tensor) -> Tensor:
    """(n, heads, T, T) and (n, heads, T, C/heads) -> (n, T, C)."""
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


@dataclass(frozen=True, eq=False)
class Attention:
    """Multi-head attention from q, k, v, with its gradient written out: no copies into and out of the fused layout."""

    heads: int
    bias: Tensor
    scale: float

    def __call__(self, qkv: Tensor) -> Tensor:
        """(n, T, 3C) -> (n, T, C)."""
        q, k, v = split_heads(qkv, self.heads)
        return weighted_sum(attention_weights(q, k, self.bias, self.scale), v)

    def parts(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, each (n, heads, T, C/heads), and the weights (n, heads, T, T)."""
        q, k, v = split_heads(qkv, self.heads)
        return q, k, v, attention_weights(q, k, self.bias, self.scale)

    def pull(self, du: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        """The gradient of qkv, (n, T, 3C), from that of the value, (n, T, C)."""
        n, t, c = du.shape
        do = du.view(n, t, self.heads, -1).transpose(1, 2).contiguous()  # (n, heads, T, C/heads)
        ds = torch.ops.aten._softmax_backward_data(do @ v.mT, weights, -1, weights.dtype).mul_(self.scale)
        dqkv = du.new_empty(n, t, 3 * c)
        dq, dk, dv = dqkv.view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        dq.copy_(ds @ k)
        dk.copy_(ds.mT @ q)
        dv.copy_(weights.mT @ do)
        return dqkv

    def vjp(self, qkv: Tensor) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
        """The value, and a function from its gradient to that of qkv."""
        parts = self.parts(qkv)
        shape = (*qkv.shape[:-1], qkv.shape[-1] // 3)
        return weighted_sum(parts[3], parts[2]), lambda du: [self.pull(du.view(shape), *parts)]


class KeptAttention(torch.autograd.Function):
    """`Attention` whose backward pass keeps q, k, v and the weights, as autograd would, and copies less than it.

    Args of ``apply``: the attention; qkv (n, T, 3C).
    """

    @staticmethod
    def forward(ctx: Any, attention: Attention, qkv: Tensor) -> Tensor:
        parts = attention.parts(qkv)
        ctx.attention = attention
        ctx.save_for_backward(*parts)
        return weighted_sum(parts[3], parts[2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, du: Tensor) -> tuple[None, Tensor]:
        return None, ctx.attention.pull(du, *ctx.saved_tensors)


def vit_block(block: Any, x: Tensor, *args: Tensor, **options: Tensor) -> Tensor:
    """timm's ViT Block.forward with a lean MLP half. (B, T, C) -> (B, T, C)"""
    if _in_the_way(block):
        return type(block).forward(block, x, *args, **options)
    x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), *args, **options)))
    return x + block.drop_path2(block.ls2(mlp(block.mlp, block.norm2, x)))
