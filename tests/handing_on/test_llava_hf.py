"""A stock LLaVA that an export wrote is the model that was trained: logits, tokens and pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from handed_models import CLIP, COCA, COCA_TOWER, IMAGES, MLP, POOLED, SIGLIP, logits_of, pixels_of, prompt_of, trained
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, LlavaForConditionalGeneration

from composer_path.handing_on.llava_hf import write_llava_hf

PICTURES = sorted(path.name for path in IMAGES.iterdir())[:2]
KINDS: dict[str, dict[str, Any]] = {
    "clip": {"vision": CLIP},
    "clip with its class token": {"vision": CLIP | {"tokens": "all"}},
    "siglip": {"vision": SIGLIP},
    "an open_clip tower without a final norm": {"vision": COCA_TOWER},
    "tied": {"language": {"tie_word_embeddings": True}},
    "qwen2": {"language": {"model_type": "qwen2"}},
    "qwen3": {"language": {"model_type": "qwen3", "head_dim": 8}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_llava_gives_our_logits_and_our_greedy_tokens(tmp_path: Path, kind: str) -> None:
    found = trained(**KINDS[kind])
    write_llava_hf(tmp_path / "out", found)
    stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ids, pixels = prompt_of(found, "What is shown?", 2), pixels_of(found, *PICTURES)
    theirs_ids = torch.where(ids < 0, config["image_token_index"], ids)[None]
    ours = logits_of(found, ids, pixels)
    with torch.no_grad():
        theirs = stock(input_ids=theirs_ids, pixel_values=pixels).logits[0]
    known = ours.shape[-1]
    assert (ours - theirs[:, :known]).abs().max() <= 1e-5 * ours.abs().max()  # measured 7e-7
    ends = stock.generation_config.eos_token_id
    mine = found.model.generate(ids, pixels, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    said = stock.generate(
        input_ids=theirs_ids,
        pixel_values=pixels,
        attention_mask=torch.ones_like(theirs_ids),
        max_new_tokens=12,
    )
    assert said[0, ids.shape[0] :].tolist() == mine.tolist()
    assert len(set(mine.tolist())) > 3


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_its_image_processor_gives_our_pixels(tmp_path: Path, fit: str) -> None:
    found = trained(fit=fit)
    write_llava_hf(tmp_path / "out", found)
    processor: Any = AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False)
    for name in PICTURES:
        image = Image.open(IMAGES / name)
        image = image.crop((0, 0, image.width, image.height * 2 // 3))
        image.save(tmp_path / "wide.png")
        theirs = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"])
        ours = found.images.load((tmp_path / "wide.png").read_bytes())
        from composer_path.images.pixels import normalize_image

        encoder = found.model.vision_encoder
        expected = normalize_image(ours[None], mean=encoder.mean, std=encoder.std)
        assert theirs.shape == expected.shape
        assert (theirs - expected).abs().max() < 1e-5  # their rounding of 1/255


def test_its_processor_writes_as_many_image_tokens_as_the_model_makes_vectors(tmp_path: Path) -> None:
    for kind in ("clip", "clip with its class token", "siglip"):
        found = trained(**KINDS[kind])
        write_llava_hf(tmp_path / kind, found)
        processor: Any = AutoProcessor.from_pretrained(tmp_path / kind)
        out = processor(text="<image> ?", images=Image.open(IMAGES / PICTURES[0]), return_tensors="pt")
        config = json.loads((tmp_path / kind / "config.json").read_text())
        assert (out["input_ids"] == config["image_token_index"]).sum() == found.model.num_image_tokens()
        assert config["image_seq_length"] == found.model.num_image_tokens()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"projector": POOLED}, "can't have the projector {'pooler': .*it takes type mlp2x_gelu"),
        ({"projector": {"type": "linear"}}, "projector .*'depth': 1.*it takes type mlp2x_gelu"),
        ({"vision": COCA}, r"vision encoder 'coca_vit-l'.*a final norm.*LayerScale.*it lacks norm_pre"),
        ({"vision": CLIP | {"kwargs": CLIP["kwargs"] | {"final_norm": True}}}, r"it has a final norm \(norm\."),
        ({"vision": CLIP | {"kwargs": CLIP["kwargs"] | {"reg_tokens": 2}}}, "it has registers"),
        ({"vision": CLIP | {"kwargs": CLIP["kwargs"] | {"qk_norm": True}}}, "it has blocks.0.attn.k_norm"),
    ],
)
def test_what_a_stock_llava_cant_have_is_refused_by_name(tmp_path: Path, parts: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_llava_hf(tmp_path / "out", trained(**{"projector": MLP} | parts))
    assert not (tmp_path / "out").exists()
