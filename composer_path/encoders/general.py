"""Encoders of everyday images that pathology builds on, and the reference's own."""

from __future__ import annotations

from composer_path.encoders.recipe import HALF, IMAGENET, Recipe

DINOV2 = ("github.com/facebookresearch/dinov2: dinov2/hub/backbones.py", "timm/models/vision_transformer.py")
DINOV3 = ("github.com/facebookresearch/dinov3: dinov3/hub/backbones.py", "timm/models/eva.py")
SIGLIP2 = (
    "timm/models/vision_transformer.py (the configurations of v2_webli)",
    "transformers/models/siglip/configuration_siglip.py (hidden_act gelu_pytorch_tanh)",
)
# Of DINOv3's satellite images.
SATELLITE = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)


def _dinov2(size: str, registers: int = 0) -> Recipe:
    name = f"timm/vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
    file = "the DINOv2 repository's, timm's or transformers'"
    return Recipe(name, 518, 14, IMAGENET, file, DINOV2, num_prefix_tokens=1 + registers)


def _dinov3(size: str, normalization: tuple = IMAGENET, biases: bool = True) -> Recipe:
    name = f"timm/vit_{size}_patch16_dinov3{'_qkvb' if biases else ''}"
    file = "the DINOv3 repository's, timm's or transformers'"
    return Recipe(name, 256, 16, normalization, file, DINOV3, num_prefix_tokens=5)


def _siglip2(size: str, patch_size: int, image_size: int) -> Recipe:
    name = f"timm/vit_{size}_patch{patch_size}_siglip_{image_size}"
    # timm has exact GELU for some of them, transformers the tanh form for all
    activation = {"act_layer": "gelu_tanh"}
    return Recipe(name, image_size, patch_size, HALF, "transformers' SigLIP", SIGLIP2, activation, num_prefix_tokens=0)


GENERAL = {
    "coca_vit-l": Recipe(
        "timm/vit_large_patch16_224",
        448,
        16,
        IMAGENET,
        "timm under `vision_tower.`, as the reference keeps it",
        ("the reference's model (docs/models.md, Coming from the reference)",),
        {"init_values": 1.0},
    ),
    **{f"dinov2-{size}": _dinov2(size) for size in ("small", "base", "large", "giant")},
    **{f"dinov2-{size}-reg": _dinov2(size, 4) for size in ("small", "base", "large", "giant")},
    **{
        f"dinov3-{size.replace('_', '-')}": _dinov3(size)
        for size in ("small", "small_plus", "base", "large", "huge_plus")
    },
    "dinov3-7b": _dinov3("7b", biases=False),
    "dinov3-large-sat": _dinov3("large", SATELLITE),
    "dinov3-7b-sat": _dinov3("7b", SATELLITE, biases=False),
    "siglip2-base-patch32-256": _siglip2("base", 32, 256),
    **{f"siglip2-base-patch16-{side}": _siglip2("base", 16, side) for side in (224, 256, 384, 512)},
    **{f"siglip2-large-patch16-{side}": _siglip2("large", 16, side) for side in (256, 384, 512)},
    **{f"siglip2-so400m-patch14-{side}": _siglip2("so400m", 14, side) for side in (224, 378)},
    **{f"siglip2-so400m-patch16-{side}": _siglip2("so400m", 16, side) for side in (256, 384, 512)},
    **{f"siglip2-giant-opt-patch16-{side}": _siglip2("giantopt", 16, side) for side in (256, 384)},
}
