"""A model of every family of transformers, as small as its options make it."""

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
PYRAMID = {"img_size": 64, "depths": (1, 1, 1, 1)}
TINY: dict[str, tuple[str, dict[str, object]]] = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swin_s3": ("swin_s3_tiny_224", {**SWIN, "window_size": (4, 4)}),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
    "swinv2_cr": ("swinv2_cr_tiny_224", SWIN),
    "vit": ("vit_small_patch16_224", {**VIT, "img_size": (32, 48)}),
    "deit3": ("deit3_small_patch16_224", VIT),
    "dinov2": ("vit_small_patch14_reg4_dinov2", VIT),
    "dinov3": ("vit_small_patch16_dinov3", VIT),
    "siglip": ("vit_base_patch16_siglip_224", VIT),
    "beit": ("beit_base_patch16_224", VIT),
    "eva02": ("eva02_tiny_patch14_224", VIT),
    "cait": ("cait_xxs24_224", VIT),
    "relpos": ("vit_relpos_small_patch16_224", VIT),
    "sam": ("samvit_base_patch16", {**VIT, "window_size": 2, "global_attn_indexes": (1,), "neck_chans": 16}),
    "hiera": ("hiera_tiny_224", {"img_size": 64, "embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)}),
    "pvt": ("pvt_v2_b0", {**PYRAMID, "embed_dims": (8, 16, 20, 32)}),
    "convnext": ("convnext_tiny", {**PYRAMID, "dims": (8, 16, 24, 32)}),
    "davit": ("davit_tiny", {**PYRAMID, "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}),
    "tinyvit": ("tiny_vit_5m_224", {**PYRAMID, "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}),
    "maxvit": ("maxvit_tiny_tf_224", {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 32), "stem_width": 8}),
    "mvit": ("mvitv2_tiny", {"img_size": 64}),
}
SLOW = ("mvit",)  # no options make it small
# What is refused, and a word of why.
REFUSED = {
    "crossvit_tiny_240": "tokens at places",
    "deit_tiny_distilled_patch16_224": "tokens at places",
    "nest_tiny": "a Nest, of which it is not known",
    "resnet18": "a ResNet, of which it is not known",
    "xcit_nano_12_p16_224": "a Xcit",
    "vit_small_r26_s32_224": "a whole convolutional network",
    "vit_base_patch16_xp_224": r"matches none of the body's 36 Linear modules",
}


def backbone(family: str) -> dict[str, object]:
    """The backbone config of a family's tiny model, with random weights."""
    name, options = TINY[family]
    return {"name": name, "pretrained": False, "options": options}
