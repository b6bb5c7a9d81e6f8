"""Tiny vision towers of transformers', with random weights, and their tokens; what is compared with our encoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OURS: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 4}


def transformers_model(name: str, **config: Any) -> Any:
    """A tiny model of transformers', whose every tensor is random, so that none can be mistaken for another."""
    if not hasattr(transformers, f"{name}Model"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return shaken(getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config)))


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


def last(model: Any, size: int) -> torch.Tensor:
    """Tokens of a model of transformers' after its final norm, positions interpolated by itself."""
    vision = model.vision_model if hasattr(model, "vision_model") else model
    kinds = ("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel")  # which always interpolate
    words = {} if type(model).__name__ in kinds else {"interpolate_pos_encoding": True}
    tokens = vision(images(size), **words).last_hidden_state
    return vision.post_layernorm(tokens) if type(model).__name__.startswith("CLIP") else tokens
