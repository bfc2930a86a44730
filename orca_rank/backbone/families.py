"""How the transformers of timm come apart into embedder | body | predictor, family by family.

The body is the timm model itself without its first part and its head, so the names of its modules, and with them the
keys of rank plans and adapters, are timm's own. `FAMILIES` is all that is known; another class of models is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.backbone.embedder import Embedder, Patches, Stem, pair
from orca_rank.backbone.the_timm import PatchEmbed
from orca_rank.predictors import Stages

# What a stage, or the whole body, returned; the body; the stage's module; whether it is the whole; its tokens (h, w).
Maps = Callable[[Any, nn.Module, str, bool, tuple[int, int]], Tensor]


class Entry(nn.Module):
    """What stands where the first part was: hands the embedder's tokens (B, h, w, d) on as the body takes them."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, x: Tensor, mask: None = None) -> Any:
        if self.layout == "first":
            return x.permute(0, 3, 1, 2)  # (B, d, h, w)
        if self.layout == "flat":
            return x.flatten(1, 2)  # (B, N, d)
        return (x.flatten(1, 2), x.shape[1:3]) if self.layout == "sized" else x


def last(x: Any, body: nn.Module, module: str, whole: bool, grid: tuple[int, int]) -> Float[Tensor, "b h w d"]:
    """Tokens at their places: maps as they are, a row of tokens without those that stand for no place (the first)."""
    if isinstance(x, tuple):  # (tokens, their grid)
        x, grid = x[0], pair(x[1])
    if x.ndim == 4:
        return x
    h, w = grid
    return x[:, x.shape[1] - h * w :].unflatten(1, (h, w))  # (B, N, d) -> (B, h, w, d)


def first(x: Any, body: nn.Module, module: str, whole: bool, grid: tuple[int, int]) -> Float[Tensor, "b h w d"]:
    """Maps with their channels first."""
    return x.permute(0, 2, 3, 1)


def rolled(x: Any, body: Any, module: str, whole: bool, grid: tuple[int, int]) -> Float[Tensor, "b h w d"]:
    """Hiera's tokens, which lie unit by unit until they are rolled back."""
    return body.reroll(x, int(module.rpartition(".")[2]))


class Family(NamedTuple):
    """How models of one of timm's classes come apart.

    stem: the module that becomes the embedder. layout: in which the body takes what it returns: "own" (as the embedder
    gives it), "first", "flat" or "sized", see `Entry`. channels_first: of what the stem returns. maps: what a stage
    returns, and the whole body, to (B, h, w, d). shown: names of timm models that stand for the family, in tables.
    prepare: changes a model once, after its weights are loaded.
    """

    name: str
    shown: str
    stem: str = "patch_embed"
    layout: str = "own"
    channels_first: bool = False
    maps: Maps = last
    prepare: Callable[[Any], None] = lambda model: None


def without_class_blocks(model: Any) -> None:
    """CaiT: the blocks in which a class token reads the others are left out, since predictors read the others."""
    model.blocks_token_only = nn.ModuleList()


def stages_by_their_name(model: Any) -> None:
    """MViT: timm's list of stages calls them otherwise than the model does."""
    model.feature_info = [{**stage, "module": f"stages.{i}"} for i, stage in enumerate(model.feature_info)]


def without_hidden_layer(model: Any) -> None:
    """MaxViT: the layer between the last stage's norm and the classes belongs to the classes."""
    model.head.pre_logits = nn.Identity()


def neck_as_stage(model: Any) -> None:
    """SAM: what the neck returns is the last stage, of the neck's own width."""
    convolutions = [module for module in model.neck.modules() if isinstance(module, nn.Conv2d)]
    if convolutions:
        *before, end = model.feature_info
        model.feature_info = [*before, {**end, "num_chs": convolutions[-1].out_channels}]


def first_at_the_end(x: Tensor, body: Any, module: str, whole: bool, grid: tuple[int, int]) -> Float[Tensor, "b h w d"]:
    """SAM's blocks give (B, h, w, d), its neck (B, d, h, w)."""
    return x.permute(0, 2, 3, 1) if whole else x


FAMILIES: Mapping[str, Family] = {
    "SwinTransformer": Family("Swin, Swin-S3", "swin_tiny_patch4_window7_224"),
    "SwinTransformerV2": Family("SwinV2", "swinv2_tiny_window8_256"),
    "SwinTransformerV2Cr": Family("SwinV2-CR", "swinv2_cr_tiny_224", layout="first", maps=first),
    "VisionTransformer": Family("ViT, DeiT-3, DINOv2, SigLIP", "vit_small_patch16_224"),
    "Eva": Family("EVA-02, DINOv3, RoPE-ViT", "eva02_tiny_patch14_224"),
    "Beit": Family("BEiT", "beit_base_patch16_224"),
    "VisionTransformerRelPos": Family("ViT with relative positions", "vit_relpos_small_patch16_224"),
    "Cait": Family("CaiT", "cait_xxs24_224", prepare=without_class_blocks),
    "VisionTransformerSAM": Family("SAM-ViT", "samvit_base_patch16", maps=first_at_the_end, prepare=neck_as_stage),
    "Hiera": Family("Hiera", "hiera_tiny_224", layout="flat", maps=rolled),
    "MultiScaleVit": Family("MViTv2", "mvitv2_tiny", layout="sized", prepare=stages_by_their_name),
    "PyramidVisionTransformerV2": Family("PVTv2", "pvt_v2_b0", maps=first),
    "ConvNeXt": Family("ConvNeXt", "convnext_tiny", "stem", "first", True, first),
    "MaxxVit": Family("MaxViT", "maxvit_tiny_tf_224", "stem", "first", True, first, without_hidden_layer),
    "DaVit": Family("DaViT", "davit_tiny", "stem", "first", True, first),
    "TinyVit": Family("TinyViT", "tiny_vit_5m_224", "patch_embed", "first", True, first),
}


def family_of(model: nn.Module, name: str = "this body") -> Family:
    """The family of a timm model.

    Raises:
        ValueError: for a model that is not known to come apart.
    """
    found = FAMILIES.get(type(model).__name__)
    stem = getattr(model, found.stem, None) if found is not None else None
    if found is None or stem is None:
        raise ValueError(
            f"{name} is a {type(model).__name__}, of which it is not known how it comes apart into patch_embed and "
            f"body: choose for backbone.name one of {', '.join(family.name for family in FAMILIES.values())}"
        )
    if type(stem).__name__ == "HybridEmbed":
        raise ValueError(
            f"{name} has a whole convolutional network for its patch_embed, which cannot be made for other channels: "
            f"choose a ViT with plain patches for backbone.name"
        )
    return found


def image_size(model: Any, name: str = "this body") -> tuple[int, int]:
    """(height, width) of the images that a timm model reads."""
    if has_own_size(model):
        return pair(model.patch_embed.img_size)
    found = getattr(model, "input_pixels", None)
    return pair(model.default_cfg["input_size"][1:] if found is None else found)


def has_own_size(model: Any) -> bool:
    """Whether a timm model says itself what size its images have; else backbone.options.img_size does, or timm's config
    of the model."""
    return getattr(getattr(model, "patch_embed", None), "img_size", None) is not None


def embedder_of(model: Any, shape: tuple[int, int, int], init: str, name: str = "this body") -> Embedder:
    """The first part of a timm model as the embedder of a target.

    Args:
        shape: (C, H, W) of the target. init: see `Embedder`.

    Raises:
        ValueError: see `family_of`.
    """
    family = family_of(model, name)
    stem = model.get_submodule(family.stem)
    if _plain(stem):
        return Patches(stem, shape, init)
    stem = Unpacked(stem, type(model).__name__) if family.layout in ("flat", "sized") else stem
    return Stem(stem, family.channels_first, image_size(model, name), shape, init)


def channels_of(model: nn.Module) -> int:
    """Channels of the images that a timm model was made for."""
    stem = model.get_submodule(family_of(model).stem)
    return next(module.in_channels for module in stem.modules() if isinstance(module, nn.Conv2d))


class Unpacked(nn.Module):
    """Hiera's and MViT's patch embeddings as maps (B, h, w, d): their convolution alone, whose output they flatten."""

    def __init__(self, patch_embed: Any, family: str) -> None:
        super().__init__()
        self.proj = patch_embed.proj

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b h w d"]:
        return self.proj(x).permute(0, 2, 3, 1)


def _plain(stem: Any) -> bool:
    """Whether a stem is patches without overlap, which `Patches` stands for."""
    sizes = all(hasattr(stem, name) for name in ("proj", "norm", "img_size", "grid_size"))
    return isinstance(stem, PatchEmbed) or (sizes and stem.proj.kernel_size == stem.proj.stride)


def body_of(model: nn.Module) -> nn.Module:
    """The timm model with its first part taken out, in place."""
    family = family_of(model)
    plain = family.layout == "own"
    model.set_submodule(family.stem, nn.Identity() if plain else Entry(family.layout))
    return model


def stages_of(model: Any) -> Stages:
    """The stages of a timm model that still has its first part."""
    info = feature_info(model)
    widths, reductions = (tuple(int(stage[key]) for stage in info) for key in ("num_chs", "reduction"))
    return Stages(widths, reductions, image_size(model))


def feature_info(model: Any) -> Sequence[Mapping[str, Any]]:
    """timm's list of the stages of a hierarchy, or the blocks of a ViT: module, num_chs, reduction. A stem among them
    is part of the embedder and left out."""
    found: Iterable[Mapping[str, Any]] = model.feature_info
    stem = family_of_class(model).stem
    return [stage for stage in found if str(stage["module"]).partition(".")[0] != stem]


def family_of_class(model: nn.Module) -> Family:
    """The family of a model that may have lost its first part already."""
    return FAMILIES.get(type(model).__name__, FAMILIES["VisionTransformer"])


def maps_of(
    body: nn.Module, found: Mapping[str, Any], wanted: Sequence[str], image: tuple[int, int]
) -> list[Float[Tensor, "b _h _w _d"]]:
    """What stages returned as maps.

    Args:
        found: stage -> what it returned; the last stage's is that of the whole body. wanted: stages. image: (H, W).
    """
    family, info = family_of_class(body), feature_info(body)
    names = [str(stage["module"]) for stage in info]
    reductions = dict(zip(names, (int(stage["reduction"]) for stage in info), strict=True))
    placed = []
    for name in wanted:
        grid = (-(-image[0] // reductions[name]), -(-image[1] // reductions[name]))
        placed.append(family.maps(found[name], body, name, name == names[-1], grid))
    return placed
