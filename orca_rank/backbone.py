"""A timm vision transformer as embedder | body | predictor (ORCA, arXiv 2302.05738, section 3).

The body is the timm model itself without its patch embedding and head, so the names of its modules, and with them the
keys of rank plans and adapters, are timm's own.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.measuring.passes import watch
from orca_rank.predictors import Stages
from orca_rank.predictors.orca import orca
from orca_rank.task import Task
from orca_rank.weights.file import load_weights

_there = "wandb" in sys.modules
if not _there:  # timm imports it for its own training scripts alone, which takes a second
    sys.modules["wandb"] = None  # type: ignore[assignment]  # Python's own way to say: not to be found
import timm  # noqa: E402
from timm.layers import PatchEmbed  # noqa: E402

if not _there:
    del sys.modules["wandb"]


class Embedder(nn.Module):
    """Image → tokens: resize → convolution with kernel = stride = patch → normalisation, as in ORCA.

    Args:
        patch_embed: the timm patch embedding whose geometry, and with init="pretrained" whose weights, are taken over.
        in_channels: channels C of the target.
        init: "pretrained" tiles the pretrained filters over the target's channels; "random" draws anew
            (truncated normal, std 0.02).

    Raises:
        ValueError: for another `init`.
    """

    def __init__(self, patch_embed: PatchEmbed, in_channels: int, init: str) -> None:
        super().__init__()
        if init not in ("pretrained", "random"):
            raise ValueError(f"embedder.init must be 'pretrained' or 'random', received {init!r}")
        old = patch_embed.proj
        self.image_size = _pair(patch_embed.img_size)
        self.grid = _pair(patch_embed.grid_size)  # tokens (h, w)
        self.flatten = bool(patch_embed.flatten)
        self.proj = nn.Conv2d(
            in_channels, old.out_channels, _pair(old.kernel_size), _pair(old.stride), bias=old.bias is not None
        )
        self.norm = copy.deepcopy(patch_embed.norm)
        with torch.no_grad():
            if init == "pretrained":
                copies = -(-in_channels // old.in_channels)
                self.proj.weight.copy_(old.weight.repeat(1, copies, 1, 1)[:, :in_channels])
                if self.proj.bias is not None and old.bias is not None:
                    self.proj.bias.copy_(old.bias)
            else:
                nn.init.trunc_normal_(self.proj.weight, std=0.02)
                if self.proj.bias is not None:
                    nn.init.zeros_(self.proj.bias)
                if isinstance(self.norm, nn.LayerNorm):
                    self.norm.reset_parameters()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b ..."]:
        if x.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"this embedder was made for {self.proj.in_channels} channels, received images of shape "
                f"{tuple(x.shape)}"
            )
        if x.shape[-2:] != self.image_size:
            x = F.interpolate(x, self.image_size, mode="bilinear", antialias=True)
        x = self.proj(x).permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H/p, W/p, d)
        return self.norm(x.flatten(1, 2) if self.flatten else x)  # ViT: (B, N, d); Swin: (B, H/p, W/p, d)


class OrcaModel(nn.Module):
    """predictor(body(embedder(x))); x (B, C, H, W), the output as the task asks.

    What a predictor receives is said in `orca_rank.predictors`.
    """

    def __init__(self, embedder: nn.Module, body: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.embedder, self.body, self.predictor = embedder, body, predictor

    def forward(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        return self.head(self.embedder(x))

    def head(self, tokens: Float[Tensor, "b ... d"]) -> Tensor:
        """The output from the embedder's tokens."""
        reads = getattr(self.predictor, "reads", None)
        return self.predictor(self.body(tokens) if reads is None else self.maps(tokens, reads))

    def maps(self, tokens: Float[Tensor, "b ... d"], reads: Sequence[int]) -> list[Float[Tensor, "b _h _w _d"]]:
        """Feature maps of the stages `reads`. Those before the last are watched for this call, so the body keeps its
        names, its adapters and its own forward pass."""
        names = [str(info["module"]) for info in _feature_info(self.body)]
        wanted = [names[i] for i in reads]
        found: dict[str, Tensor] = {}
        modules = {name: self.body.get_submodule(name) for name in {*wanted} - {names[-1]}}
        with watch(modules, lambda name, _, x: found.update({name: x})):
            found[names[-1]] = self.body(tokens)
        return [self._placed(found[name]) for name in wanted]

    def _placed(self, x: Float[Tensor, "b ... d"]) -> Float[Tensor, "b h w d"]:
        """A ViT's tokens at their places, those that stand for no place (the first) left out."""
        if x.ndim == 4:
            return x
        grid: Any = self.embedder.grid
        h, w = grid
        return x[:, x.shape[1] - h * w :].unflatten(1, (h, w))  # (B, N, d) -> (B, h, w, d)


def create_timm(backbone: Mapping[str, Any]) -> nn.Module:
    """The timm model that a backbone config names, with its weights, without pooling or classes.

    Args:
        backbone: name: any timm transformer; pretrained: true (timm's hub), false (random) or a path to a file of
            weights (safetensors, or a torch state dict); options: passed on to timm.create_model.

    Raises:
        ValueError: unknown name or options, or a file that does not fit. FileNotFoundError: no such file.
        ConnectionError: the hub cannot be reached.
    """
    name, options, source = backbone["name"], dict(backbone.get("options") or {}), backbone["pretrained"]
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {name!r}; close: {', '.join(close) or 'none'}: set backbone.name")
    options.update(num_classes=0, global_pool="")
    try:
        model = timm.create_model(name, pretrained=False, **options)
        if source is True:
            model = _from_hub(name, options)
    except TypeError as error:
        raise ValueError(f"timm's {name} does not take these backbone.options: {options} ({error})") from error
    patch_embedding(model, name)
    if isinstance(source, str):
        load_weights(model, Path(source))
    return model


def patch_embedding(body: nn.Module, name: str = "this body") -> PatchEmbed:
    """The patch embedding of a timm model.

    Raises:
        ValueError: it has none that this program can replace by one for other channels.
    """
    found = getattr(body, "patch_embed", None)
    if not isinstance(found, PatchEmbed):
        raise ValueError(
            f"{name} has no plain convolutional patch_embed: choose a Swin, SwinV2, ViT, DeiT-3, BEiT or EVA-02 for "
            f"backbone.name"
        )
    return found


def stages_of(body: nn.Module) -> Stages:
    """The stages of a timm model that still has its patch embedding."""
    info = _feature_info(body)
    widths, reductions = (tuple(int(stage[key]) for stage in info) for key in ("num_chs", "reduction"))
    return Stages(widths, reductions, _pair(patch_embedding(body).img_size))


def _feature_info(body: nn.Module) -> Sequence[Mapping[str, Any]]:
    """timm's list of the stages of a hierarchy, or the blocks of a ViT: module, num_chs, reduction."""
    info: Any = body.feature_info
    return info


def _pair(sizes: Sequence[int] | None) -> tuple[int, int]:
    height, width = sizes or ()
    return int(height), int(width)


def _from_hub(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:
        raise ConnectionError(
            f"could not get pretrained weights of {name} from timm's hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no detail'}): set backbone.pretrained=<path of a weights "
            f"file>, or backbone.pretrained=false for random weights"
        ) from error


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the names and values of a module's parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def create_model(
    backbone: Mapping[str, Any],
    task: Task,
    embedder_init: str = "pretrained",
    predictor: Callable[[Stages, tuple[int, ...]], nn.Module] = orca,
) -> OrcaModel:
    """Embedder for the task's channels, pretrained body, freshly initialised predictor.

    Args:
        backbone: the backbone config (see `create_timm`). task: the target. embedder_init: see `Embedder`.
        predictor: makes the predictor, see `orca_rank.predictors`.
    """
    body = create_timm(backbone)
    embedder = Embedder(patch_embedding(body), task.input_shape[0], embedder_init)
    head = predictor(stages_of(body), task.output_shape)
    body.patch_embed = nn.Identity()
    return OrcaModel(embedder, body, head)


def source_model(backbone: Mapping[str, Any]) -> OrcaModel:
    """The pretrained patch embedding and body, frozen and in eval mode: what source data pass through."""
    body = create_timm(backbone)
    patch_embed = patch_embedding(body)
    embedder = Embedder(patch_embed, patch_embed.proj.in_channels, "pretrained")
    body.patch_embed = nn.Identity()
    return OrcaModel(embedder, body, nn.Identity()).requires_grad_(False).eval()
