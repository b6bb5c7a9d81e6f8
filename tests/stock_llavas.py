"""Tiny LLaVAs as transformers, and LLaVA's own code, write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration

IMAGE_TOKEN = 95
TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "rope_theta": 50000.0,
    "initializer_range": 0.3,
}
VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}
SIGLIP = VISION | {"model_type": "siglip_vision_model"}
del SIGLIP["projection_dim"]


def stock_llava(folder: Path, vision: dict[str, Any] = VISION, text: dict[str, Any] | None = None, **more: Any) -> Any:
    """Write a stock LLaVA with random weights; returns it as it was loaded again."""
    torch.manual_seed(5)
    config = LlavaConfig(
        vision_config=dict(vision), text_config=TEXT | (text or {}), image_token_index=IMAGE_TOKEN, **more
    )
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return LlavaForConditionalGeneration.from_pretrained(folder).eval()


def old_llava(folder: Path, stock: Path, tower: Path | None = None) -> None:
    """Write what a stock LLaVA's folder holds as LLaVA's own code would: flat, the tower inside, or in `tower`."""
    config = json.loads((stock / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    rope = text.pop("rope_parameters", None)
    text |= {"rope_theta": 50000.0} if rope else {}
    named = {"mm_vision_tower": "openai/clip" if tower is None else str(tower), "mm_projector_type": "mlp2x_gelu"}
    flat = text | named | {"model_type": "llava", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    renamed, inside = {}, {}
    for key, value in load_file(stock / "model.safetensors").items():
        bare = key.removeprefix("model.")
        if bare.startswith("vision_tower."):
            inside[bare.removeprefix("vision_tower.").removeprefix("vision_model.")] = value
            if tower is None:
                renamed[f"model.vision_tower.{bare}"] = value
        elif bare.startswith("multi_modal_projector."):
            _, layer, kind = bare.split(".")
            renamed[f"model.mm_projector.{'0' if layer == 'linear_1' else '2'}.{kind}"] = value
        else:
            bare = bare.removeprefix("language_model.").removeprefix("model.")
            renamed[bare if bare.startswith("lm_head") else f"model.{bare}"] = value
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(flat))
    save_file(renamed, folder / "model.safetensors")
    if tower is not None:
        tower.mkdir()
        (tower / "config.json").write_text(json.dumps(vision))
        names = AutoModel.from_config(LlavaConfig(**config).vision_config).state_dict()
        prefix = "vision_model." if any(key.startswith("vision_model.") for key in names) else ""
        save_file({prefix + key: value for key, value in inside.items()}, tower / "model.safetensors")
