"""Public encoders at the reference's 448 px: tiny twins of the published files against transformers' own forward pass.

Positions are those of the file's image size, brought to 448 px by transformers' interpolation there and by ours here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_towers import OURS, SIZES, error, images, last, transformers_model

from composer_path.encoders.table import ENCODERS
from composer_path.weights.vision_file import build_vision_encoder

VIT = {**SIZES, "intermediate_size": 128}
OF_CLIP = {"width": 32, "layers": 2, "head_width": 8}
# Hidden widths of a gated MLP are rounded to eights, which the recipe's ratio is for its own width only.
ROUNDED = {"hibou-b": {"mlp_ratio": 5.5}}
# Of each: what its file is to transformers, with what the recipe doesn't say of its architecture.
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "phikon": ("ViT", VIT),
    "phikon-v2": ("Dinov2", SIZES),
    "dinov2-base": ("Dinov2", SIZES),
    "dinov2-base-reg": ("Dinov2WithRegisters", SIZES),
    "hibou-b": ("Dinov2WithRegisters", {**SIZES, "use_swiglu_ffn": True}),
    "dinov3-base": ("DINOv3ViT", {**VIT, "num_register_tokens": 4}),
    "plip": ("CLIPVision", VIT),
    "medsiglip": ("SiglipVision", {**VIT, "intermediate_size": 119}),
    "siglip2-base-patch16-224": ("SiglipVision", VIT),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_public_file_gives_its_own_tokens_at_448_px(tmp_path: Path, name: str) -> None:
    recipe, (family, config) = ENCODERS[name], TWINS[name]
    made_at = 896 if name == "medsiglip" else recipe.image_size  # its own size is 448 already
    model = transformers_model(family, **config, image_size=made_at, patch_size=recipe.patch_size)
    model.save_pretrained(tmp_path)
    kwargs = OF_CLIP if recipe.base.startswith("open_clip/") else OURS | ROUNDED.get(name, {})
    encoder = build_vision_encoder(name, image_size=448, kwargs=kwargs, weights=str(tmp_path)).eval()
    ours = encoder(images(448))
    assert ours.shape[1] == encoder.num_tokens(448, 448) == (448 // recipe.patch_size) ** 2 + recipe.num_prefix_tokens
    assert error(ours, last(model, 448)) < 1e-5  # measured 0 on a CPU
