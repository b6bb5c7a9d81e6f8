"""Tiny models of many makes, in the folders that transformers loads, and one prompt over two images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_path import PathMLLM
from composer_path.hugging_face.image_token import ImageToken, with_image_row
from composer_path.models.language_model import untrained_language_model
from composer_path.models.projector import untrained_projector
from composer_path.models.vision_encoder import untrained_vision_encoder

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}
ENCODERS: dict[str, dict[str, Any]] = {
    "coca": {"name": "coca_vit-l", "image_size": 32, "kwargs": SMALL},
    "rope": {
        "name": "timm/vit_medium_patch16_rope_reg1_gap_256",
        "image_size": 32,
        "tokens": "patches",
        "kwargs": SMALL,
    },
    "eva": {"name": "timm/eva02_tiny_patch14_224", "image_size": 28, "kwargs": SMALL},
    "eva, fused": {"name": "timm/eva02_enormous_patch14_clip_224", "image_size": 28, "kwargs": SMALL},
    "learned rope": {"name": "timm/vit_small_patch16_rope_mixed_224", "image_size": 32, "kwargs": SMALL},
    "registers": {
        "name": "timm/vit_small_patch14_reg4_dinov2",
        "image_size": 28,
        "tokens": "cls_patches",
        "kwargs": SMALL,
    },
    "dinov3": {"name": "timm/vit_small_patch16_dinov3", "image_size": 32, "kwargs": SMALL},
    "clip": {"name": "open_clip/ViT-B-32", "image_size": 64, "kwargs": {"layers": 1, "width": 64, "head_width": 32}},
}
POOLER = {"dim": 16, "num_queries": 3, "num_heads": 2}
PROJECTORS: dict[str, dict[str, Any]] = {
    "reference pooler": {"pooler": {"kind": "reference", **POOLER}},
    "open_clip pooler": {"pooler": {"kind": "open_clip", **POOLER}, "mlp": {"depth": 1}},
    "mlp2x_gelu": {"type": "mlp2x_gelu"},
}
LLAMA = {
    **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def tiny_path_mllm(
    encoder: str = "coca", projector: str = "reference pooler", language_model: dict[str, Any] | None = None
) -> PathMLLM:
    """A random model of a make; the same each time."""
    torch.manual_seed(5)
    vision = untrained_vision_encoder(**ENCODERS[encoder])
    llm = untrained_language_model(language_model or LLAMA)
    config: Any = llm.config
    between = untrained_projector(in_dim=vision.dim, out_dim=config.hidden_size, **PROJECTORS[projector])
    return PathMLLM(vision, between, llm).eval()


def exported(model: PathMLLM, folder: Path) -> PathMLLM:
    """A model with an image's token behind the others, written to a folder and read again."""
    token = ImageToken("<image>", model.num_embeddings())
    weights = with_image_row(model.language_model, model.state_dict(), token)
    model.save_pretrained(folder, state_dict=weights, image_token_id=token.id)
    return PathMLLM.from_pretrained(folder)


def two_images(model: PathMLLM) -> Tensor:
    """Two different ones of the encoder's size."""
    size = model.vision_encoder.image_size
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def prompt_of(model: PathMLLM, words: list[list[int]], id: int) -> Tensor:
    """Words with an image between each two of them; `id` stands for an image's vectors."""
    image = [id] * model.num_image_tokens()
    ids = list(words[0])
    for more in words[1:]:
        ids += [*image, *more]
    return torch.tensor(ids)
