"""Small trained models, each with parts that another program's format has names for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from composer_path.images.pixels import ImagePreparation, pad_color_of
from composer_path.records.prompts import get_template
from composer_path.records.tokenize import TextPreparation
from composer_path.records.vocabulary import load_tokenizer, num_ids
from composer_path.run.export import Trained
from composer_path.weights.assembly import assemble_model

REPO_ROOT = Path(__file__).resolve().parents[2]
IMAGES = REPO_ROOT / "test_data" / "imgs"
VOCABULARY = REPO_ROOT / "tests" / "golden" / "tiny_llama"
SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2}
CLIP = {
    "name": "timm/vit_base_patch16_clip_quickgelu_224.openai",
    "image_size": 32,
    "tokens": "patches",
    "kwargs": SMALL | {"final_norm": False, "norm_eps": 1e-5},
}
SIGLIP = {
    "name": "timm/vit_base_patch16_siglip_224.webli",
    "image_size": 32,
    "kwargs": SMALL | {"final_norm": False, "act_layer": "GELUTanh"},
}
COCA = {"name": "coca_vit-l", "image_size": 32, "kwargs": SMALL}
COCA_TOWER = {
    "name": "open_clip/coca_ViT-B-32",
    "image_size": 64,
    "tokens": "patches",
    "kwargs": {"width": 32, "layers": 2, "head_width": 16, "attn_pooler_heads": 4},
}
MLP = {"type": "mlp2x_gelu"}
POOLED = {"pooler": {"dim": 16, "num_queries": 4, "num_heads": 8}, "mlp": {"depth": 2}}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 50000.0,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}


def trained(
    vision: dict[str, Any] = CLIP,
    projector: dict[str, Any] = MLP,
    language: dict[str, Any] | None = None,
    *,
    fit: Any = "pad",
    template: Any = "llava_llama_2",
    lora: dict[str, Any] | None = None,
    vocabulary: Path = VOCABULARY,
) -> Trained:
    """A model of these parts; norms and biases aren't what they begin as, so that none is lost unseen."""
    tokenizer = load_tokenizer(vocabulary)
    config = LLAMA | {"vocab_size": num_ids(tokenizer)} | (language or {})
    model = assemble_model(
        vision_encoder=vision,
        projector=projector,
        language_model={"config": config},
        trainable=["projector"] if lora else ["projector", "language_model", "vision_encoder"],
        lora=lora,
        attention="sdpa",
    )
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    text = TextPreparation(get_template(template), model.num_image_tokens(), 256)
    images = ImagePreparation(
        model.vision_encoder.image_size, fit=fit, pad_color=pad_color_of(model.vision_encoder.mean)
    )
    return Trained(model.eval(), dict(model.state_dict()), tokenizer, text, images, ["projector", "language_model"])


def pixels_of(found: Trained, *names: str) -> torch.Tensor:
    """Normalised images of test_data."""
    from composer_path.images.pixels import normalize_image

    encoder = found.model.vision_encoder
    loaded = torch.stack([found.images.load((IMAGES / name).read_bytes()) for name in names])
    return normalize_image(loaded, mean=encoder.mean, std=encoder.std)


def prompt_of(found: Trained, question: str, num_images: int = 1) -> torch.Tensor:
    """Ids of a question about images, which stand as negative ids."""
    from composer_path.records.conversation import Conversation, Turn

    turn = Turn("human", "<image>\n" * num_images + question)
    return found.text.prompt(Conversation(turns=(turn,), images=("",) * num_images), found.tokenizer)


def logits_of(found: Trained, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Our logits at every position of one prompt."""
    length = len(ids)
    with torch.no_grad():
        return found.model(
            ids,
            torch.arange(length),
            torch.tensor([0, length], dtype=torch.int32),
            length,
            pixels,
            (ids < 0).nonzero()[:, 0],
        )
