"""A start from a folder with a whole model: the numbers of its own program, and nothing passed over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_llavas import IMAGE_TOKEN, SIGLIP, VISION, old_llava, stock_llava

from composer_path import PathMLLM, load_reference_model
from composer_path.weights.assembly import assemble_model
from composer_path.weights.whole_folder import sections_of, whole_folder

KINDS: dict[str, dict[str, Any]] = {
    "clip": {},
    "clip with its class token": {"vision_feature_select_strategy": "full"},
    "the last hidden state": {"vision_feature_layer": -1},
    "a hidden state from the front": {"vision_feature_layer": 1},
    "siglip": {"vision": SIGLIP, "vision_feature_select_strategy": "full"},
    "tied": {"text": {"tie_word_embeddings": True}},
    "qwen2": {"text": {"model_type": "qwen2"}},
}


def start(folder: Path, tower: str | None = None, **more: Any) -> PathMLLM:
    return assemble_model(**sections_of(folder, tower), trainable=["projector"], attention="sdpa", **more).eval()


def ours_of(model: PathMLLM, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    length = len(ids)
    borders = torch.tensor([0, length], dtype=torch.int32)
    with torch.no_grad():
        return model(ids, torch.arange(length), borders, length, pixels, (ids < 0).nonzero()[:, 0])


def assert_same_model(model: PathMLLM, stock: Any, vision: dict[str, Any] = VISION) -> None:
    """Logits and greedy tokens of both are the same."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, vision["image_size"], vision["image_size"], generator=generator)
    images = [-200] * model.num_image_tokens()
    ids = torch.tensor([1, *images, 5, *images, 6, 7])
    theirs_ids = torch.where(ids < 0, IMAGE_TOKEN, ids)[None]
    with torch.no_grad():
        theirs = stock(input_ids=theirs_ids, pixel_values=pixels).logits[0]
    ours = ours_of(model, ids, pixels)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()  # measured 7e-7
    keywords: dict[str, Any] = {"max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": 2}
    mask = torch.ones_like(theirs_ids)
    said = stock.generate(input_ids=theirs_ids, pixel_values=pixels, attention_mask=mask, do_sample=False, **keywords)
    assert model.generate(ids, pixels, **keywords).tolist() == said[0, len(ids) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_llava_starts_with_its_own_logits_and_greedy_tokens(tmp_path: Path, kind: str) -> None:
    stock = stock_llava(tmp_path, **KINDS[kind])
    assert_same_model(start(tmp_path), stock)


@pytest.mark.parametrize("inside", [True, False])
def test_llavas_own_folder_is_the_same_model_with_its_tower_inside_or_where_its_config_says(
    tmp_path: Path, inside: bool
) -> None:
    stock = stock_llava(tmp_path / "stock")
    old_llava(tmp_path / "old", tmp_path / "stock", None if inside else tmp_path / "tower")
    if inside:  # then the configuration of the tower must be said, though not its weights
        with pytest.raises(ValueError, match="its vision tower must lie here; found only its name, 'openai/clip'"):
            sections_of(tmp_path / "old")
        (tmp_path / "tower").mkdir()
        vision = json.loads((tmp_path / "stock" / "config.json").read_text())["vision_config"]
        (tmp_path / "tower" / "config.json").write_text(json.dumps(vision))
    assert_same_model(start(tmp_path / "old", str(tmp_path / "tower")), stock)


def test_llavas_words_around_images_are_marks_here(tmp_path: Path) -> None:
    """The stock model with those two words in its prompt is what ours is with its marks."""
    stock = stock_llava(tmp_path / "stock")
    old_llava(tmp_path / "old", tmp_path / "stock", tmp_path / "tower")
    config = json.loads((tmp_path / "old" / "config.json").read_text()) | {"mm_use_im_start_end": True}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    model = start(tmp_path / "old")
    image, (before, behind) = 90, (94, 95)  # the last two words; another one stands for an image
    stock.config.image_token_id = stock.config.image_token_index = image
    marked = model.num_image_tokens()
    assert marked == 16 + 2
    ids = torch.tensor([1, *[-200] * marked, 5, 6])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    words = torch.tensor([[1, before, *[image] * 16, behind, 5, 6]])
    with torch.no_grad():
        theirs = stock(input_ids=words, pixel_values=pixels).logits[0]
    assert (ours_of(model, ids, pixels) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_references_folder_starts_as_it_is_loaded(golden: Path, tmp_path: Path) -> None:
    sections = sections_of(golden / "model")
    assert sections["vision_encoder"]["name"] == "coca_vit-l" and sections["vision_encoder"]["image_size"] == 64
    sections["vision_encoder"]["kwargs"]["num_heads"] = 4  # which no shape tells
    model = assemble_model(**sections, trainable=["projector"], attention="sdpa")
    expected = load_reference_model(golden / "model", image_size=64, num_heads=4).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())


def test_out_and_in_and_out_again_is_bit_identical(tmp_path: Path) -> None:
    stock_llava(tmp_path / "stock")
    model = start(tmp_path / "stock")
    model.save_pretrained(tmp_path / "ours")
    again = start(tmp_path / "ours")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    assert again.config() == model.config()


def broken(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_tensors_that_are_nobodys_are_named(tmp_path: Path) -> None:
    stock_llava(tmp_path)
    broken(tmp_path, lambda tensors: tensors.update({"image_newline": torch.zeros(3), "audio.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"doesn't fit. Left over \(2\): audio.weight, image_newline"):
        sections_of(tmp_path)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("multi_modal_projector.linear_2.bias", r"missing \(1\): mlp.2.bias"),
        ("encoder.layers.1.mlp.fc2.weight", r"missing \(1\): blocks.1.mlp.fc2.weight"),
        ("layers.1.mlp.gate_proj.weight", r"missing \(1\): model.layers.1.mlp.gate_proj.weight"),
    ],
)
def test_what_is_missing_or_misshapen_in_any_part_is_named(tmp_path: Path, part: str, words: str) -> None:
    stock_llava(tmp_path)
    key = next(key for key in load_file(tmp_path / "model.safetensors") if key.endswith(part))
    shutil.copytree(tmp_path, tmp_path / "lacks")
    broken(tmp_path / "lacks", lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=words):
        start(tmp_path / "lacks")
    broken(tmp_path, lambda tensors: tensors.update({key: torch.zeros(7)}))
    with pytest.raises(ValueError, match=r"other shapes \(1\)|\[7\]"):
        start(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_feature_layer": [-2, -5]}, "must give a hidden state of one of its 3 blocks; found layer"),
        ({"vision_feature_layer": -9}, "must give a hidden state of one of its 3 blocks; found layer -9"),
        ({"projector_hidden_act": "relu"}, "its projector must have gelu and biases; found 'relu'"),
        ({"vision_feature_select_strategy": "some"}, "must be 'default' or 'full'; found 'some'"),
        ({"vision_config": 3}, "must have vision_config, an object; found int"),
        ({"vision_config": {"model_type": "pixtral"}}, "must be a CLIP or SigLIP of transformers; found 'pixtral'"),
        ({"vision_config": VISION | {"hidden_size": -3}}, "hidden_size must be of type int"),
        ({"vision_config": VISION | {"hidden_act": "__import__"}}, "hidden_act must be one of"),
        ({"vision_config": VISION | {"hidden_size": 99_000}}, r"patch_embedding.weight must be \[99000, 3, 8, 8\]"),
        ({"vision_config": VISION | {"num_hidden_layers": 99_000}}, "mlp.fc1.weight must be .* found nothing"),
        ({"vision_config": VISION | {"image_size": 99_000}}, r"position_embedding.weight must be .* found \[17, 24\]"),
        ({"model_type": "llama"}, "found model_type 'llama'; take such a folder"),
    ],
)
def test_a_configuration_that_cant_be_built_is_one_error(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    stock_llava(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        sections_of(tmp_path)


def test_other_folders_are_no_whole_models(tmp_path: Path) -> None:
    assert whole_folder(tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    assert whole_folder(tmp_path) is None
    with pytest.raises(ValueError, match="must be one JSON object"):
        sections_of(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        sections_of(tmp_path / "nowhere")
